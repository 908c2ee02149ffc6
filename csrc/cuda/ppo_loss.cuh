// The PPO loss, its gradients and its statistics in one launch, which reads everything once, and the mask twice where a
// denominator is counted. Gradients are final: the denominators depend on the mask alone, and blocks that count it come
// first (grid.cuh). Sums are put together by the last block, part by part in their order.
#pragma once

#include "cuda/counts.cuh"
#include "cuda/grid.cuh"
#include "cuda/kl.cuh"
#include "cuda/moments.cuh"
#include "cuda/ppo_loss.h"

namespace rlhf_fast::cuda {
namespace {

enum { kLow = kAllSums + kCounts, kHigh, kReturnCentre, kErrorCentre, kNumbers };  // of a part, after sums and counts
static_assert(kNumbers == kPpoNumbers);

__device__ __forceinline__ int64_t ppo_loss_count(const PpoLossTask& a, int part) {
  const int64_t begin = part * a.count_length, end = begin + a.count_length;
  if (is_by_rows(a.reduction)) return count_rows(a, begin, end < a.rows ? end : a.rows, a.lengths);
  return count_slots(a.mask, begin, end < a.n ? end : a.n);
}

// The row that holds slot t.
__device__ __forceinline__ int64_t row_at(const PpoLossArgs& a, int64_t t) {
  if (!a.cu_seqlens) return t / a.length;
  int64_t low = 0, high = a.rows - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    a.cu_seqlens[middle] <= t ? low = middle : high = middle - 1;
  }
  return low;
}

struct PpoPass {
  const PpoLossArgs& a;
  PolicyRules<float> rules;
  KlRules kl_rules;
  float value_bound;
  double share;  // 1 / denominator
  double sum[kAllSums];
  int count[kCounts];
  float low, high;          // of the ratio
  float value_0, return_0;  // of the thread's first real token: its sums are around that

  __device__ __forceinline__ PpoPass(const PpoLossArgs& a, int64_t counted)
      : a(a),
        rules{static_cast<float>(1 - a.clip_low), static_cast<float>(1 + a.clip_high), static_cast<float>(a.dual_clip),
              static_cast<float>(a.ratio_clamp)},
        kl_rules{a.kl_kind, a.kl_straight_through, static_cast<float>(a.kl_clamp_in),
                 static_cast<float>(a.kl_clamp_out)},
        value_bound(a.old_values ? static_cast<float>(a.value_clip) : INFINITY),
        low(INFINITY),
        high(0),
        value_0(0),
        return_0(0) {
    double denominator = a.reduction == kTokenSum ? 1 : static_cast<double>(counted);
    if (a.normalizer)
      denominator = static_cast<double>(*a.normalizer);
    else if (a.divisor > 0)
      denominator = a.divisor;
    share = denominator > 0 ? 1 / denominator : 0;
#pragma unroll
    for (int k = 0; k < kAllSums; ++k) sum[k] = 0;
#pragma unroll
    for (int k = 0; k < kCounts; ++k) count[k] = 0;
  }

  // Weights of the tokens of a group in the loss.
  __device__ __forceinline__ void weigh(const Group& group, double (&weight)[kItems]) const {
#pragma unroll
    for (int k = 0; k < kItems; ++k) weight[k] = share;
    if (a.reduction != kSeqMeanTokenMean || group.count == 0) return;
    int64_t row = row_at(a, group.first), end = row_of(a, row).end;
    double mean = mean_of(row);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (k >= group.count) break;
      if (end <= group.first + k) {
        while (end <= group.first + k && row < a.rows - 1) end = row_of(a, ++row).end;
        mean = mean_of(row);
      }
      weight[k] = mean;
    }
  }
  __device__ __forceinline__ double mean_of(int64_t row) const {
    const int64_t length = a.lengths[row];
    return share / static_cast<double>(length > 0 ? length : 1);
  }

  __device__ __forceinline__ void take(const Group& group) {
    bool real[kItems];
    double weight[kItems];
    float logprobs[kItems], grad[kItems];
    group.load_mask(a.mask, real);
    weigh(group, weight);
    group.load(a.logprobs, real, logprobs);
    policy(group, real, weight, logprobs, grad);
    if (a.ref_logprobs) kl(group, real, weight, logprobs, grad);
    if (a.grad_logprobs) group.store(a.grad_logprobs, grad);
    if (a.entropy) bonus(group, real, weight);
    if (a.values) value(group, real, weight);
#pragma unroll
    for (int k = 0; k < kItems; ++k) count[kReal] += real[k];
  }

