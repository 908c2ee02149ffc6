// Products with weights that were packed once, in the order in which they are read: a few rows by every weight of a
// model, as each step of a rollout makes them.
#include "matmul.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kAhead = 8192;  // floats: about a panel of columns

// sums[i][v] += rows of a, `pitch` units apart, times the columns of b. kFetch: b lies in memory, and what is read
// after it follows.
template <bool kNarrow, int R, bool kFetch>
inline RLHF_FAST_INLINE void add_products(const float* a, int64_t pitch, const float* b, int64_t depth,
                                          Float (&sums)[R][kVectors]) {
  for (int64_t u = 0; u < depth; ++u) {
    Float column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + u * kTileColumns + v * kLanes);
    if constexpr (kFetch)
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(b + u * kTileColumns + v * kLanes + kAhead, 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Float row = Float::splat(a[i * pitch + u]);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = multiply_add<kNarrow>(row, column[v], sums[i][v]);
    }
  }
}

// The tile of a product with packed weights: its sums stay in registers over all of k and over the low rank.
struct PackedTile {
  const float *x, *weight, *low, *low_weight;
  int64_t x_pitch, depth, low_pitch, low_depth;
  float scale;
  const float* bias;  // of these columns, or null
  int columns;
};

template <bool kNarrow, class Out, int R>
void packed_tile(const PackedTile& t, Out* out, int64_t pitch) {
  Float sums[R][kVectors];
  for (auto& row : sums)
    for (Float& s : row) s = Float::splat(0);
  add_products<kNarrow, R, true>(t.x, t.x_pitch, t.weight, t.depth, sums);
  if (t.low) add_products<kNarrow, R, false>(t.low, t.low_pitch, t.low_weight, t.low_depth, sums);
  const Float scale = Float::splat(t.scale);
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const int n = static_cast<int>(least(t.columns - v * kLanes, kLanes));
      if (n <= 0) continue;
      const Float bias = t.bias ? load(t.bias + v * kLanes, n) : Float::splat(0);
      const Float s = fma(sums[i][v], scale, bias);
      if (n == kLanes)
        store(out + i * pitch + v * kLanes, s);
      else
        store(out + i * pitch + v * kLanes, s, n);
    }
}

template <bool kNarrow, class Out, int R = kTileRows>
inline void packed_tile_of(int rows, const PackedTile& t, Out* out, int64_t pitch) {
  if (rows == R) return packed_tile<kNarrow, Out, R>(t, out, pitch);
  if constexpr (R > 1) packed_tile_of<kNarrow, Out, R - 1>(rows, t, out, pitch);
}

template <bool kNarrow, class T, class Out>
void multiply_packed(const PackedLinearArgs& x) {
  constexpr int64_t step = Units<T, kNarrow>::step;
  const int64_t depth = ceil_div(x.k, step), low_depth = ceil_div(x.r, step), strips = ceil_div(x.n, kTileColumns);
  // Rows of equal tiles: 32 as 11, 11 and 10.
  const int64_t tile_rows = x.m > 0 ? ceil_div(x.m, ceil_div(x.m, kTileRows)) : 1, tiles = ceil_div(x.m, tile_rows);
  const T* rows = static_cast<const T*>(x.x);
  int64_t pitch = x.x_row;
  const bool copied = x.workspace;
  const int64_t roomy = depth * step + 2 * kLanes;
  int64_t next = 0;
  if (copied) pitch = roomy;
  for_phases(x.threads, 1, x.threads, copied ? 2 : 1, [&](int phase, int64_t from, int64_t to) {
    if (copied && phase == 0) {
      for (int64_t i = x.m * from / x.threads; i < x.m * to / x.threads; ++i)
        __builtin_memcpy(static_cast<T*>(x.workspace) + i * roomy, rows + i * x.x_row, x.k * sizeof(T));
      return;
    }
    const T* const a = copied ? static_cast<const T*>(x.workspace) : rows;
    const int64_t cuts = least(tiles, ceil_div(kTasksPerThread * x.threads, strips));
    const unsigned before = flush_denormals();
    const auto draw = [&] { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); };
    for (int64_t task = draw(); task < strips * cuts; task = draw()) {
      const int64_t strip = task / cuts, cut = task % cuts, column = strip * kTileColumns;
      for (int64_t tile = tiles * cut / cuts; tile < tiles * (cut + 1) / cuts; ++tile) {
        const int64_t row = tile * tile_rows;
        const PackedTile t{reinterpret_cast<const float*>(a + row * pitch),
                           x.weight + column * depth,
                           x.low ? reinterpret_cast<const float*>(static_cast<const T*>(x.low) + row * x.r) : nullptr,
                           x.low ? x.low_weight + column * low_depth : nullptr,
                           pitch / step,
                           depth,
                           x.r / step,
                           low_depth,
                           static_cast<float>(x.scale),
                           x.bias ? x.bias + column : nullptr,
                           static_cast<int>(least(kTileColumns, x.n - column))};
        packed_tile_of<kNarrow>(static_cast<int>(least(tile_rows, x.m - row)), t,
                                static_cast<Out*>(x.out) + row * x.out_row + column, x.out_row);
      }
    }
    restore_denormals(before);
  });
}

template <bool kNarrow, class T>
void pack_strips(const PackLinearArgs& x) {
  constexpr int64_t step = Units<T, kNarrow>::step;
  const int64_t depth = ceil_div(x.k, step), strips = ceil_div(x.n, kPackedColumns) * (kPackedColumns / kTileColumns);
  const T* weight = static_cast<const T*>(x.weight);
  for_ranges(strips, 1, x.threads, [&](int64_t from, int64_t to) {
    // Whole blocks of sixteen units: what lies past k is written here first and left behind.
    alignas(64) float block[kLanes * kTileColumns];
    for (int64_t s = from; s < to; ++s) {
      const int64_t column = s * kTileColumns;
      const int lines = static_cast<int>(least(kTileColumns, x.n - column));
      for (int64_t u = 0; u < depth; u += kLanes) {
        const int64_t some = least(kLanes, depth - u);
        const Operand<T> part{weight + column * x.n_stride + u * step * x.k_stride, x.n_stride, x.k_stride};
        pack_columns<kNarrow>(part, lines < 0 ? 0 : lines, some, x.k - u * step, block);
        __builtin_memcpy(x.packed + column * depth + u * kTileColumns, block, some * kTileColumns * sizeof(float));
      }
    }
  });
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t pack_linear(const PackLinearArgs& x) {
#if defined(RLHF_FAST_ISA_AVX512BF16)
  if (x.dtype == kBFloat16) {
    pack_strips<true, BFloat16>(x);
    return -1;
  }
#endif
  pack_strips<false, float>(x);
  return -1;
}

int64_t packed_linear(const PackedLinearArgs& x) {
#if defined(RLHF_FAST_ISA_AVX512BF16)
  if (x.dtype == kBFloat16) {
    x.out_dtype == kBFloat16 ? multiply_packed<true, BFloat16, BFloat16>(x) : multiply_packed<true, BFloat16, float>(x);
    return -1;
  }
#endif
  multiply_packed<false, float, float>(x);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
