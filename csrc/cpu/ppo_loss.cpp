// The PPO loss, its gradients and its statistics in one pass over the tokens.
//
// Tokens go through in blocks that live on the stack: a block is loaded with masked tokens replaced by 0, every term
// fills arrays in a loop that vectorises, and the arrays are summed in double (chunks.h gives the order). Gradients are
// final: the denominators depend on the mask alone and are counted first.
#include <math.h>
#include <string.h>

#include "chunks.h"
#include "kl.h"
#include "ops.h"
#include "rows.h"

namespace rlhf_fast {
namespace {

enum Reduction { kTokenMean, kTokenSum, kSeqMeanTokenMean, kSeqMeanTokenSum };  // order of reference REDUCTIONS

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
  kClipped,
  kCapped,
  kValueClipped,
  kClamped,
  kSquare,
  kK3Sum,
  kRatio,
  kRatioSquare,
  kReturn,
  kReturnSquare,
  kError,
  kErrorSquare,
  kSums
};

template <class T>
struct Partial {
  double sum[kSums];
  T low, high;  // of the ratio
};

template <class T>
struct Problem {
  const PpoLossArgs& a;
  const T *logprobs, *old, *advantages, *entropy, *ref, *values, *old_values, *returns, *importance;
  T *grad_logprobs, *grad_entropy, *grad_values;
  PolicyRules<T> rules;
  T value_bound;
  double share;              // 1 / denominator
  double return_0, error_0;  // of the first real token: variances are sums of squares around it

  explicit Problem(const PpoLossArgs& a)
      : a(a),
        logprobs(static_cast<const T*>(a.logprobs)),
        old(static_cast<const T*>(a.old_logprobs)),
        advantages(static_cast<const T*>(a.advantages)),
        entropy(static_cast<const T*>(a.entropy)),
        ref(static_cast<const T*>(a.ref_logprobs)),
        values(static_cast<const T*>(a.values)),
        old_values(static_cast<const T*>(a.old_values)),
        returns(static_cast<const T*>(a.returns)),
        importance(static_cast<const T*>(a.importance_weights)),
        grad_logprobs(static_cast<T*>(a.grad_logprobs)),
        grad_entropy(static_cast<T*>(a.grad_entropy)),
        grad_values(static_cast<T*>(a.grad_values)),
        rules{static_cast<T>(1 - a.clip_low), static_cast<T>(1 + a.clip_high), static_cast<T>(a.dual_clip),
              static_cast<T>(a.ratio_clamp)},
        value_bound(old_values ? static_cast<T>(a.value_clip) : static_cast<T>(INFINITY)) {}
};

// Tokens [at, at + size).
template <class T>
struct Block {
  const Problem<T>& p;
  Partial<T>& out;
  int64_t at = 0;
  int size = 0;
  T real[kBlock];         // 1 or 0
  double weight[kBlock];  // in the loss, 0 where masked; in double, so that the mean of a constant is that constant
  T share[kBlock];        // the same in T
  T x[kBlock], y[kBlock], z[kBlock];  // inputs of the term at hand
  T loss[kBlock], slope[kBlock], grad[kBlock];
  T log_ratio[kBlock], ratio[kBlock], k3[kBlock], clipped[kBlock], capped[kBlock], clamped[kBlock];
  double centred[kBlock];

  Block(const Problem<T>& p, Partial<T>& out) : p(p), out(out) {}

  void load(T* to, const T* from) const { load_block(to, from, real, at, size); }
  void store(T* to) const { memcpy(to + at, grad, sizeof(T) * size); }
  void add(Sum which, double value) const { out.sum[which] += value; }

  void policy() {
    load(x, p.logprobs);
    load(y, p.old);
    load(z, p.advantages);
    const PolicyRules<T> rules = p.rules;
    for (int i = 0; i < kBlock; ++i) {
      const PolicyToken<T> t = policy_token(x[i], y[i], z[i], rules);
      loss[i] = t.loss;
      slope[i] = t.slope;
      log_ratio[i] = t.log_ratio;
      ratio[i] = t.ratio;
      clipped[i] = t.clipped;
      capped[i] = t.capped;
      clamped[i] = t.clamped;
    }
    for (int i = 0; i < kBlock; ++i) k3[i] = k3_of(log_ratio[i]);
    for (int i = 0; i < kBlock; ++i) centred[i] = static_cast<double>(ratio[i]) - 1;  // 0 where masked
    add(kClipped, total_of(clipped));
    add(kCapped, total_of(capped));
    add(kClamped, total_of(clamped));
    add(kK3Sum, total_of(k3));
    add(kSquare, dot_of(log_ratio, log_ratio));
    add(kRatio, total_of(centred));
    add(kRatioSquare, dot_of(centred, centred));
    extremes();
    if (p.importance) {
      load(x, p.importance);
      for (int i = 0; i < kBlock; ++i) loss[i] *= x[i];
      for (int i = 0; i < kBlock; ++i) slope[i] *= x[i];
    }
    add(kPolicy, dot_of(weight, loss));
    for (int i = 0; i < kBlock; ++i) grad[i] = share[i] * slope[i];
  }

