// Generalised advantage estimation (arXiv 1506.02438, eq. 16) and its adjoint: one block a row, one pass.
#pragma once

#include "cuda/scan.cuh"

namespace rlhf_fast::cuda {
namespace {

__device__ __forceinline__ void gae_row(const GaeArgs& a) {
  const int64_t i = blockIdx.x;
  Row row = row_of(a, i);
  const int64_t after = last_real(a.mask, row) + 1;
  zero(a.advantages, after, row.end);
  zero(a.returns, after, row.end);
  row.end = after;
  scan_gae(
      {a.gamma, a.lam, a.decay_gaps}, a.values, a.mask, row, a.bootstrap ? static_cast<double>(a.bootstrap[i]) : 0.0,
      -1, a.advantages, a.returns,
      [&a](const Group& group, const bool (&real)[kItems], float (&out)[kItems]) { group.load(a.rewards, real, out); },
      [](const bool (&)[kItems], const float (&)[kItems]) {});
}

// With s_t the adjoint of delta_t: s_t = gA_t + gR_t + gamma lam s_{t-1}, dr_t = s_t, dV_t = gR_t - s_t + gamma
// s_{t-1}.
__device__ __forceinline__ void gae_backward_row(const GaeBackwardArgs& a) {
  const int64_t i = blockIdx.x;
  Row row = row_of(a, i);
  const int64_t after = last_real(a.mask, row) + 1;
  zero(a.grad_rewards, after, row.end);
  zero(a.grad_values, after, row.end);
  row.end = after;
  const double c = a.gamma * a.lam;
  State state = {0, 0};
  for (int64_t tile = row.begin; tile < row.end; tile += kTile) {
    const Group group(tile + static_cast<int>(threadIdx.x) * kItems, row.end);
    float into_advantages[kItems], into_returns[kItems];
    bool real[kItems];
    group.load_mask(a.mask, real);
    group.load(a.grad_advantages, real, into_advantages);
    group.load(a.grad_returns, real, into_returns);
    Run run;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!real[k] && !a.decay_gaps) continue;
      Run one;
      one.by_sum = c;
      one.plus = static_cast<double>(into_advantages[k]) + static_cast<double>(into_returns[k]);
      one.any = 1;
      run = run.then(one);
    }
    State at = scan_block(run, &state);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (k >= group.count) continue;
      const double before = at.sum, g = static_cast<double>(into_returns[k]);
      if (real[k] || a.decay_gaps) at.sum = static_cast<double>(into_advantages[k]) + g + c * before;
      into_advantages[k] = real[k] ? static_cast<float>(at.sum) : 0;
      into_returns[k] = real[k] ? static_cast<float>(g - at.sum + a.gamma * before) : 0;
    }
    group.store(a.grad_rewards, into_advantages);
    group.store(a.grad_values, into_returns);
    if (group.count > 0 && group.first + group.count == row.end)
      a.grad_bootstrap[i] = static_cast<float>(a.gamma * at.sum);
  }
  if (row.end <= row.begin && threadIdx.x == 0) a.grad_bootstrap[i] = 0;
}

}  // namespace
}  // namespace rlhf_fast::cuda
