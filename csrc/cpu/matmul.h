// Matrix products with fp32 sums from operands of any storage format: C = A B + bias, or C += A B.
//
// Products of two bf16 numbers are exact in fp32, so where the processor multiplies bf16 (`narrow`) only the sums are
// rounded: logits of a bf16 model are fp32 at the speed of bf16. Every element is summed over k in an order that
// depends on k alone, so a row of C has the same bits in any batch and for any number of threads.
//
// The smaller operand is packed once for all threads (it stays in the second-level cache), the larger one strip by
// strip by the thread that needs it. Tiles of kTileRows x kTileColumns sums stay in registers over a whole block of k.
#pragma once

#include <type_traits>

#include "ops.h"
#include "parallel.h"
#include "transpose.h"
#include "vec.h"

namespace rlhf_fast {
namespace {

#if defined(RLHF_FAST_VEC512)
constexpr int kTileRows = 14, kVectors = 2;  // 28 of 32 registers hold sums
#elif defined(RLHF_FAST_VEC256)
constexpr int kTileRows = 6, kVectors = 1;  // 12 of 16; a vector is two registers
#else
constexpr int kTileRows = 2, kVectors = 1;
#endif
constexpr int kTileColumns = kVectors * kLanes;

// Along k everything is counted in units of 32 bits: one fp32 number, or two of bf16.
constexpr int64_t kDepth = 768;                      // units of a block of k
constexpr int64_t kLowDepth = 64;                    // units of a second product that the last block has room for
constexpr int64_t kPitch = kDepth + kLowDepth + 16;  // between packed rows of A: an odd number of cache lines
constexpr int64_t kPanels = 384;  // rows of A, or columns of B, that are packed for all threads at a time
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kRowsAhead = 32;  // rows
static_assert(kMatmulFloats >= (kPanels + kTileRows) * kPitch && kMatmulFloats >= (kPanels + kTileColumns) * kPitch);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// An operand of `lines` (rows of A, columns of B) by k.
template <class T>
struct Operand {
  const T* data;
  int64_t line, along;  // strides in elements; one of them is 1
};

// Sixteen units of a line, or one unit of sixteen lines, as the bits of a vector. `left`: elements of k from here on.
template <class T, bool kNarrow>
struct Units {
  static constexpr int step = 1;  // elements of k in a unit
  static Float along(const T* p, int64_t left) { return left >= kLanes ? load(p) : load(p, static_cast<int>(left)); }
  static Float across(const T* p, int64_t, int64_t, int lines) { return lines == kLanes ? load(p) : load(p, lines); }
};

#if defined(RLHF_FAST_ISA_AVX512BF16)
inline __m256i halves(const BFloat16* p, int n) { return _mm256_maskz_loadu_epi16(first_lanes(n).m, p); }
inline __m256i halves(const float* p, int n) { return pack(load(p, n), static_cast<BFloat16*>(nullptr)); }

inline __m512i pairs(const BFloat16* p, int64_t left) {
  return _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : (1u << left) - 1, p);
}
inline __m512i pairs(const float* p, int64_t left) {
  const Float low = load(p, static_cast<int>(least(left, kLanes)));
  const Float high = left > kLanes ? load(p + kLanes, static_cast<int>(least(left - kLanes, kLanes))) : Float::splat(0);
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
}

template <class T>
struct Units<T, true> {
  static constexpr int step = 2;
  static Float along(const T* p, int64_t left) { return {_mm512_castsi512_ps(pairs(p, left))}; }
  static Float across(const T* p, int64_t next, int64_t left, int lines) {
    const __m512i even = _mm512_cvtepu16_epi32(halves(p, lines));
    if (left < 2) return {_mm512_castsi512_ps(even)};
    const __m512i odd = _mm512_cvtepu16_epi32(halves(p + next, lines));
    return {_mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)))};
  }
};
#endif

