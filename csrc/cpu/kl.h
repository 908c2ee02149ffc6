// Loops over the KL estimators of common/token_losses.h, one instance per kind so that they vectorise.
#pragma once

#include <type_traits>

#include "common/token_losses.h"

namespace rlhf_fast {
namespace {

// body(kind, straight_through) with both as compile-time constants.
template <class Body>
inline void with_kl_kind(int kind, bool straight_through, Body body) {
  const auto with = [&](auto constant) {
    straight_through ? body(constant, std::true_type{}) : body(constant, std::false_type{});
  };
  switch (kind) {
    case kK1:
      return with(std::integral_constant<int, kK1>{});
    case kK2:
      return with(std::integral_constant<int, kK2>{});
    case kK3:
      return with(std::integral_constant<int, kK3>{});
    default:
      return with(std::integral_constant<int, kAbs>{});
  }
}

}  // namespace
}  // namespace rlhf_fast
