// Losses on the gap between two answers, from the log-probs of their tokens: sums over the rows, the loss, and
// gradients. The second pass writes what the first found, the same number at every real token of a row.
#include <math.h>
#include <string.h>

#include "chunks.h"
#include "ops.h"
#include "output.h"
#include "rows.h"

namespace rlhf_fast {
namespace {

enum Curve { kLogistic, kHinge, kSquare };  // order of reference CURVES

// The chosen or the rejected answers.
template <class T>
struct Side {
  const T *logprobs, *ref;
  const uint8_t* mask;
  const int64_t* cu_seqlens;
  int64_t length;
  T* grad;
  DpoLossRow* rows;
};

struct Term {
  double loss, slope;
};

// win log(1 + e^-x) + lose log(1 + e^x), max(0, 1 - x), or x^2.
inline Term term_of(const DpoLossArgs& a, double x) {
  if (a.curve == kHinge) return 1 - x > 0 ? Term{1 - x, -1} : Term{isnan(x) ? x : 0, isnan(x) ? x : 0};
  if (a.curve == kSquare) return {x * x, 2 * x};
  const double tail = exp_of(x < 0 ? x : -x);  // e^-|x|
  const double near = log1p_of(tail), up = x > 0 ? x : 0, down = x < 0 ? -x : 0;
  const double win = (x < 0 ? 1 : tail) / (1 + tail), lose = (x < 0 ? tail : 1) / (1 + tail);  // s(-x), s(x)
  if (a.lose == 0) return {a.win * (near + down), -a.win * win};  // 0 times infinity would be NaN
  return {a.win * (near + down) + a.lose * (near + up), a.lose * lose - a.win * win};
}

template <class T>
inline Eight difference(const T* x, const T* y) {
  return y ? Eight::load(x) - Eight::load(y) : Eight::load(x);
}

// The sum over the real tokens of a row, in eight lanes that begin with it.
template <class T>
double sum_of(const Side<T>& side, Row row) {
  Eight sum = Eight::splat(0);
  int64_t i = row.begin;
  for (; i + kEight <= row.end; i += kEight) {
    const Eight d = difference(side.logprobs + i, side.ref ? side.ref + i : nullptr);
    sum = sum + (side.mask ? where(side.mask + i, d) : d);
  }
  if (i < row.end) {
    T x[kEight] = {}, y[kEight] = {};
    uint8_t on[kEight] = {};
    const size_t left = static_cast<size_t>(row.end - i);
    memcpy(x, side.logprobs + i, left * sizeof(T));
    if (side.ref) memcpy(y, side.ref + i, left * sizeof(T));
    side.mask ? static_cast<void>(memcpy(on, side.mask + i, left)) : static_cast<void>(memset(on, 1, left));
    sum = sum + where(on, difference(x, y));
  }
  return total(sum);
}

// value at the real tokens of the row, 0 at the others; past the caches if `past`.
template <class T>
void fill(const Side<T>& side, Row row, T value, bool past) {
  each_block(row.begin, row.end, [&](int64_t at, int size) {
    alignas(kLine) Int<T> on[kBlock];
    alignas(kLine) T block[kBlock];
    load_mask(on, side.mask, at, size);
    for (int i = 0; i < kBlock; ++i) block[i] = kept(value, on[i]);
    past ? stream_copy(side.grad + at, block, size)
         : static_cast<void>(memcpy(side.grad + at, block, sizeof(T) * static_cast<size_t>(size)));
  });
}

template <class T>
struct Problem {
  const DpoLossArgs& a;
  Side<T> sides[2];
  const T* weights;
  double share;  // 1 / denominator

  explicit Problem(const DpoLossArgs& a)
      : a(a),
        sides{side(a.chosen, a.ref_chosen, a.chosen_mask, a.chosen_cu_seqlens, a.chosen_length, a.grad_chosen, a.rows),
              side(a.rejected, a.ref_rejected, a.rejected_mask, a.rejected_cu_seqlens, a.rejected_length,
                   a.grad_rejected, a.rows + a.pairs)},
        weights(static_cast<const T*>(a.weights)) {
    double denominator = static_cast<double>(count_real(a.mask, a.pairs));
    if (a.normalizer)
      denominator = static_cast<double>(*static_cast<const T*>(a.normalizer));
    else if (a.divisor > 0)
      denominator = a.divisor;
    share = denominator > 0 ? 1 / denominator : 0;
  }
  static Side<T> side(const void* logprobs, const void* ref, const uint8_t* mask, const int64_t* cu_seqlens,
                      int64_t length, void* grad, DpoLossRow* rows) {
    return {static_cast<const T*>(logprobs),
            static_cast<const T*>(ref),
            mask,
            cu_seqlens,
            length,
            static_cast<T*>(grad),
            rows};
  }

  bool real(int64_t pair) const { return !a.mask || a.mask[pair]; }
  double weight(int64_t pair) const { return weights ? share * static_cast<double>(weights[pair]) : share; }
  Term term(int64_t pair) const {
    return term_of(a, a.scale * (sides[0].rows[pair].compared - sides[1].rows[pair].compared) - a.offset);
  }

  void read(int which, int64_t pair) const {
    const Side<T>& side = sides[which];
    DpoLossRow& found = side.rows[pair];
    found = {0, 1};
    if (!real(pair)) return;
    const Row row = row_of(side, pair);
    if (a.average) {
      const int64_t length = side.mask ? count_real(side.mask + row.begin, row.end - row.begin) : row.end - row.begin;
      if (length > 0) found.part = 1 / static_cast<double>(length);
    }
    found.compared = sum_of(side, row) * found.part;
  }

  void write(int which, int64_t pair, bool past) const {
    const Side<T>& side = sides[which];
    if (!side.grad) return;
    double slope = 0;
    if (real(pair)) slope = weight(pair) * a.scale * term(pair).slope * side.rows[pair].part * (which ? -1 : 1);
    fill(side, row_of(side, pair), static_cast<T>(slope), past);
  }
};

template <class T>
void run(const DpoLossArgs& a) {
  const Problem<T> p(a);
  const int64_t rows = 2 * a.pairs, tokens = rows ? a.n / rows : 0;
  const int64_t grain = tokens >= kGrainTokens ? 1 : kGrainTokens / (tokens + 1) + 1;
  const bool past = a.n * static_cast<int64_t>(sizeof(T)) * 3 > kStreamBytes;
  for_phases(rows, grain, a.threads, 2, [&](int phase, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      phase ? p.write(i >= a.pairs, i % a.pairs, past) : p.read(i >= a.pairs, i % a.pairs);
    if (phase && past) fence();
  });
  double loss = 0;
  for (int64_t i = 0; i < a.pairs; ++i) {
    if (p.real(i)) loss += p.weight(i) * p.term(i).loss;
    for (int which = 0; which < 2; ++which)
      static_cast<T*>(a.rewards)[which * a.pairs + i] = static_cast<T>(a.beta * p.sides[which].rows[i].compared);
  }
  *static_cast<T*>(a.loss) = static_cast<T>(loss);
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t dpo_loss(const DpoLossArgs& a) {
  a.f64 ? run<double>(a) : run<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