  void extremes() {
    for (int i = 0; i < kBlock; ++i) x[i] = real[i] != 0 ? ratio[i] : static_cast<T>(INFINITY);
    for (int i = 0; i < kBlock; ++i) y[i] = real[i] != 0 ? ratio[i] : static_cast<T>(-INFINITY);
    for (int half = kBlock / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) x[i] = x[i + half] < x[i] ? x[i + half] : x[i];
      for (int i = 0; i < half; ++i) y[i] = y[i + half] > y[i] ? y[i + half] : y[i];
    }
    out.low = x[0] < out.low ? x[0] : out.low;
    out.high = y[0] > out.high ? y[0] : out.high;
  }

  void kl() {
    load(x, p.logprobs);
    load(y, p.ref);
    const T clamp_in = static_cast<T>(p.a.kl_clamp_in), clamp_out = static_cast<T>(p.a.kl_clamp_out);
    const T coef = static_cast<T>(p.a.kl_coef);
    with_kl_kind(p.a.kl_kind, p.a.kl_straight_through, [&](auto kind, auto through) {
      for (int i = 0; i < kBlock; ++i) {
        const ValueSlope<T> t = kl_token<kind, through>(x[i], y[i], clamp_in, clamp_out);
        loss[i] = t.value;
        slope[i] = t.slope;
      }
    });
    for (int i = 0; i < kBlock; ++i) grad[i] += share[i] * coef * slope[i];
    add(kKlSum, total_of(loss));
    add(kPenalty, dot_of(weight, loss));
  }

  void bonus() {
    load(x, p.entropy);
    add(kEntropySum, total_of(x));
    add(kBonus, dot_of(weight, x));
    if (!p.grad_entropy) return;
    const T coef = -static_cast<T>(p.a.entropy_coef);
    for (int i = 0; i < kBlock; ++i) grad[i] = share[i] * coef;
    store(p.grad_entropy);
  }

  void value() {
    load(x, p.values);
    load(y, p.returns);
    load(z, p.old_values ? p.old_values : p.values);
    const T bound = p.value_bound, coef = static_cast<T>(p.a.value_coef);
    for (int i = 0; i < kBlock; ++i) {
      const ValueToken<T> t = value_token(x[i], z[i], y[i], bound);
      loss[i] = t.loss;
      slope[i] = t.slope;
      clipped[i] = t.clipped;
    }
    add(kValue, dot_of(weight, loss));
    add(kValueClipped, total_of(clipped));
    const double return_0 = p.return_0, error_0 = p.error_0;
    for (int i = 0; i < kBlock; ++i) centred[i] = (static_cast<double>(y[i]) - return_0) * real[i];
    add(kReturn, total_of(centred));
    add(kReturnSquare, dot_of(centred, centred));
    for (int i = 0; i < kBlock; ++i)
      centred[i] = ((static_cast<double>(y[i]) - static_cast<double>(x[i])) - error_0) * real[i];
    add(kError, total_of(centred));
    add(kErrorSquare, dot_of(centred, centred));
    if (!p.grad_values) return;
    for (int i = 0; i < kBlock; ++i) grad[i] = share[i] * coef * slope[i];
    store(p.grad_values);
  }

  void run() {
    for (int i = 0; i < kBlock; ++i) share[i] = static_cast<T>(weight[i]);
    policy();
    if (p.ref) kl();
    if (p.grad_logprobs) store(p.grad_logprobs);
    if (p.entropy) bonus();
    if (p.values) value();
  }
};

// The row that holds token t.
inline int64_t row_at(const PpoLossArgs& a, int64_t t) {
  if (!a.cu_seqlens) return t / a.length;
  int64_t low = 0, high = a.rows - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    a.cu_seqlens[middle] <= t ? low = middle : high = middle - 1;
  }
  return low;
}

// Counts what the denominators need: real tokens of every row, and of all; returns the default denominator.
inline double count(const PpoLossArgs& a, int64_t* tokens) {
  *tokens = count_real(a.mask, a.n);
  if (a.reduction == kTokenMean) return static_cast<double>(*tokens);
  if (a.reduction == kTokenSum) return 1;
  int64_t sequences = 0;
  for (int64_t i = 0; i < a.rows; ++i) {
    const Row row = row_of(a, i);
    const int64_t length = count_real(a.mask + row.begin, row.end - row.begin);
    if (a.lengths) a.lengths[i] = length;
    sequences += length > 0;
  }
  return static_cast<double>(sequences);
}