// Units [0, depth) of up to sixteen lines as [line][unit], kPitch apart; writes up to the next multiple of sixteen.
template <bool kNarrow, class T>
void pack_rows(Operand<T> x, int lines, int64_t depth, int64_t left, float* to) {
  using U = Units<T, kNarrow>;
  if (x.along == 1) {
    for (int i = 0; i < lines; ++i)
      for (int64_t u = 0; u < depth; u += kLanes)
        store(to + i * kPitch + u, U::along(x.data + i * x.line + u * U::step, left - u * U::step));
    return;
  }
  for (int64_t u = 0; u < depth; u += kLanes) {
    Float block[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      const int64_t k = (u + j) * U::step;
      block[j] = k < left ? U::across(x.data + k * x.along, x.along, left - k, lines) : Float::splat(0);
    }
    transpose(block);
    for (int i = 0; i < lines; ++i) store(to + i * kPitch + u, block[i]);
  }
}

// The same of up to kTileColumns lines as [unit][line].
template <bool kNarrow, class T>
void pack_columns(Operand<T> x, int lines, int64_t depth, int64_t left, float* to) {
  using U = Units<T, kNarrow>;
  for (int v = 0; v < kVectors; ++v) {
    const int some = static_cast<int>(least(lines - v * kLanes, kLanes));
    if (some <= 0) {
      for (int64_t u = 0; u < depth; ++u) store(to + u * kTileColumns + v * kLanes, Float::splat(0));
      continue;
    }
    const T* from = x.data + v * kLanes * x.line;
    if (x.line == 1) {
      for (int64_t u = 0; u < depth; ++u) {
        const int64_t k = u * U::step;
        store(to + u * kTileColumns + v * kLanes, U::across(from + k * x.along, x.along, left - k, some));
      }
      continue;
    }
    for (int64_t u = 0; u < depth; u += kLanes) {
      Float block[kLanes];
      for (int j = 0; j < kLanes; ++j)
        block[j] = j < some ? U::along(from + j * x.line + u * U::step, left - u * U::step) : Float::splat(0);
      transpose(block);
      for (int j = 0; j < kLanes; ++j) store(to + (u + j) * kTileColumns + v * kLanes, block[j]);
    }
  }
}

// Sixteen units of up to sixteen lines as [unit][line]; 0 past the end of k.
template <bool kNarrow, class T>
void pack_sixteen(Operand<T> x, int lines, int64_t left, float* to) {
  using U = Units<T, kNarrow>;
  Float block[kLanes];
  if (x.line == 1) {
    for (int u = 0; u < kLanes; ++u) {
      const int64_t k = u * U::step;
      block[u] = k < left ? U::across(x.data + k * x.along, x.along, left - k, lines) : Float::splat(0);
    }
  } else {
    for (int j = 0; j < kLanes; ++j) block[j] = j < lines ? U::along(x.data + j * x.line, left) : Float::splat(0);
    transpose(block);
  }
  for (int u = 0; u < kLanes; ++u) store(to + u * kLanes, block[u]);
}

template <bool kNarrow>
inline RLHF_FAST_INLINE Float multiply_add(const Float& a, const Float& b, const Float& c) {
#if defined(RLHF_FAST_ISA_AVX512BF16)
  if constexpr (kNarrow)
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
#endif
  return fma(a, b, c);
}

// Where a tile goes. C is narrower than fp32 only where k is one block: a sum is rounded to it once.
template <class C>
struct Target {
  C* c;
  int64_t pitch;
  int columns;
  bool add;           // to what is there
  const float* bias;  // of these columns, or null
};

