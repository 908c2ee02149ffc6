// The KL estimators of common/token_losses.h with their kind known at run time.
#pragma once

#include "common/token_losses.h"
#include "cuda/simt.h"

namespace rlhf_fast::cuda {
namespace {

struct KlRules {
  int kind;               // KlKind
  bool straight_through;  // gradient of k2
  float clamp_in, clamp_out;
};

template <int kKind>
__device__ __forceinline__ ValueSlope<float> kl_as(float logp, float ref, const KlRules& rules) {
  return rules.straight_through ? kl_token<kKind, true>(logp, ref, rules.clamp_in, rules.clamp_out)
                                : kl_token<kKind, false>(logp, ref, rules.clamp_in, rules.clamp_out);
}

__device__ __forceinline__ ValueSlope<float> kl_of(float logp, float ref, const KlRules& rules) {
  switch (rules.kind) {
    case kK1:
      return kl_as<kK1>(logp, ref, rules);
    case kK2:
      return kl_as<kK2>(logp, ref, rules);
    case kK3:
      return kl_as<kK3>(logp, ref, rules);
    default:
      return kl_as<kAbs>(logp, ref, rules);
  }
}

}  // namespace
}  // namespace rlhf_fast::cuda
