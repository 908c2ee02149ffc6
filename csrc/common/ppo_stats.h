// What the kernels of ppo_loss share beside the maths of a token: the reductions, the sums that a pass over the tokens
// leaves, and the loss and the statistics that follow from them.
#pragma once

#include "common/portable.h"

namespace rlhf_fast {
namespace {

enum Reduction { kTokenMean, kTokenSum, kSeqMeanTokenMean, kSeqMeanTokenSum };  // order of reference REDUCTIONS

RLHF_FAST_INLINE_HD bool is_by_rows(int reduction) {
  return reduction == kSeqMeanTokenMean || reduction == kSeqMeanTokenSum;
}

// Order of STATS in rlhf_fast/reference/ppo_loss.py.
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
  kSquare,  // of the log-ratio
  kK3Sum,
  kRatio,  // less 1
  kRatioSquare,
  kSums,
  kReturn = kSums,  // around the return, and the error, of one of the tokens
  kReturnSquare,
  kError,
  kErrorSquare,
  kAllSums
};

enum Count { kReal, kClipped, kCapped, kClamped, kValueClipped, kCounts };

// Of all real tokens.
struct PpoTotals {
  double sum[kSums], count[kCounts];
  double low, high;        // of the ratio
  double returns, errors;  // sums of squared deviations from the mean, of returns and of returns - values
};

// The loss, and the statistics in `stat`.
template <class Args>
RLHF_FAST_INLINE_HD double ppo_loss_of(const Args& a, const PpoTotals& t, double (&stat)[kStats]) {
  const double tokens = t.count[kReal], n = tokens > 0 ? tokens : 1, shift = t.sum[kRatio] / n;
  const bool valid = tokens > 0 && !isnan(shift);
  double loss = t.sum[kPolicy];
  if (a.values) loss += a.value_coef * t.sum[kValue];
  if (a.entropy) loss -= a.entropy_coef * t.sum[kBonus];
  if (a.ref_logprobs) loss += a.kl_coef * t.sum[kPenalty];
  stat[kPolicyLoss] = t.sum[kPolicy];
  stat[kValueLoss] = t.sum[kValue];
  stat[kEntropy] = t.sum[kEntropySum] / n;
  stat[kKl] = t.sum[kKlSum] / n;
  stat[kClipFraction] = t.count[kClipped] / n;
  stat[kDualClipFraction] = t.count[kCapped] / n;
  stat[kValueClipFraction] = t.count[kValueClipped] / n;
  stat[kApproxKl] = t.sum[kSquare] / n / 2;
  stat[kApproxKlK3] = t.sum[kK3Sum] / n;
  stat[kRatioMean] = tokens > 0 ? 1 + shift : 0;
  const double variance = t.sum[kRatioSquare] / n - shift * shift;
  stat[kRatioVar] = variance < 0 ? 0 : variance;
  stat[kRatioMin] = valid ? t.low : shift;
  stat[kRatioMax] = valid ? t.high : shift;
  stat[kRatioClamped] = t.count[kClamped];
  stat[kExplainedVariance] = t.returns <= 0 ? 0 : 1 - t.errors / t.returns;
  stat[kTokens] = tokens;
  return loss;
}

}  // namespace
}  // namespace rlhf_fast