// b: kTileColumns columns of every unit of k, b_pitch apart. kFar: b lies in rows of something wider, which no
// processor foresees: it is asked for kRowsAhead rows before it is due, or a cold operand would be waited for at every
// row.
template <bool kNarrow, bool kFar, int R, class C>
void tile(const float* a, const float* b, int64_t b_pitch, int64_t depth, Target<C> to) {
  Float sums[R][kVectors];
  for (auto& row : sums)
    for (Float& s : row) s = Float::splat(0);
  for (int64_t u = 0; u < depth; ++u) {
    Float column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + u * b_pitch + v * kLanes);
    if constexpr (kFar)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(b + (u + kRowsAhead) * b_pitch + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Float row = Float::splat(a[i * kPitch + u]);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add<kNarrow>(row, column[v], sums[i][v]);
    }
  }
  // Unrolled with constant places, or the sums would go through memory.
  if (to.columns == kTileColumns) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < kVectors; ++v) {
        C* c = to.c + i * to.pitch + v * kLanes;
        Float s = sums[i][v];
        if (to.bias) s = s + load(to.bias + v * kLanes);
        store(c, to.add ? load(c) + s : s);
      }
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const int n = static_cast<int>(least(to.columns - v * kLanes, kLanes));
      if (n <= 0) continue;
      C* c = to.c + i * to.pitch + v * kLanes;
      Float s = sums[i][v];
      if (to.bias) s = s + load(to.bias + v * kLanes, n);
      store(c, to.add ? load(c, n) + s : s, n);
    }
}

template <bool kNarrow, bool kFar, int R = kTileRows, class C>
inline void tile_of(int rows, const float* a, const float* b, int64_t b_pitch, int64_t depth, Target<C> to) {
  if (rows == R) return tile<kNarrow, kFar, R>(a, b, b_pitch, depth, to);
  if constexpr (R > 1) tile_of<kNarrow, kFar, R - 1>(rows, a, b, b_pitch, depth, to);
}

// Sizes of equal parts of n, at most `most` each, in multiples of `unit`.
inline int64_t even_part(int64_t n, int64_t most, int64_t unit) {
  return ceil_div(ceil_div(n, ceil_div(n, most)), unit) * unit;
}

