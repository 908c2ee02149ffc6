// One token per row of logits, with its log-probability and the entropy of its distribution, in one read of the logits.
//
// The token is the first whose cumulative probability exceeds a given number in [0, 1) (inversion): one draw a row, and
// the choice depends on the row and its number alone. The sums of token_logprobs are kept at kMarks places of the row,
// so the search reads a single part of it again. A class without probability is never taken.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("schedule-insns", "sched-pressure")
#endif
#include "formats.h"
#include "ops.h"
#include "softmax_blocks.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kMarks = 256;

// The sum of the row up to here, relative to `base`.
struct Mark {
  double sum, base;
};

// The first row whose number or temperature is out of range, or -1.
template <class S>
int64_t first_refused(const SampleTokensArgs& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    if (a.mask && !a.mask[i]) continue;
    const double temperature = temperature_of<S>(a, i);
    if (!(temperature >= 0) || !isfinite(temperature)) return i;
    if (temperature > 0 && !(a.uniform[i] >= 0 && a.uniform[i] < 1)) return i;
  }
  return -1;
}

// The capped logits [j, j + n) of a row, n <= kBlock, with -inf where a class is banned.
template <class V, class T, bool kCap>
void copy_block(const SampleTokensArgs& a, const Logits<V, T, kCap>& z, int64_t j, int64_t n, typename V::Scalar* to) {
  for (int64_t k = 0; k < n; k += V::width) {
    const int lanes = static_cast<int>(n - k < V::width ? n - k : V::width);
    store(to + k, z.cap(load(z.row + j + k, lanes)), lanes);
  }
  for (int64_t k = 0; k < a.bans; ++k)
    if (a.banned[k] >= j && a.banned[k] < j + n) to[a.banned[k] - j] = -INFINITY;
}

template <class V, class T, bool kCap>
void sample_row(const SampleTokensArgs& a, int64_t i, const SoftCap<V>& soft) {
  using S = typename V::Scalar;
  S *logprobs = static_cast<S*>(a.logprobs) + i, *entropy = static_cast<S*>(a.entropy) + i;
  if (a.mask && !a.mask[i]) {
    a.token_ids[i] = 0;
    *logprobs = *entropy = 0;
    return;
  }
  const bool greedy = temperature_of<S>(a, i) == 0;
  const double scale = greedy ? 1 : scale_of<S>(a, i);
  const Logits<V, T, kCap> z{row_of<T>(a, a.logits, a.outer_stride, a.inner_stride, i), soft};
  const ScaledExp<V> exp_of(scale);
  alignas(64) S copy[kBlock<T>];
  const Logits<V, S, false> copied{copy, soft};
  const int64_t blocks = (a.vocab + kBlock<T> - 1) / kBlock<T>, per_mark = (blocks + kMarks - 1) / kMarks;
  Mark marks[kMarks];
  int64_t count = 0, block = 0, best_at = 0;
  double best = -INFINITY;
  RowSums row;
  for (int64_t j = 0; j < a.vocab; j += kBlock<T>) {
    const int64_t n = a.vocab - j < kBlock<T> ? a.vocab - j : kBlock<T>;
    bool bans = false;
    for (int64_t k = 0; k < a.bans; ++k) bans |= a.banned[k] >= j && a.banned[k] < j + n;
    if (bans) copy_block(a, z, j, n, copy);
    if (greedy) {
      const double m = bans ? copied.largest_of(0, n) : z.largest_of(j, n);
      if (m > best) {
        best = m;
        best_at = j;
      }
    }
    if (bans || row.careful || !add_block<V, T, kCap, false, false>(z, z, exp_of, j, n, scale, &row)) {
      const double before = row.policy.max;
      if (bans)
        add_block<V, S, false, false, true>(copied, copied, exp_of, 0, n, scale, &row);
      else
        add_block<V, T, kCap, false, true>(z, z, exp_of, j, n, scale, &row);
      if (row.policy.max > before) row.careful = false;  // as in token_logprobs
    }
    if (++block % per_mark == 0 || block == blocks) marks[count++] = {row.policy.sum, row.policy.base()};
  }
  if (isnan(row.policy.log_sum())) {
    a.token_ids[i] = -1;
    *logprobs = *entropy = static_cast<S>(NAN);
    return;
  }

  const double base = row.policy.base(), target = greedy ? 0 : a.uniform[i] * row.policy.sum;
  int64_t begin = best_at, end = best_at + kBlock<T>;
  double reached = 0;  // by the classes before `begin`
  if (!greedy) {
    double sum = 0;
    for (int64_t k = 0; k < count; ++k) {
      const double next = marks[k].sum * ::exp((marks[k].base - base) * scale);
      if (!(next > sum)) continue;  // no class here has a probability
      begin = k * per_mark * kBlock<T>;
      end = begin + per_mark * kBlock<T>;
      reached = sum;
      sum = next;
      if (sum > target) break;
    }
  }
  int64_t chosen = -1;
  bool found = false;
  for (int64_t j = begin; j < end && j < a.vocab && !found; j += kBlock<T>) {
    const int64_t n = a.vocab - j < kBlock<T> ? a.vocab - j : kBlock<T>;
    copy_block(a, z, j, n, copy);
    for (int64_t k = 0; !greedy && k < n; k += V::width) {
      const int lanes = static_cast<int>(n - k < V::width ? n - k : V::width);
      typename V::Mask alive;
      store(copy + k, exp_of(load(copy + k, lanes) - V::splat(static_cast<S>(base)), &alive), lanes);
    }
    for (int64_t k = 0; k < n && !found; ++k) {
      if (greedy) {
        found = copy[k] == best;
      } else if (copy[k] > 0) {
        reached += copy[k];
        found = reached > target;
      } else {
        continue;
      }
      chosen = j + k;  // where rounding keeps the sum below the target, the last class with a probability
    }
  }
  a.token_ids[i] = chosen;
  *logprobs = static_cast<S>(row.policy.log_p(z.one(chosen), scale));
  *entropy = static_cast<S>(row.policy.entropy());
}

template <class V, class T, bool kCap>
int64_t sample_rows(const SampleTokensArgs& a) {
  const SoftCap<V> soft(kCap ? a.softcap : 1);
  for_rows(a.rows, a.vocab, a.threads, [&](int64_t i) { sample_row<V, T, kCap>(a, i, soft); });
  return -1;
}

template <class T>
int64_t run(Format<T>, const SampleTokensArgs& a) {
  using V = VectorOf<T>;
  if (const int64_t row = first_refused<typename V::Scalar>(a); row >= 0) return row;
  return a.softcap > 0 ? sample_rows<V, T, true>(a) : sample_rows<V, T, false>(a);
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t sample_tokens(const SampleTokensArgs& a) {
  return with_any_format(a.dtype, [&](auto format) { return run(format, a); });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
