// Log-probability of a token, entropy, log-sum-exp and exact KL of its distribution, in one read of the logits; and the
// gradient of all four in one read and one write.
//
// The vocabulary is walked in blocks that stay in the first-level cache, with one exp per logit whose sums live in fp32
// lanes. Exponentials are taken relative to a logit near the largest so far, which costs a look at few of them; a block
// that exceeds it by far is taken again, relative to its own largest. Blocks are joined in double, and depend on V
// alone, so a row has the same bits in any batch, at any address and on any thread.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("schedule-insns", "sched-pressure")  // exponentials side by side: a tenth faster
#endif
#include "common/softmax.h"
#include "memory.h"
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace rlhf_fast {
namespace {

template <class T>
constexpr int64_t kBlock = 8192 / sizeof(T);  // elements
constexpr int64_t kProbe = 128;               // logits whose largest is the first point of reference
constexpr double kLargestSum = 1e6;           // e^14: what a block may add up to before its point of reference moves
constexpr int64_t kGrainElements = 32768;     // below this a second thread costs more than it saves
constexpr int64_t kRowsPerDraw = 16;
constexpr int64_t kLargeBytes = 32 << 20;  // a gradient that does not stay in cache

// cap * tanh(y / cap).
template <class V>
struct SoftCap {
  V cap, inverse;

  explicit SoftCap(double c)
      : cap(V::splat(static_cast<typename V::Scalar>(c))), inverse(V::splat(static_cast<typename V::Scalar>(1 / c))) {}
  V tanh_of(const V& x) const { return tanh(x * inverse); }
  V slope(const V& t) const { return V::splat(1) - t * t; }
};

// The logits of one row in fp32 (fp64 for fp64), soft-capped.
template <class V, class T, bool kCap>
struct Logits {
  const T* row;
  const SoftCap<V>& soft;

  V cap(const V& x) const {
    if constexpr (kCap) return soft.cap * soft.tanh_of(x);
    return x;
  }
  Pair<V> at(int64_t i) const {
    if constexpr (!kCap) return load_pair(row + i);
    const Pair<V> x = load_pair(row + i);
    return {cap(x.a), cap(x.b)};
  }
  V at(int64_t i, int n) const {
    return pad(cap(load(row + i, n)), n);
  }  // padded after the cap: it would make -inf finite
  double largest_of(int64_t i, int64_t n) const {
    typename V::Scalar m = largest<V>(row + i, n);
    if constexpr (kCap) m = first(cap(V::splat(m)));  // the cap is monotonous
    return m;
  }
  double one(int64_t i) const { return first(cap(load(row + i, 1))); }
  double slope(int64_t i) const {
    if constexpr (kCap) return first(soft.slope(soft.tanh_of(load(row + i, 1))));
    return 1;
  }
};

// Calls pair(i, k) for each two whole vectors of [0, n), with k and k + 1 < U naming accumulators, and part(i, lanes)
// for the rest.
template <class V, int U, class Full, class Part>
inline RLHF_FAST_INLINE void sweep(int64_t n, Full pair, Part part) {
  constexpr int64_t W = V::width, step = 2 * W, turn = U * W;
  const int64_t unrolled = n / turn * turn;
  int64_t i = 0;
  if constexpr (U == 2) {
    for (; i + step <= n; i += step) pair(i, 0);
  } else if constexpr (kRegisters) {
    for (; i < unrolled; i += turn)
      for (int k = 0; k < U; k += 2) pair(i + k * W, k);
    for (; i + step <= n; i += step) pair(i, 0);
  } else {  // one copy of a large body
    for (; i + step <= n; i += step) pair(i, i < unrolled ? static_cast<int>(i / W % U) : 0);
  }
  for (; i < n; i += W) part(i, static_cast<int>(n - i < W ? n - i : W));
}

// U running sums of vectors, joined in double.
template <class V, int U>
struct Lanes {
  V v[U];
  Lanes() {
    for (V& x : v) x = V::splat(0);
  }
  double total() const { return sum_of(v); }
};

// The same with the rounding of each addition kept (Dekker's fast two-sum), for terms in [0, 1]: KL is a small
// difference of the logarithms of two such sums. The sums start at 1, so that the term is never the larger operand.
template <class V, int U>
struct ExactLanes {
  V v[U], lost[U];
  ExactLanes() {
    for (V& x : v) x = V::splat(1);
    for (V& x : lost) x = V::splat(0);
  }
  RLHF_FAST_INLINE void add(int k, const V& e) {
    const V sum = v[k] + e;
    lost[k] = lost[k] + (e - (sum - v[k]));
    v[k] = sum;
  }
  double total() const {
    V terms[2 * U];
    for (int k = 0; k < U; ++k) {
      terms[k] = v[k] - V::splat(1);
      terms[U + k] = lost[k];
    }
    return sum_of(terms);
  }
};

template <class V, int U>
struct PlainLanes : Lanes<V, U> {
  RLHF_FAST_INLINE void add(int k, const V& e) { this->v[k] = this->v[k] + e; }
};

template <bool kFirst, class A, class B>
struct Choose {
  using Type = A;
};
template <class A, class B>
struct Choose<false, A, B> {
  using Type = B;
};

// Fetches what the next block reads in place of the two vectors at i: the block at hand is in cache, and the arithmetic
// on it would leave the memory idle. Into the first level alone: logits are read once, and gradients need the second.
template <class V, class T>
inline RLHF_FAST_INLINE void prefetch_next_block(const T* row, int64_t i) {
  constexpr int64_t line = 64 / sizeof(T), step = 2 * V::width;
  const uintptr_t next = reinterpret_cast<uintptr_t>(row + i) + kBlock<T> * sizeof(T);
  if constexpr (step >= line) {
    for (int64_t k = 0; k < step; k += line) prefetch_once(reinterpret_cast<const void*>(next + k * sizeof(T)));
  } else if ((i & (line - 1)) == 0) {
    prefetch_once(reinterpret_cast<const void*>(next));
  }
}

struct RowSums {
  SoftmaxSums<double> policy, reference;
  GapSum<double> gap;
  bool careful = false;  // a logit was -inf, +inf or NaN, or far below any number that means something
};

// kSafe measures from the largest logit of the block and lets logits be -inf. Without it the point of reference stays
// where it is, which saves a pass; returns false, having added nothing, where that does not do: the terms are too
// large, or not numbers.
template <class V, class T, bool kCap, bool kRef, bool kSafe>
bool add_block(const Logits<V, T, kCap>& z, const Logits<V, T, kCap>& zr, const ScaledExp<V>& exp_of, int64_t j,
               int64_t n, double scale, RowSums* row) {
  static_assert(kSafe || !kRef);
  using S = typename V::Scalar;
  constexpr int U = kRef ? 2 : 4;
  if constexpr (kRef) {
    const double shift = row->policy.raise(z.largest_of(j, n), scale);
    row->gap.shift(shift, row->reference.raise(zr.largest_of(j, n), scale), row->policy.sum);
  } else if (kSafe) {
    row->policy.raise(z.largest_of(j, n), scale);
  } else {
    if (j == 0) row->policy.raise(z.largest_of(0, n < kProbe ? n : kProbe), scale);
    if (row->policy.max == -INFINITY) return false;  // nothing to measure from yet
  }
  const V base = V::splat(static_cast<S>(row->policy.base())),
          ref_base = V::splat(static_cast<S>(row->reference.base()));
  typename Choose<kRef, ExactLanes<V, U>, PlainLanes<V, U>>::Type e_sum, ref_sum;
  Lanes<V, U> weighted, gap;
  const auto add = [&](const V& y, const V& yr, int k, bool padded = false) RLHF_FAST_INLINE {
    typename V::Mask alive, ref_alive;
    const V u = y - base;
    if (kSafe || padded) {
      const V e = exp_of(u, &alive);
      e_sum.add(k, e);
      weighted.v[k] = fma_where(alive, e, u, weighted.v[k]);  // 0 * -inf must give 0
      if constexpr (kRef) {
        const V v = yr - ref_base;
        ref_sum.add(k, exp_of(v, &ref_alive));
        gap.v[k] = fma_where(alive, e, u - v, gap.v[k]);
      }
    } else {
      const V e = exp_of.of_finite(u);
      e_sum.add(k, e);
      weighted.v[k] = fma(e, u, weighted.v[k]);
    }
  };
  sweep<V, U>(
      n,
      [&](int64_t i, int k) RLHF_FAST_INLINE {
        prefetch_next_block<V>(z.row, j + i);
        const Pair<V> y = z.at(j + i);
        if constexpr (kRef) {
          prefetch_next_block<V>(zr.row, j + i);
          const Pair<V> yr = zr.at(j + i);
          add(y.a, yr.a, k);
          add(y.b, yr.b, k + 1);
        } else {
          add(y.a, base, k);
          add(y.b, base, k + 1);
        }
      },
      [&](int64_t i, int lanes) RLHF_FAST_INLINE {
        if constexpr (kRef) {
          add(z.at(j + i, lanes), zr.at(j + i, lanes), 0, true);
        } else {
          add(z.at(j + i, lanes), base, 0, true);
        }
      });
  const double sum = e_sum.total(), sum_of_products = weighted.total();
  if constexpr (!kSafe) {
    row->careful = isnan(sum_of_products);
    if (row->careful || !(sum < kLargestSum)) return false;
  }
  row->policy.sum += sum;
  row->policy.weighted += scale * sum_of_products;
  if constexpr (kRef) {
    row->reference.sum += ref_sum.total();
    row->gap.gap += scale * gap.total();
  }
  return true;
}

template <class S, class Args>
inline double temperature_of(const Args& a, int64_t i) {
  return a.temperature ? static_cast<double>(static_cast<const S*>(a.temperature)[i]) : a.temperature_value;
}

// 1 / temperature, kept finite so that 0 * scale stays 0.
template <class S, class Args>
inline double scale_of(const Args& a, int64_t i) {
  const double largest = sizeof(S) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
  const double scale = 1 / temperature_of<S>(a, i);
  return scale < largest ? scale : largest;
}

template <class Args>
inline int64_t id_of(const Args& a, int64_t i) {
  return a.ids32 ? static_cast<const int32_t*>(a.token_ids)[i] : static_cast<const int64_t*>(a.token_ids)[i];
}

template <class T, class Args>
inline const T* row_of(const Args& a, const void* base, int64_t outer_stride, int64_t inner_stride, int64_t i) {
  return static_cast<const T*>(base) + (i / a.inner) * outer_stride + (i % a.inner) * inner_stride;
}

// The first unmasked row whose token id or temperature is out of range, or -1.
template <class S, class Args>
int64_t first_refused(const Args& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    if (a.mask && !a.mask[i]) continue;
    const int64_t id = id_of(a, i);
    const double temperature = temperature_of<S>(a, i);
    if (id < 0 || id >= a.vocab || !(temperature > 0) || !isfinite(temperature)) return i;
  }
  return -1;
}

// Runs body(row) for all rows. Threads draw rows from a counter, so that masked rows and busy processors do not leave
// one thread waiting for another: many rows in a draw, as what a row fetches past its end is then the thread's own next
// row, and few towards the end.
template <class Body>
void for_rows(int64_t rows, int64_t vocab, int threads, Body body) {
  const int64_t few = kGrainElements / vocab + 1, many = kRowsPerDraw * few;
  const int64_t large = rows > threads * many ? (rows - threads * many) / many : 0;  // draws of many rows
  int64_t next = 0;
  for_ranges(rows, few, threads, [&](int64_t, int64_t) {
    const unsigned before = flush_denormals();
    for (;;) {
      const int64_t draw = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      const int64_t begin = draw < large ? draw * many : large * many + (draw - large) * few;
      if (begin >= rows) break;
      const int64_t size = draw < large ? many : few, end = begin + size < rows ? begin + size : rows;
      for (int64_t i = begin; i < end; ++i) body(i);
    }
    restore_denormals(before);
    fence();
  });
}

template <class V, class T, bool kCap, bool kRef>
void forward_row(const TokenLogprobsArgs& a, int64_t i, const SoftCap<V>& soft) {
  using S = typename V::Scalar;
  S *logprobs = static_cast<S*>(a.logprobs) + i, *entropy = static_cast<S*>(a.entropy) + i;
  S *logsumexp = static_cast<S*>(a.logsumexp) + i, *kl = kRef ? static_cast<S*>(a.kl) + i : nullptr;
  S* state = a.state ? static_cast<S*>(a.state) + i * (kRef ? 6 : 3) : nullptr;
  if (a.mask && !a.mask[i]) {
    *logprobs = *entropy = *logsumexp = 0;
    if (kRef) *kl = 0;
    for (int k = 0; state && k < (kRef ? 6 : 3); ++k) state[k] = 0;
    return;
  }
  const double scale = scale_of<S>(a, i);
  const Logits<V, T, kCap> z{row_of<T>(a, a.logits, a.outer_stride, a.inner_stride, i), soft};
  const Logits<V, T, kCap> zr{kRef ? row_of<T>(a, a.ref_logits, a.ref_outer_stride, a.ref_inner_stride, i) : nullptr,
                              soft};
  const ScaledExp<V> exp_of(scale);
  RowSums row;
  for (int64_t j = 0; j < a.vocab; j += kBlock<T>) {
    const int64_t n = a.vocab - j < kBlock<T> ? a.vocab - j : kBlock<T>;
    if constexpr (!kRef) {
      if (!row.careful && add_block<V, T, kCap, false, false>(z, zr, exp_of, j, n, scale, &row)) continue;
    }
    const double before = row.policy.max;
    add_block<V, T, kCap, kRef, true>(z, zr, exp_of, j, n, scale, &row);
    if (row.policy.max > before) row.careful = false;  // terms that were too large may come out as NaN as well
  }
  *logprobs = static_cast<S>(row.policy.log_p(z.one(id_of(a, i)), scale));
  *entropy = static_cast<S>(row.policy.entropy());
  *logsumexp = static_cast<S>(row.policy.logsumexp(scale));
  if (kRef) *kl = static_cast<S>(row.gap.kl(row.policy, row.reference));
  if (!state) return;
  const auto keep = [](const SoftmaxSums<double>& from, S mean, S* to) {
    to[0] = static_cast<S>(from.max);
    to[1] = isfinite(from.max) ? static_cast<S>(from.sum) : static_cast<S>(NAN);
    to[2] = mean;
  };
  keep(row.policy, *entropy, state);
  if (kRef) keep(row.reference, *kl, state + 3);
}

template <class S>
inline S upstream(const void* grad, int64_t i) {
  return grad ? static_cast<const S*>(grad)[i] : 0;
}

// Gradient of one row: body(y, i, alive) of the vectors, then the target by itself. kMixed: entropy or KL take part.
template <class V, class T, bool kCap, bool kRef, bool kMixed>
void backward_row(const TokenLogprobsBackwardArgs& a, int64_t i, const SoftCap<V>& soft, const Upstream<double>& g,
                  bool far) {
  using S = typename V::Scalar;
  const int64_t id = id_of(a, i);
  const double scale = scale_of<S>(a, i);
  const S* state = static_cast<const S*>(a.state) + i * a.state_width;
  const RowState<double> p = {state[0], state[1], state[2]};
  const RowState<double> q = kRef ? RowState<double>{state[3], state[4], state[5]} : RowState<double>{0, 1, 0};
  const Logits<V, T, kCap> z{row_of<T>(a, a.logits, a.outer_stride, a.inner_stride, i), soft};
  const Logits<V, T, kCap> zr{kRef ? row_of<T>(a, a.ref_logits, a.ref_outer_stride, a.ref_inner_stride, i) : nullptr,
                              soft};
  T* grad = static_cast<T*>(a.grad_logits) + i * a.grad_stride;
  const double at_target =  // before the loop, which may overwrite the logits
      z.slope(id) * target_gradient(g, p, q, z.one(id) - p.max, kRef ? zr.one(id) - q.max : 0, scale);

  const GradientTerms<double> terms(g, p, q, scale);
  if (isnan(terms.constant)) {  // NaN or +inf in the row, or a NaN from upstream
    for (int64_t j = 0; j < a.vocab; ++j) grad[j] = narrow<T>(NAN);
    return;
  }
  const V constant = V::splat(static_cast<S>(terms.constant)), by_u = V::splat(static_cast<S>(terms.by_u));
  const V by_gap = V::splat(static_cast<S>(terms.by_gap));
  const V base = V::splat(state[0]), ref_base = V::splat(kRef ? state[3] : 0);
  const ScaledExp<V> exp_of(scale);
  const auto gradient = [&](const V& x, const V& xr) RLHF_FAST_INLINE {
    V y = x, t = x, out;
    if constexpr (kCap) {
      t = soft.tanh_of(x);
      y = soft.cap * t;
    }
    const V u = y - base;
    typename V::Mask alive;
    const V e = exp_of(u, &alive);
    if constexpr (!kMixed) {
      out = e * constant;
    } else {
      V weight = fma(by_u, u, constant);
      if constexpr (kRef) weight = fma(by_gap, u - (z.cap(xr) - ref_base), weight);
      out = fma_where(alive, e, weight, V::splat(0));  // the weight of a dead class may be infinite
    }
    if constexpr (kCap) out = out * soft.slope(t);
    return out;
  };
  const auto part = [&](int64_t j, int n) RLHF_FAST_INLINE {
    store(grad + j, gradient(load(z.row + j, n), kRef ? load(zr.row + j, n) : base), n);
  };
  const auto pair = [&](int64_t j) RLHF_FAST_INLINE -> Pair<V> {
    prefetch_next_block<V>(z.row, j);
    if constexpr (kRef) prefetch_next_block<V>(zr.row, j);
    const Pair<V> x = load_pair(z.row + j);
    if constexpr (kRef) {
      const Pair<V> xr = load_pair(zr.row + j);
      return {gradient(x.a, xr.a), gradient(x.b, xr.b)};
    } else {
      return {gradient(x.a, base), gradient(x.b, base)};
    }
  };

  constexpr int64_t W = V::width, step = 2 * W;
  int64_t j = 0;
  if (far) {  // streaming stores want their alignment; the gradient of a logit does not depend on its lane
    constexpr uintptr_t align = step * sizeof(T) < 64 ? step * sizeof(T) : 64;
    const int64_t off =
        static_cast<int64_t>(-reinterpret_cast<uintptr_t>(grad) & (align - 1)) / static_cast<int64_t>(sizeof(T));
    const int64_t head = off < a.vocab ? off : a.vocab;
    for (; j < head; j += W) part(j, static_cast<int>(head - j < W ? head - j : W));
    j = head;
    for (; j + step <= a.vocab; j += step) stream_pair(grad + j, pair(j));
  } else {
    for (; j + step <= a.vocab; j += step) store_pair(grad + j, pair(j));
  }
  for (; j < a.vocab; j += W) part(j, static_cast<int>(a.vocab - j < W ? a.vocab - j : W));
  grad[id] = narrow<T>(at_target);
}

template <class V, class T, bool kCap, bool kRef>
int64_t forward_rows(const TokenLogprobsArgs& a) {
  const SoftCap<V> soft(kCap ? a.softcap : 1);
  for_rows(a.rows, a.vocab, a.threads, [&](int64_t i) { forward_row<V, T, kCap, kRef>(a, i, soft); });
  return -1;
}

template <class V, class T, bool kCap, bool kRef>
int64_t backward_rows(const TokenLogprobsBackwardArgs& a) {
  using S = typename V::Scalar;
  const SoftCap<V> soft(kCap ? a.softcap : 1);
  const int64_t bytes = a.rows * a.vocab * static_cast<int64_t>(sizeof(T));
  const bool far = bytes >= kLargeBytes && a.grad_logits != a.logits;
  if (far) advise_huge_pages(a.grad_logits, bytes);
  for_rows(a.rows, a.vocab, a.threads, [&](int64_t i) {
    const Upstream<double> g = {upstream<S>(a.grad_logprobs, i), upstream<S>(a.grad_entropy, i),
                                upstream<S>(a.grad_logsumexp, i), upstream<S>(a.grad_kl, i)};
    if ((a.mask && !a.mask[i]) || g.none())
      __builtin_memset(static_cast<T*>(a.grad_logits) + i * a.grad_stride, 0, a.vocab * sizeof(T));
    else if (g.flat())
      backward_row<V, T, kCap, false, false>(a, i, soft, g, far);
    else if (kRef && g.kl != 0)
      backward_row<V, T, kCap, kRef, true>(a, i, soft, g, far);
    else
      backward_row<V, T, kCap, false, true>(a, i, soft, g, far);
  });
  return -1;
}

template <class V, class T>
int64_t run(const TokenLogprobsArgs& a) {
  if (const int64_t row = first_refused<typename V::Scalar>(a); row >= 0) return row;
  if (a.softcap > 0) return a.ref_logits ? forward_rows<V, T, true, true>(a) : forward_rows<V, T, true, false>(a);
  return a.ref_logits ? forward_rows<V, T, false, true>(a) : forward_rows<V, T, false, false>(a);
}

template <class V, class T>
int64_t run(const TokenLogprobsBackwardArgs& a) {
  if (const int64_t row = first_refused<typename V::Scalar>(a); row >= 0) return row;
  if (a.softcap > 0) return a.ref_logits ? backward_rows<V, T, true, true>(a) : backward_rows<V, T, true, false>(a);
  return a.ref_logits ? backward_rows<V, T, false, true>(a) : backward_rows<V, T, false, false>(a);
}

template <class Args>
int64_t by_dtype(const Args& a) {
  switch (a.dtype) {
    case kBFloat16:
      return run<Float, BFloat16>(a);
    case kFloat16:
      return run<Float, Float16>(a);
    case kFloat64:
      return run<Double, double>(a);
    default:
      return run<Float, float>(a);
  }
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t token_logprobs(const TokenLogprobsArgs& a) { return by_dtype(a); }

int64_t token_logprobs_backward(const TokenLogprobsBackwardArgs& a) { return by_dtype(a); }

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
