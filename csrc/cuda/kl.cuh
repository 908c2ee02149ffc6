// The KL estimators of common/token_losses.h with their kind known at run time.
#pragma once

#include "common/token_losses.h"
#include "cuda/simt.h"

namespace rlhf_fast::cuda {
namespace {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

struct KlRules {
  int kind;               // KlKind
  bool straight_through;  // gradient of k2
  float clamp_in, clamp_out;
};

__device__ __forceinline__ ValueSlope<float> kl_of(float logp, float ref, const KlRules& rules) {
  const auto with = [&](auto kind) {
    return rules.straight_through ? kl_token<decltype(kind)::value, true>(logp, ref, rules.clamp_in, rules.clamp_out)
                                  : kl_token<decltype(kind)::value, false>(logp, ref, rules.clamp_in, rules.clamp_out);
  };
  switch (rules.kind) {
    case kK1:
      return with(Constant<kK1>());
    case kK2:
      return with(Constant<kK2>());
    case kK3:
      return with(Constant<kK3>());
    default:
      return with(Constant<kAbs>());
  }
}

}  // namespace
}  // namespace rlhf_fast::cuda
