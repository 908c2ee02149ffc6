// The maths of one token, with its derivative: KL estimators, the policy term, the clipped value term; and the ratio of
// a whole row. Plain arithmetic on scalars for host and device; masked tokens never get here.
#pragma once

#include "common/elementary.h"

namespace rlhf_fast {
namespace {

enum KlKind { kK1, kK2, kK3, kAbs };
enum Level { kToken, kSequence, kSequenceToken, kProduct };  // order of reference LEVELS
enum Surrogate { kClip, kCispo, kScore };                    // order of reference SURROGATES

template <class T>
struct ValueSlope {
  T value, slope;
};

// Estimator of KL(policy || reference) from x = ref - logp, and its derivative towards logp.
// Beyond a bound the value is the bound and the derivative 0; straight-through takes the derivative of k2 without
// bounds.
template <int kKind, bool kStraightThrough, class T>
RLHF_FAST_INLINE_HD ValueSlope<T> kl_token(T logp, T ref, T clamp_in, T clamp_out) {
  const T raw = ref - logp, x = clamp_of(raw, -clamp_in, clamp_in);
  T value, slope;
  if constexpr (kKind == kK1) {
    value = -x;
    slope = 1;
  } else if constexpr (kKind == kK2) {
    value = x * x / 2;
    slope = -x;
  } else if constexpr (kKind == kK3) {
    value = k3_of(x);
    slope = -(value + x);  // 1 - e^x without cancellation
  } else {
    value = x < 0 ? -x : x;
    slope = x > 0 ? T(-1) : (x < 0 ? T(1) : T(0));
  }
  const T bounded = clamp_of(value, -clamp_out, clamp_out);
  if constexpr (kStraightThrough) return {bounded, -raw};
  slope = (raw < 0 ? -raw : raw) > clamp_in ? T(0) : slope;
  return {bounded, (value < 0 ? -value : value) > clamp_out ? T(0) : slope};
}

template <class T>
struct PolicyRules {
  T low, high;    // bounds of the ratio, 1 - clip_low and 1 + clip_high
  T dual_clip;    // infinity for none
  T ratio_clamp;  // bound of the log-ratio, infinity for none
};

template <class T>
struct RatioToken {
  T log_ratio, ratio;
  T clamped;  // 1 or 0: numbers, so that loops over tokens stay free of branches
};

template <class T>
RLHF_FAST_INLINE_HD T log_ratio_of(T logp, T old, const PolicyRules<T>& rules) {
  return clamp_of(logp - old, -rules.ratio_clamp, rules.ratio_clamp);
}

template <class T>
RLHF_FAST_INLINE_HD RatioToken<T> ratio_token(T logp, T old, const PolicyRules<T>& rules) {
  const T difference = logp - old, log_ratio = log_ratio_of(logp, old, rules);
  return {log_ratio, exp_of(log_ratio), difference > log_ratio || difference < log_ratio ? T(1) : T(0)};
}

// The ratio that all tokens of a row see.
struct RowRatio {
  double ratio;
  double moves;  // its logarithm, per unit of one token's log-ratio; 0 beyond a bound
  double slope;  // d loss / d log-probability of each token of the row, where the ratio carries the gradient
};

// From the sum of the row's log-ratios: their mean's, bounded from above (GSPO, arXiv 2507.18071), or that of the whole
// answer, bounded on both sides; the bounds are those of rlhf_fast/surrogates.py.
RLHF_FAST_INLINE_HD RowRatio row_ratio(int level, double sum, double length) {
  const bool product = level == kProduct;
  const double x = product ? sum : sum / length;
  const double bounded = clamp_of(x, product ? -20.0 : -static_cast<double>(INFINITY), product ? 20.0 : 10.0);
  return {exp_of(bounded), bounded != x ? 0 : (product ? 1 : 1 / length), 0};
}

template <class T>
struct PolicyToken {
  T loss, slope;      // slope: d loss / d logp
  T clipped, capped;  // 1 or 0
};

// max(-A rho, -A clip(rho)), at most -c A where A < 0 (arXiv 1707.06347 eq. 7, 1912.09729 eq. 5).
template <class T>
RLHF_FAST_INLINE_HD PolicyToken<T> policy_token(T ratio, T clamped, T advantage, const PolicyRules<T>& rules) {
  const T plain = -advantage * ratio, bounded = -advantage * clamp_of(ratio, rules.low, rules.high);
  const T larger = bounded > plain ? bounded : plain;
  const T cap = rules.dual_clip * (advantage < 0 ? -advantage : advantage);  // where A >= 0 the loss is below 0
  const T loss = larger > cap ? cap : larger;
  const T clipped = larger > plain ? T(1) : T(0), capped = loss < larger ? T(1) : T(0);
  return {loss, clipped + capped + clamped > 0 ? T(0) : plain, clipped, capped};
}

// -w A log p: the ratio in its bounds is a weight w without gradient (CISPO, arXiv 2506.13585).
template <class T>
RLHF_FAST_INLINE_HD PolicyToken<T> weighted_token(T logp, T ratio, T advantage, const PolicyRules<T>& rules) {
  const T weight = clamp_of(ratio, rules.low, rules.high), slope = -weight * advantage;
  return {slope * logp, slope, weight != ratio ? T(1) : T(0), T(0)};
}

// stopped: 1 where the ratio does not follow the log-prob.
template <int kSurrogate, class T>
RLHF_FAST_INLINE_HD PolicyToken<T> surrogate_token(T logp, T ratio, T stopped, T advantage,
                                                   const PolicyRules<T>& rules) {
  if constexpr (kSurrogate == kClip) return policy_token(ratio, stopped, advantage, rules);
  if constexpr (kSurrogate == kCispo) return weighted_token(logp, ratio, advantage, rules);
  return {-advantage * logp, -advantage, T(0), T(0)};
}

template <class T>
struct ValueToken {
  T loss, slope;  // slope: d loss / d value
  T clipped;      // 1 or 0
};

// max((V - R)^2, (clip(V, old +- c) - R)^2) / 2; `bound` infinite for no clipping.
template <class T>
RLHF_FAST_INLINE_HD ValueToken<T> value_token(T value, T old, T target, T bound) {
  const T error = value - target, other = clamp_of(value, old - bound, old + bound) - target;
  const T plain = error * error, bounded = other * other;
  return {(bounded > plain ? bounded : plain) / 2, bounded > plain ? T(0) : error, bounded > plain ? T(1) : T(0)};
}

}  // namespace
}  // namespace rlhf_fast