// Weights of tokens [at, at + size), which belong to `row` and the rows after it; returns the row of the next token.
template <class T>
int64_t weigh(Block<T>& block, int64_t row) {
  const Problem<T>& p = block.p;
  load_mask(block.real, p.a.mask, block.at, block.size);
  if (p.a.reduction != kSeqMeanTokenMean) {
    const double share = p.share;
    for (int i = 0; i < kBlock; ++i) block.weight[i] = share * block.real[i];
    return row;
  }
  int i = 0;
  while (true) {
    const int64_t left = row_of(p.a, row).end - block.at;
    const int stop = left < block.size ? static_cast<int>(left) : block.size;
    const double weight = p.share / static_cast<double>(p.a.lengths[row] > 0 ? p.a.lengths[row] : 1);
    for (; i < stop; ++i) block.weight[i] = weight * block.real[i];
    if (i == block.size) break;
    ++row;
  }
  for (; i < kBlock; ++i) block.weight[i] = 0;
  return row;
}

template <class T>
void chunk(const Problem<T>& p, Partial<T>& out, int64_t begin, int64_t end) {
  memset(out.sum, 0, sizeof(out.sum));
  out.low = static_cast<T>(INFINITY);
  out.high = static_cast<T>(-INFINITY);
  Block<T> block(p, out);
  int64_t row = p.a.reduction == kSeqMeanTokenMean ? row_at(p.a, begin) : 0;
  for (block.at = begin; block.at < end; block.at += kBlock) {
    block.size = static_cast<int>(end - block.at < kBlock ? end - block.at : kBlock);
    row = weigh(block, row);
    block.run();
  }
}

template <class T>
void write_stats(const Problem<T>& p, const Partial<T>& t, int64_t tokens) {
  const PpoLossArgs& a = p.a;
  const double* sum = t.sum;
  const double n = tokens > 0 ? static_cast<double>(tokens) : 1;
  double loss = sum[kPolicy], stat[kStats] = {0};
  if (p.values) loss += a.value_coef * sum[kValue];
  if (p.entropy) loss -= a.entropy_coef * sum[kBonus];
  if (p.ref) loss += a.kl_coef * sum[kPenalty];
  const double shift = sum[kRatio] / n;
  const bool valid = tokens > 0 && !isnan(shift);
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
  stat[kRatioMin] = valid ? static_cast<double>(t.low) : shift;
  stat[kRatioMax] = valid ? static_cast<double>(t.high) : shift;
  stat[kRatioClamped] = sum[kClamped];
  const double returns = sum[kReturnSquare] - sum[kReturn] * sum[kReturn] / n;
  const double errors = sum[kErrorSquare] - sum[kError] * sum[kError] / n;
  stat[kExplainedVariance] = sum[kReturnSquare] == 0 || returns <= 0 ? 0 : 1 - errors / returns;
  stat[kTokens] = static_cast<double>(tokens);
  *static_cast<T*>(a.loss) = static_cast<T>(loss);
  for (int k = 0; k < kStats; ++k) static_cast<T*>(a.stats)[k] = static_cast<T>(stat[k]);
}

template <class T>
void run(const PpoLossArgs& a) {
  Problem<T> p(a);
  int64_t tokens;
  double denominator = count(a, &tokens);
  if (a.normalizer)
    denominator = static_cast<double>(*static_cast<const T*>(a.normalizer));
  else if (a.divisor > 0)
    denominator = a.divisor;
  p.share = denominator > 0 ? 1 / denominator : 0;
  const void* first = tokens > 0 ? memchr(a.mask, 1, a.n) : nullptr;
  const int64_t at = first ? static_cast<const uint8_t*>(first) - a.mask : 0;
  p.return_0 = p.values && first ? static_cast<double>(p.returns[at]) : 0;
  p.error_0 = p.values && first ? p.return_0 - static_cast<double>(p.values[at]) : 0;

  const Chunks chunks(a.n);
  Partial<T> partial[kMaxChunks];
  chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) { chunk(p, partial[c], begin, end); });
  Partial<T> total;
  memset(total.sum, 0, sizeof(total.sum));
  total.low = static_cast<T>(INFINITY);
  total.high = static_cast<T>(-INFINITY);
  for (int64_t c = 0; c < chunks.count; ++c) {
    for (int k = 0; k < kSums; ++k) total.sum[k] += partial[c].sum[k];
    total.low = partial[c].low < total.low ? partial[c].low : total.low;
    total.high = partial[c].high > total.high ? partial[c].high : total.high;
  }
  write_stats(p, total, tokens);
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t ppo_loss(const PpoLossArgs& a) {
  a.f64 ? run<double>(a) : run<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
