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

// stats: (kStats,).
template <class Args, class T>
RLHF_FAST_INLINE_HD void write_ppo_loss(const Args& a, const PpoTotals& t, T* loss, T* stats) {
  const double tokens = t.count[kReal], n = tokens > 0 ? tokens : 1, shift = t.sum[kRatio] / n;
  const bool valid = tokens > 0 && !isnan(shift);
  double all = t.sum[kPolicy];
  if (a.values) all += a.value_coef * t.sum[kValue];
  if (a.entropy) all -= a.entropy_coef * t.sum[kBonus];
  if (a.ref_logprobs) all += a.kl_coef * t.sum[kPenalty];
  const double variance = t.sum[kRatioSquare] / n - shift * shift;
  *loss = static_cast<T>(all);
  stats[kPolicyLoss] = static_cast<T>(t.sum[kPolicy]);
  stats[kValueLoss] = static_cast<T>(t.sum[kValue]);
  stats[kEntropy] = static_cast<T>(t.sum[kEntropySum] / n);
  stats[kKl] = static_cast<T>(t.sum[kKlSum] / n);
  stats[kClipFraction] = static_cast<T>(t.count[kClipped] / n);
  stats[kDualClipFraction] = static_cast<T>(t.count[kCapped] / n);
  stats[kValueClipFraction] = static_cast<T>(t.count[kValueClipped] / n);
  stats[kApproxKl] = static_cast<T>(t.sum[kSquare] / n / 2);
  stats[kApproxKlK3] = static_cast<T>(t.sum[kK3Sum] / n);
  stats[kRatioMean] = static_cast<T>(tokens > 0 ? 1 + shift : 0);
  stats[kRatioVar] = static_cast<T>(variance < 0 ? 0 : variance);
  stats[kRatioMin] = static_cast<T>(valid ? t.low : shift);
  stats[kRatioMax] = static_cast<T>(valid ? t.high : shift);
  stats[kRatioClamped] = static_cast<T>(t.count[kClamped]);
  stats[kExplainedVariance] = static_cast<T>(t.returns <= 0 ? 0 : 1 - t.errors / t.returns);
  stats[kTokens] = static_cast<T>(tokens);
}

}  // namespace
}  // namespace rlhf_fast
