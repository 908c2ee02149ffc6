// Bradley-Terry loss of a reward model, its statistics and both gradients in one launch, in which blocks that count the
// pairs come first (grid.cuh).
#pragma once

#include "common/elementary.h"
#include "cuda/counts.cuh"
#include "cuda/grid.cuh"
#include "cuda/reward_loss.h"

namespace rlhf_fast::cuda {
namespace {

enum Sum { kLoss, kChosenSum, kRejectedSum, kCenterSum, kRight, kSums };  // kRight: ties are half right
static_assert(kSums == kRewardNumbers);

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

__device__ __forceinline__ void reward_loss_part(const RewardLossTask& a, int64_t number, double share) {
  const int64_t begin = number * a.part_length, end = begin + a.part_length < a.n ? begin + a.part_length : a.n;
  double sum[kSums] = {};
  for (int64_t at = begin + static_cast<int>(threadIdx.x) * kItems; at < end; at += kThreads * kItems)
    reward_loss_group(a, Group(at, end), static_cast<float>(share), sum);
  block_sum(sum);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < kSums; ++k) a.scratch[number * kSums + k] = sum[k];
}

__device__ __forceinline__ void reward_loss_finish(const RewardLossTask& a, double pairs, double share) {
  double sum[kSums] = {};
  for (int p = static_cast<int>(threadIdx.x); p < a.parts; p += kThreads) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sum[k] += a.scratch[static_cast<int64_t>(p) * kSums + k];
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

__device__ __forceinline__ void reward_loss_block(const RewardLossTask& a) {
  const int ticket = take_ticket(a.counters);
  if (ticket < a.count_parts) {
    const int64_t begin = ticket * a.count_length, end = begin + a.count_length;
    const int64_t counted = count_slots(a.mask, begin, end < a.n ? end : a.n);
    if (threadIdx.x == 0) add_count(a.counters, counted);
    return;
  }
  const int64_t counted = a.mask ? whole_count(a.counters, a.count_parts) : a.n;
  const double pairs = static_cast<double>(counted), share = 1 / (pairs > 0 ? pairs : 1);
  reward_loss_part(a, ticket - a.count_parts, share);
  if (is_last_block(a.counters, a.parts)) reward_loss_finish(a, pairs, share);
}

}  // namespace
}  // namespace rlhf_fast::cuda
