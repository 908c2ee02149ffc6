// The PPO loss, its gradients and its statistics: a launch that counts the mask, and one that reads everything else
// once. Gradients are final, since the denominators depend on the mask alone. Sums are put together by the last block,
// part by part in their order.
#pragma once

#include "cuda/counts.cuh"
#include "cuda/finish.cuh"
#include "cuda/kl.cuh"
#include "cuda/ppo_loss.h"

namespace rlhf_fast::cuda {
namespace {

enum Stat {
  kPolicyLoss,
  kValueLoss,
  kEntropy,
  kKl,
  kClipFraction,
  kDualClipFraction,
  kValueClipFraction,
  kApproxKl,
  kApproxKlK3,
  kRatioMean,
  kRatioVar,
  kRatioMin,
  kRatioMax,
  kRatioClamped,
  kExplainedVariance,
  kTokens,
  kStats
};

enum Sum {
  kPolicy,
  kValue,
  kBonus,
  kPenalty,  // weighted, as in the loss
  kEntropySum,
  kKlSum,
  kSquare,
  kK3Sum,
  kRatio,
  kRatioSquare,
  kReturn,
  kReturnSquare,
  kError,
  kErrorSquare,
  kClipped,
  kCapped,
  kClamped,
  kValueClipped,
  kSums
};
static_assert(kSums + 2 == kPpoNumbers);  // and the extremes of the ratio

__device__ __forceinline__ void ppo_loss_count_part(const PpoLossTask& a) {
  double* part = a.scratch + 1 + blockIdx.x * kCountNumbers;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.count_length, end = begin + a.count_length;
  if (a.reduction == kSeqMeanTokenMean || a.reduction == kSeqMeanTokenSum)
    count_rows(a, begin, end < a.rows ? end : a.rows, a.lengths, part);
  else
    count_slots(a.mask, begin, end < a.n ? end : a.n, part);
  if (blockIdx.x == 0 && threadIdx.x == 0) *reinterpret_cast<int*>(a.scratch) = 0;  // of the last block
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
  double share;             // 1 / denominator
  float value_0, return_0;  // of the first real token: variances are sums of squares around it
  double sum[kSums];
  float low, high;  // of the ratio

  __device__ __forceinline__ PpoPass(const PpoLossArgs& a, const Counts& counts)
      : a(a),
        rules{static_cast<float>(1 - a.clip_low), static_cast<float>(1 + a.clip_high), static_cast<float>(a.dual_clip),
              static_cast<float>(a.ratio_clamp)},
        kl_rules{a.kl_kind, a.kl_straight_through, static_cast<float>(a.kl_clamp_in),
                 static_cast<float>(a.kl_clamp_out)},
        value_bound(a.old_values ? static_cast<float>(a.value_clip) : INFINITY),
        value_0(a.values && counts.first >= 0 ? a.values[counts.first] : 0),
        return_0(a.values && counts.first >= 0 ? a.returns[counts.first] : 0),
        low(INFINITY),
        high(0) {
    double denominator = a.reduction == kTokenMean ? counts.tokens : a.reduction == kTokenSum ? 1 : counts.rows;
    if (a.normalizer)
      denominator = static_cast<double>(*a.normalizer);
    else if (a.divisor > 0)
      denominator = a.divisor;
    share = denominator > 0 ? 1 / denominator : 0;
#pragma unroll
    for (int k = 0; k < kSums; ++k) sum[k] = 0;
  }

  // Weights of the tokens of a group in the loss.
  __device__ __forceinline__ void weigh(const Group& group, double (&weight)[kItems]) const {
#pragma unroll
    for (int k = 0; k < kItems; ++k) weight[k] = share;
    if (a.reduction != kSeqMeanTokenMean || group.count == 0) return;
    int64_t row = row_at(a, group.first);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (k >= group.count) break;
      while (row_of(a, row).end <= group.first + k) ++row;
      const int64_t length = a.lengths[row];
      weight[k] = share / static_cast<double>(length > 0 ? length : 1);
    }
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
      const PolicyToken<float> t = policy_token(ratio.ratio, ratio.clamped, advantages[k], rules);
      const float factor = a.importance_weights ? importance[k] : 1;
      const double d = static_cast<double>(ratio.log_ratio), r = static_cast<double>(ratio.ratio) - 1;
      sum[kPolicy] += weight[k] * static_cast<double>(t.loss * factor);
      sum[kSquare] += d * d;
      sum[kK3Sum] += static_cast<double>(k3_of(ratio.log_ratio));
      sum[kRatio] += r;
      sum[kRatioSquare] += r * r;
      sum[kClipped] += static_cast<double>(t.clipped);
      sum[kCapped] += static_cast<double>(t.capped);
      sum[kClamped] += static_cast<double>(ratio.clamped);
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
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      float grad = 0;
      if (real[k]) {
        const ValueToken<float> t = value_token(values[k], a.old_values ? old[k] : values[k], returns[k], value_bound);
        const double r = static_cast<double>(returns[k]), first = static_cast<double>(return_0), d = r - first;
        const double e = (r - static_cast<double>(values[k])) - (first - static_cast<double>(value_0));
        sum[kValue] += weight[k] * static_cast<double>(t.loss);
        sum[kReturn] += d;
        sum[kReturnSquare] += d * d;
        sum[kError] += e;
        sum[kErrorSquare] += e * e;
        sum[kValueClipped] += static_cast<double>(t.clipped);
        grad = static_cast<float>(weight[k]) * coef * t.slope;
      }
      values[k] = grad;
    }
    if (a.grad_values) group.store(a.grad_values, values);
  }
};

