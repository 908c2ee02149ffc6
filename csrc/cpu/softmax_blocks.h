// A row of logits in blocks that stay in the first-level cache: the sums of its softmax, and rows spread over threads.
//
// Exponentials are taken relative to a logit near the largest so far, which costs a look at few of them; a block that
// exceeds it by far is taken again, relative to its own largest. Blocks are joined in double, and depend on V alone, so
// a row has the same bits in any batch, at any address and on any thread.
#pragma once

#include "common/softmax.h"
#include "parallel.h"
#include "vec.h"

namespace rlhf_fast {
namespace {

// What a row of T is computed in.
template <class T>
using VectorOf = decltype(load(static_cast<const T*>(nullptr)));

template <class T>
constexpr int64_t kBlock = 8192 / sizeof(T);  // elements
constexpr int64_t kProbe = 128;               // logits whose largest is the first point of reference
constexpr double kLargestSum = 1e6;           // e^14: what a block may add up to before its point of reference moves
constexpr int64_t kGrainElements = 32768;     // below this a second thread costs more than it saves
constexpr int64_t kRowsPerDraw = 16;

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

template <class T, class Args>
inline const T* row_of(const Args& a, const void* base, int64_t outer_stride, int64_t inner_stride, int64_t i) {
  return static_cast<const T*>(base) + (i / a.inner) * outer_stride + (i % a.inner) * inner_stride;
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

}  // namespace
}  // namespace rlhf_fast
