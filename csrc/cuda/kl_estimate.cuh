// Per-token KL estimators and their derivative, element by element.
#pragma once

#include "cuda/kl.cuh"
#include "cuda/rows.cuh"

namespace rlhf_fast::cuda {
namespace {

__device__ __forceinline__ Group group_of_thread(int64_t n) {
  return {(static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x)) * kItems, n};
}

__device__ __forceinline__ void kl_estimate_group(const KlEstimateArgs& a) {
  const Group group = group_of_thread(a.n);
  bool real[kItems];
  float logprobs[kItems], ref[kItems], out[kItems];
  group.load_mask(a.mask, real);
  group.load(a.logprobs, real, logprobs);
  group.load(a.ref_logprobs, real, ref);
  const KlRules rules = {a.kind, false, static_cast<float>(a.clamp_in), static_cast<float>(a.clamp_out)};
#pragma unroll
  for (int k = 0; k < kItems; ++k) out[k] = kl_of(logprobs[k], ref[k], rules).value;  // 0 where both are
  group.store(a.out, out);
}

__device__ __forceinline__ void kl_estimate_backward_group(const KlEstimateBackwardArgs& a) {
  const Group group = group_of_thread(a.n);
  bool real[kItems];
  float logprobs[kItems], ref[kItems], grad[kItems];
  group.load_mask(a.mask, real);
  group.load(a.logprobs, real, logprobs);
  group.load(a.ref_logprobs, real, ref);
  group.load(a.grad, real, grad);  // an upstream NaN of a masked token stops here
  const KlRules rules = {a.kind, a.straight_through, static_cast<float>(a.clamp_in), static_cast<float>(a.clamp_out)};
#pragma unroll
  for (int k = 0; k < kItems; ++k) grad[k] *= kl_of(logprobs[k], ref[k], rules).slope;
  group.store(a.grad_logprobs, grad);
}

}  // namespace
}  // namespace rlhf_fast::cuda