  __device__ __forceinline__ void policy(const Group& group, const bool (&real)[kItems], const double (&weight)[kItems],
                                         const float (&logprobs)[kItems], float (&grad)[kItems]) {
    float old[kItems], advantages[kItems], importance[kItems];
    group.load(a.old_logprobs, real, old);
    group.load(a.advantages, real, advantages);
    if (a.importance_weights) group.load(a.importance_weights, real, importance);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      grad[k] = 0;
      if (!real[k]) continue;
      const RatioToken<float> ratio = ratio_token(logprobs[k], old[k], rules);
      const PolicyToken<float> t = a.weights ? weighted_token(logprobs[k], ratio.ratio, advantages[k], rules)
                                             : policy_token(ratio.ratio, ratio.clamped, advantages[k], rules);
      const float factor = a.importance_weights ? importance[k] : 1;
      const double d = static_cast<double>(ratio.log_ratio), r = static_cast<double>(ratio.ratio) - 1;
      sum[kPolicy] += weight[k] * static_cast<double>(t.loss * factor);
      sum[kSquare] += d * d;
      sum[kK3Sum] += static_cast<double>(k3_of(ratio.log_ratio));
      sum[kRatio] += r;
      sum[kRatioSquare] += r * r;
      count[kClipped] += t.clipped > 0;
      count[kCapped] += t.capped > 0;
      count[kClamped] += ratio.clamped > 0;
      low = fminf(low, ratio.ratio);
      high = fmaxf(high, ratio.ratio);
      grad[k] = static_cast<float>(weight[k]) * (t.slope * factor);
    }
  }

  __device__ __forceinline__ void kl(const Group& group, const bool (&real)[kItems], const double (&weight)[kItems],
                                     const float (&logprobs)[kItems], float (&grad)[kItems]) {
    float ref[kItems];
    group.load(a.ref_logprobs, real, ref);
    const float coef = static_cast<float>(a.kl_coef);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!real[k]) continue;
      const ValueSlope<float> t = kl_of(logprobs[k], ref[k], kl_rules);
      sum[kPenalty] += weight[k] * static_cast<double>(t.value);
      sum[kKlSum] += static_cast<double>(t.value);
      grad[k] += static_cast<float>(weight[k]) * coef * t.slope;
    }
  }

  __device__ __forceinline__ void bonus(const Group& group, const bool (&real)[kItems],
                                        const double (&weight)[kItems]) {
    float entropy[kItems];
    group.load(a.entropy, real, entropy);
    const float coef = -static_cast<float>(a.entropy_coef);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      sum[kBonus] += weight[k] * static_cast<double>(entropy[k]);
      sum[kEntropySum] += static_cast<double>(entropy[k]);
      entropy[k] = real[k] ? static_cast<float>(weight[k]) * coef : 0;
    }
    if (a.grad_entropy) group.store(a.grad_entropy, entropy);
  }

  __device__ __forceinline__ void value(const Group& group, const bool (&real)[kItems],
                                        const double (&weight)[kItems]) {
    float values[kItems], returns[kItems], old[kItems];
    group.load(a.values, real, values);
    group.load(a.returns, real, returns);
    if (a.old_values) group.load(a.old_values, real, old);
    const float coef = static_cast<float>(a.value_coef);
    int before = count[kReal];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      float grad = 0;
      if (real[k]) {
        const ValueToken<float> t = value_token(values[k], a.old_values ? old[k] : values[k], returns[k], value_bound);
        if (before++ == 0) value_0 = values[k], return_0 = returns[k];
        const double r = static_cast<double>(returns[k]), first = static_cast<double>(return_0), d = r - first;
        const double e = (r - static_cast<double>(values[k])) - (first - static_cast<double>(value_0));
        sum[kValue] += weight[k] * static_cast<double>(t.loss);
        sum[kReturn] += d;
        sum[kReturnSquare] += d * d;
        sum[kError] += e;
        sum[kErrorSquare] += e * e;
        count[kValueClipped] += t.clipped > 0;
        grad = static_cast<float>(weight[k]) * coef * t.slope;
      }
      values[k] = grad;
    }
    if (a.grad_values) group.store(a.grad_values, values);
  }

  // Brings the sums of all threads around the numbers of the first thread of the block that has a token. Equal numbers
  // keep sums of exactly 0.
  __device__ __forceinline__ void recentre() {
    SIMT_SHARED(float, centres, [2]);
    const int rank = kThreads - static_cast<int>(threadIdx.x);
    const float most = block_max(count[kReal] > 0 ? static_cast<float>(rank) : 0);
    if (most == 0) return;
    if (rank == static_cast<int>(most)) centres[0] = return_0, centres[1] = value_0;
    __syncthreads();
    const double was = return_centre(), error_was = error_centre();
    return_0 = centres[0];
    value_0 = centres[1];
    if (count[kReal] == 0) return;
    shift<kReturn>(was - return_centre());
    shift<kError>(error_was - error_centre());
  }
  __device__ __forceinline__ double return_centre() const { return static_cast<double>(return_0); }
  __device__ __forceinline__ double error_centre() const { return return_centre() - static_cast<double>(value_0); }
  template <int k>
  __device__ __forceinline__ void shift(double by) {
    const double all = by * count[kReal];
    sum[k + 1] += by * (2 * sum[k] + all);
    sum[k] += all;
  }
};