// A second product, of low rank, is so many more units of the last block: the sums go on where the first left them, and
// C is written once. How k falls into blocks does not depend on it: where low_b is 0, C has the bits of A B.
template <bool kNarrow, class A, class B, class C = float>
void multiply(const MatmulArgs& x) {
  const int64_t low_depth = kNarrow || !x.low || x.rank > kLowDepth ? 0 : x.rank;
  constexpr int step = Units<A, kNarrow>::step;
  const Operand<A> a{static_cast<const A*>(x.a), x.a_row, x.a_column};
  const Operand<B> b{static_cast<const B*>(x.b), x.b_column, x.b_row};
  // A transposed A goes in wide parts: a strip of a few of its rows is a piece of a cache line of each column.
  const bool rows_shared = x.m <= x.n || a.along != 1;
  // Shared: the operand that is packed for all. Its lines go in parts, k in blocks; the other's lines in strips.
  // Rows of equal tiles: 16 as 8 and 8. A tile of few rows waits for its own sums.
  const int tile_rows = x.m > 0 ? static_cast<int>(ceil_div(x.m, ceil_div(x.m, kTileRows))) : 1;
  const int shared_tile = rows_shared ? tile_rows : kTileColumns, other_tile = rows_shared ? kTileColumns : tile_rows;
  const int64_t shared = rows_shared ? x.m : x.n, other = rows_shared ? x.n : x.m;
  const int64_t part = even_part(shared, kPanels, shared_tile), parts = ceil_div(shared, part);
  const int64_t units = x.k > 0 ? ceil_div(x.k, step) : 1, depth = even_part(units, kDepth, kLanes),
                blocks = ceil_div(units, depth);
  const int64_t strips = ceil_div(other, other_tile);
  float* const packed = static_cast<float*>(x.workspace);
  const int64_t panel_floats = shared_tile * kPitch;
  // A strip that few rows are multiplied by is read where it lies: packing it would cost as much as the products.
  constexpr bool can_lie = !kNarrow && std::is_same_v<B, float>;
  const bool in_place = can_lie && rows_shared && b.line == 1 && x.m <= 2 * kTileRows && !low_depth;
  int64_t next = 0;
  for_phases(x.threads, 1, x.threads, static_cast<int>(2 * parts * blocks), [&](int phase, int64_t from, int64_t to) {
    const int64_t first_line = phase / 2 / blocks * part, k = phase / 2 % blocks * depth * step;
    const int64_t lines = least(part, shared - first_line), panels = ceil_div(lines, shared_tile);
    const int64_t left = x.k - k, own = least(depth, ceil_div(left, step));
    const int64_t low = left <= depth * step ? low_depth : 0, deep = own + low;  // in the last block
    const auto pack_a = [&](int64_t line, int some, float* at) {
      pack_rows<kNarrow>(Operand<A>{a.data + line * a.line + k * a.along, a.line, a.along}, some, own, left, at);
      if (low) pack_rows<false>(Operand<float>{x.low + line * x.low_row, x.low_row, 1}, some, low, low, at + own);
    };
    const auto pack_b = [&](int64_t line, int some, float* at) {
      pack_columns<kNarrow>(Operand<B>{b.data + line * b.line + k * b.along, b.line, b.along}, some, own, left, at);
      if (low)
        pack_columns<false>(Operand<float>{x.low_b + line * x.low_b_column, x.low_b_column, x.low_b_row}, some, low,
                            low, at + own * kTileColumns);
    };
    const unsigned before = flush_denormals();
    if (phase % 2 == 0) {
      if (from == 0) next = 0;
      for (int64_t p = panels * from / x.threads; p < panels * to / x.threads; ++p) {
        const int64_t line = first_line + p * shared_tile;
        const int some = static_cast<int>(least(shared_tile, shared - line));
        if (rows_shared)
          pack_a(line, some, packed + p * panel_floats);
        else
          pack_b(line, some, packed + p * panel_floats);
      }
      return restore_denormals(before);
    }
    // Where strips are few, several tasks share one and pack it each for themselves.
    const int64_t cuts = least(panels, ceil_div(kTasksPerThread * x.threads, strips));
    alignas(64) float strip[(kTileColumns > kTileRows ? kTileColumns : kTileRows) * kPitch];
    const auto draw = [&] { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); };
    for (int64_t task = draw(); task < strips * cuts; task = draw()) {
      const int64_t line = task / cuts * other_tile, cut = task % cuts;
      const int some = static_cast<int>(least(other_tile, other - line));
      const float* columns = strip;
      int64_t columns_pitch = kTileColumns;
      if (in_place && some == kTileColumns) {
        columns = reinterpret_cast<const float*>(b.data + line + k * b.along);
        columns_pitch = b.along;
      } else if (rows_shared)
        pack_b(line, some, strip);
      else
        pack_a(line, some, strip);
      for (int64_t p = panels * cut / cuts; p < panels * (cut + 1) / cuts; ++p) {
        const int64_t at = first_line + p * shared_tile;
        const int size = static_cast<int>(least(shared_tile, shared - at));
        const int64_t row = rows_shared ? at : line, column = rows_shared ? line : at;
        const float *panel = packed + p * panel_floats, *bias = k == 0 && x.bias ? x.bias + column : nullptr;
        const Target<C> target{static_cast<C*>(x.c) + row * x.c_row + column, x.c_row, rows_shared ? some : size,
                               x.accumulate || k > 0, bias};
        if (columns != strip && rows_shared)
          tile_of<kNarrow, can_lie>(size, panel, columns, columns_pitch, deep, target);
        else if (rows_shared)
          tile_of<kNarrow, false>(size, panel, strip, kTileColumns, deep, target);
        else
          tile_of<kNarrow, false>(some, strip, panel, kTileColumns, deep, target);
      }
    }
    restore_denormals(before);
  });
  if (x.low && !low_depth) {
    MatmulArgs rest = x;
    rest.a = x.low, rest.b = x.low_b, rest.low = rest.low_b = rest.bias = nullptr;
    rest.k = x.rank, rest.rank = 0, rest.accumulate = true;
    rest.a_row = x.low_row, rest.a_column = 1, rest.b_row = x.low_b_row, rest.b_column = x.low_b_column;
    multiply<kNarrow, float, float, C>(rest);
  }
}

}  // namespace
}  // namespace rlhf_fast
