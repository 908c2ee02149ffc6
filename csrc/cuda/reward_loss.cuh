// Bradley-Terry loss of a reward model: a launch that counts the pairs, and one for loss, statistics and both
// gradients.
#pragma once

#include "common/elementary.h"
#include "cuda/counts.cuh"
#include "cuda/finish.cuh"
#include "cuda/reward_loss.h"

namespace rlhf_fast::cuda {
namespace {

enum Sum { kLoss, kChosenSum, kRejectedSum, kCenterSum, kRight, kSums };  // kRight: ties are half right
static_assert(kSums == kRewardNumbers);

template <class Task>
__device__ __forceinline__ Row part_of(const Task& a) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.part_length, end = begin + a.part_length;
  return {begin, end < a.n ? end : a.n};
}

__device__ __forceinline__ void reward_loss_count_part(const RewardLossTask& a) {
  const Row part = part_of(a);
  count_slots(a.mask, part.begin, part.end, a.scratch + 1 + blockIdx.x * kCountNumbers);
  if (blockIdx.x == 0 && threadIdx.x == 0) *reinterpret_cast<int*>(a.scratch) = 0;  // of the last block
}

__device__ __forceinline__ void reward_loss_group(const RewardLossArgs& a, const Group& group, float share,
                                                  double (&sum)[kSums]) {
  bool real[kItems];
  float chosen[kItems], rejected[kItems], margin[kItems] = {}, up[kItems], down[kItems];
  group.load_mask(a.mask, real);
  group.load(a.chosen, real, chosen);
  group.load(a.rejected, real, rejected);
  if (a.margin) group.load(a.margin, real, margin);
  const float centre = static_cast<float>(2 * a.center_coef), smoothing = static_cast<float>(a.smoothing);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    up[k] = down[k] = 0;
    if (!real[k]) continue;
    const float gap = chosen[k] - rejected[k], x = gap - margin[k], both = chosen[k] + rejected[k];
    // (1 - e) softplus(-x) + e softplus(x) and its derivative, without overflow.
    const float tail = exp_of(x < 0 ? x : -x);                  // e^-|x|
    const float smoothed = smoothing != 0 ? smoothing * x : 0;  // 0 * inf would be NaN
    const float slope = smoothing - (x < 0 ? 1.0f : tail) / (1 + tail);
    sum[kLoss] += static_cast<double>((x < 0 ? -x : 0.0f) + log1p_of(tail) + smoothed);
    sum[kChosenSum] += static_cast<double>(chosen[k]);
    sum[kRejectedSum] += static_cast<double>(rejected[k]);
    sum[kCenterSum] += static_cast<double>(both) * static_cast<double>(both);
    sum[kRight] += gap > 0 ? 1 : gap == 0 ? 0.5 : 0;
    up[k] = (centre * both + slope) * share;
    down[k] = (centre * both - slope) * share;
  }
  if (!a.grads) return;
  group.store(a.grads, up);
  group.store(a.grads + a.n, down);
}

__device__ __forceinline__ void reward_loss_part(const RewardLossTask& a) {
  const double pairs = all_counts(a.scratch + 1, a.parts).tokens, share = 1 / (pairs > 0 ? pairs : 1);
  const Row slots = part_of(a);
  double sum[kSums] = {};
  for (int64_t at = slots.begin + static_cast<int>(threadIdx.x) * kItems; at < slots.end; at += kThreads * kItems)
    reward_loss_group(a, Group(at, slots.end), static_cast<float>(share), sum);
  block_sum(sum);
  double* parts = a.scratch + 1 + kMaxParts * kCountNumbers;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) parts[static_cast<int64_t>(blockIdx.x) * kSums + k] = sum[k];
  }
  if (!is_last_block(reinterpret_cast<int*>(a.scratch))) return;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sum[k] = 0;
    for (int p = static_cast<int>(threadIdx.x); p < static_cast<int>(gridDim.x); p += kThreads)
      sum[k] += parts[static_cast<int64_t>(p) * kSums + k];
  }
  block_sum(sum);
  if (threadIdx.x != 0) return;
  const double centre = sum[kCenterSum] * share, centred = a.center_coef != 0 ? a.center_coef * centre : 0;
  *a.loss = static_cast<float>(sum[kLoss] * share + centred);
  const double stats[] = {sum[kRight] * share,
                          (sum[kChosenSum] - sum[kRejectedSum]) * share,
                          sum[kChosenSum] * share,
                          sum[kRejectedSum] * share,
                          centre,
                          pairs};
#pragma unroll
  for (int k = 0; k < 6; ++k) a.stats[k] = static_cast<float>(stats[k]);
}

}  // namespace
}  // namespace rlhf_fast::cuda