__device__ __forceinline__ void ppo_loss_part(const PpoLossTask& a, int64_t number, int64_t counted) {
  PpoPass pass(a, counted);
  const int64_t begin = number * a.part_length;
  const int64_t end = begin + a.part_length < a.n ? begin + a.part_length : a.n;
  for (int64_t at = begin + static_cast<int>(threadIdx.x) * kItems; at < end; at += kThreads * kItems)
    pass.take(Group(at, end));
  if (a.values) pass.recentre();
  double* to = a.scratch + number * kPpoNumbers;
  // What takes least registers goes first, and is stored before the rest is added up.
  const float low = -block_max(-pass.low), high = block_max(pass.high);
  double counts[kCounts], sums[kAllSums];
  block_sum_of_first(pass.count, counts);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kCounts; ++k) to[kAllSums + k] = counts[k];
    to[kLow] = static_cast<double>(low);
    to[kHigh] = static_cast<double>(high);
    to[kReturnCentre] = pass.return_centre();
    to[kErrorCentre] = pass.error_centre();
  }
  block_sum_of_first(pass.sum, sums);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < kAllSums; ++k) to[k] = sums[k];
}

// Sum of the squared deviations from the mean, of what the parts have kept sums of around a centre.
template <int kOf, int kCentre>
__device__ __forceinline__ double ppo_loss_squares(const PpoLossTask& a) {
  Moments mine;
#pragma unroll 1
  for (int p = static_cast<int>(threadIdx.x); p < a.parts; p += kThreads) {
    const double* part = a.scratch + static_cast<int64_t>(p) * kPpoNumbers;
    mine.join(moments_of(part[kAllSums + kReal], part[kCentre], part[kOf], part[kOf + 1]));
  }
  return pooled(mine).squares;
}

__device__ __forceinline__ void ppo_loss_finish(const PpoLossTask& a) {
  double sums[kSums] = {}, counts[kCounts] = {};
  float low = INFINITY, high = 0;
#pragma unroll 1
  for (int p = static_cast<int>(threadIdx.x); p < a.parts; p += kThreads) {
    const double* part = a.scratch + static_cast<int64_t>(p) * kPpoNumbers;
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] += part[k];
#pragma unroll
    for (int k = 0; k < kCounts; ++k) counts[k] += part[kAllSums + k];
    low = fminf(low, static_cast<float>(part[kLow]));
    high = fmaxf(high, static_cast<float>(part[kHigh]));
  }
  PpoTotals all;
  block_sum_of_first(sums, all.sum);
  block_sum_of_first(counts, all.count);
  all.low = static_cast<double>(-block_max(-low));
  all.high = static_cast<double>(block_max(high));
  all.returns = a.values ? ppo_loss_squares<kReturn, kReturnCentre>(a) : 0;
  all.errors = a.values ? ppo_loss_squares<kError, kErrorCentre>(a) : 0;
  if (threadIdx.x == 0) write_ppo_loss(a, all, a.loss, a.stats);
}

__device__ __forceinline__ void ppo_loss_block(const PpoLossTask& a) {
  const int ticket = take_ticket(a.counters);
  if (ticket < a.count_parts) {
    const int64_t counted = ppo_loss_count(a, ticket);
    if (threadIdx.x == 0) add_count(a.counters, counted);
    return;
  }
  ppo_loss_part(a, ticket - a.count_parts, a.count_parts ? whole_count(a.counters, a.count_parts) : 0);
  if (is_last_block(a.counters, a.parts)) ppo_loss_finish(a);
}

}  // namespace
}  // namespace rlhf_fast::cuda