__device__ __forceinline__ void ppo_loss_write(const PpoLossArgs& a, const double (&sum)[kSums], float low, float high,
                                               double tokens) {
  const double n = tokens > 0 ? tokens : 1, shift = sum[kRatio] / n;
  const bool valid = tokens > 0 && !isnan(shift);
  double loss = sum[kPolicy], stat[kStats];
  if (a.values) loss += a.value_coef * sum[kValue];
  if (a.entropy) loss -= a.entropy_coef * sum[kBonus];
  if (a.ref_logprobs) loss += a.kl_coef * sum[kPenalty];
  stat[kPolicyLoss] = sum[kPolicy];
  stat[kValueLoss] = sum[kValue];
  stat[kEntropy] = sum[kEntropySum] / n;
  stat[kKl] = sum[kKlSum] / n;
  stat[kClipFraction] = sum[kClipped] / n;
  stat[kDualClipFraction] = sum[kCapped] / n;
  stat[kValueClipFraction] = sum[kValueClipped] / n;
  stat[kApproxKl] = sum[kSquare] / n / 2;
  stat[kApproxKlK3] = sum[kK3Sum] / n;
  stat[kRatioMean] = tokens > 0 ? 1 + shift : 0;
  const double variance = sum[kRatioSquare] / n - shift * shift;
  stat[kRatioVar] = variance < 0 ? 0 : variance;
  stat[kRatioMin] = valid ? static_cast<double>(low) : shift;
  stat[kRatioMax] = valid ? static_cast<double>(high) : shift;
  stat[kRatioClamped] = sum[kClamped];
  const double returns = sum[kReturnSquare] - sum[kReturn] * sum[kReturn] / n;
  const double errors = sum[kErrorSquare] - sum[kError] * sum[kError] / n;
  stat[kExplainedVariance] = sum[kReturnSquare] == 0 || returns <= 0 ? 0 : 1 - errors / returns;
  stat[kTokens] = tokens;
  *a.loss = static_cast<float>(loss);
#pragma unroll
  for (int k = 0; k < kStats; ++k) a.stats[k] = static_cast<float>(stat[k]);
}

__device__ __forceinline__ void ppo_loss_part(const PpoLossTask& a) {
  const double* counted = a.scratch + 1;
  double* parts = a.scratch + 1 + kMaxParts * kCountNumbers;
  const Counts counts = all_counts(counted, a.count_parts);
  PpoPass pass(a, counts);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.part_length;
  const int64_t end = begin + a.part_length < a.n ? begin + a.part_length : a.n;
  for (int64_t at = begin + static_cast<int>(threadIdx.x) * kItems; at < end; at += kThreads * kItems)
    pass.take(Group(at, end));
  block_sum(pass.sum);
  float low = -block_max(-pass.low), high = block_max(pass.high);
  double* part = parts + static_cast<int64_t>(blockIdx.x) * kPpoNumbers;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) part[k] = pass.sum[k];
    part[kSums] = static_cast<double>(low);
    part[kSums + 1] = static_cast<double>(high);
  }
  if (!is_last_block(reinterpret_cast<int*>(a.scratch))) return;
  double sum[kSums] = {};
  low = INFINITY;
  high = 0;
  for (int p = static_cast<int>(threadIdx.x); p < static_cast<int>(gridDim.x); p += kThreads) {
    part = parts + static_cast<int64_t>(p) * kPpoNumbers;
#pragma unroll
    for (int k = 0; k < kSums; ++k) sum[k] += part[k];
    low = fminf(low, static_cast<float>(part[kSums]));
    high = fmaxf(high, static_cast<float>(part[kSums + 1]));
  }
  block_sum(sum);
  low = -block_max(-low);
  high = block_max(high);
  if (threadIdx.x == 0) ppo_loss_write(a, sum, low, high, counts.tokens);
}

}  // namespace
}  // namespace rlhf_fast::cuda
