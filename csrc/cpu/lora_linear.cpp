// One segment of a linear layer with adapters: low = scale x A, then y += low B; A (in, r) and B (r, out) of rank r.
// Without y it stops at low, which the product with the weight then adds itself (matmul.h).
//
// low stays fp32 and is kept: the backward multiplies it, and runs the same kernel with the factors changed places.
// Where x is bf16 and the processor multiplies bf16, operands are rounded to it, as PyTorch's product would round them.
#include "formats.h"
#include "matmul.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kShared = 1 << 20;  // products; below this a second thread costs more than it saves
constexpr int64_t kWidest = 64;       // ranks up to here are a read of x rather than a product

#if defined(RLHF_FAST_VEC512)
constexpr int kSkinnyRows = 14;  // twice as many of 32 registers hold sums
#else
constexpr int kSkinnyRows = kTileRows;
#endif

// low[i][0..lanes) = scale times rows of x, `pitch` units apart, by sixteen columns of the factor.
template <bool kNarrow, int R>
void skinny_tile(const float* x, int64_t pitch, const float* factor, int64_t units, const Float& scale, float* low,
                 int64_t rank, int lanes) {
  Float total[R];
  for (Float& s : total) s = Float::splat(0);
  for (int64_t k = 0; k < units; k += kDepth) {
    Float sums[R];
    for (Float& s : sums) s = Float::splat(0);
    const int64_t end = least(units, k + kDepth);
    for (int64_t u = k; u < end; ++u) {
      if (u % kLanes < R) prefetch(x + (R + u % kLanes) * pitch + u);
      const Float column = load(factor + u * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) sums[i] = multiply_add<kNarrow>(Float::splat(x[i * pitch + u]), column, sums[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) total[i] = total[i] + sums[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) store_lanes(low + i * rank, total[i] * scale, lanes);
}

template <bool kNarrow, int R = kSkinnyRows>
inline void skinny_tile_of(int rows, const float* x, int64_t pitch, const float* factor, int64_t units,
                           const Float& scale, float* low, int64_t rank, int lanes) {
  if (rows == R) return skinny_tile<kNarrow, R>(x, pitch, factor, units, scale, low, rank, lanes);
  if constexpr (R > 1) skinny_tile_of<kNarrow, R - 1>(rows, x, pitch, factor, units, scale, low, rank, lanes);
}

// low = scale x A where rows of x can be read as they lie: a product this narrow is no more than a read of them, and
// packing them first would double it. The factor is packed, sixteen columns at a time.
template <bool kNarrow>
void skinny(const LoraLinearArgs& x) {
  constexpr int64_t step = Units<float, kNarrow>::step;
  const int64_t units = x.in / step, strips = ceil_div(x.rank, kLanes);
  float* const packed = static_cast<float*>(x.workspace);
  const Float scale = Float::splat(static_cast<float>(x.scale));
  const int64_t tile_rows = ceil_div(x.rows, ceil_div(x.rows, kSkinnyRows)), tiles = ceil_div(x.rows, tile_rows);
  const int threads = x.rows * x.in * x.rank < kShared ? 1 : x.threads;
  for_phases(threads, 1, threads, 2, [&](int phase, int64_t from, int64_t to) {
    const unsigned before = flush_denormals();
    if (phase == 0) {
      // Blocks of sixteen units; what lies past the last is written here first and left behind.
      const int64_t blocks = ceil_div(units, kLanes), all = strips * blocks;
      alignas(64) float block[kLanes * kLanes];
      for (int64_t i = all * from / threads; i < all * to / threads; ++i) {
        const int64_t column = i / blocks * kLanes, u = i % blocks * kLanes, some = least(kLanes, units - u);
        const Operand<float> part{x.a + column * x.a_column + u * step * x.a_row, x.a_column, x.a_row};
        pack_sixteen<kNarrow>(part, static_cast<int>(least(kLanes, x.rank - column)), x.in - u * step, block);
        __builtin_memcpy(packed + (column * units + u * kLanes), block, some * kLanes * sizeof(float));
      }
    } else {
      const float* rows = static_cast<const float*>(x.x);
      const int64_t pitch = x.x_row / step;
      for (int64_t tile = tiles * from / threads; tile < tiles * to / threads; ++tile) {
        const int64_t row = tile * tile_rows;
        for (int64_t s = 0; s < strips; ++s)
          skinny_tile_of<kNarrow>(static_cast<int>(least(tile_rows, x.rows - row)), rows + row * pitch, pitch,
                                  packed + s * kLanes * units, units, scale,
                                  static_cast<float*>(x.low) + row * x.rank + s * kLanes, x.rank,
                                  static_cast<int>(least(kLanes, x.rank - s * kLanes)));
      }
    }
    restore_denormals(before);
  });
}

// Whether it can: x is what the processor multiplies, in whole units, and the factor has room. Depends on the layer
// alone.
template <bool kNarrow, class T>
bool can_skinny(const LoraLinearArgs& x) {
  constexpr int64_t step = Units<T, kNarrow>::step;
  const bool units = sizeof(T) * step == sizeof(float);
  return units && x.in % step == 0 && x.x_row % step == 0 && x.rank <= kWidest &&
         ceil_div(x.rank, kLanes) * kLanes * (x.in / step) <= kMatmulFloats;
}

template <bool kNarrow, class T>
void segment(const LoraLinearArgs& x) {
  if (can_skinny<kNarrow, T>(x)) {
    skinny<kNarrow>(x);
  } else {
    MatmulArgs down{};
    down.a = x.x, down.a_dtype = x.dtype, down.a_row = x.x_row, down.a_column = 1;
    down.b = x.a, down.b_dtype = kFloat32, down.b_row = x.a_row, down.b_column = x.a_column;
    down.c = x.low, down.c_row = x.rank;
    down.m = x.rows, down.n = x.rank, down.k = x.in;
    down.narrow = kNarrow;
    down.workspace = x.workspace, down.threads = x.threads;
    RLHF_FAST_ISA::matmul(down);
    const Float scale = Float::splat(static_cast<float>(x.scale));
    float* const low = static_cast<float*>(x.low);
    const int64_t count = x.rows * x.rank;
    for_ranges(count, 65536, x.threads, [&](int64_t i, int64_t end) {
      for (; i + kLanes <= end; i += kLanes) store(low + i, load(low + i) * scale);
      if (i < end) store(low + i, load(low + i, static_cast<int>(end - i)) * scale, static_cast<int>(end - i));
    });
  }
  if (!x.y) return;
  MatmulArgs up{};
  up.a = x.low, up.a_row = x.rank, up.a_column = 1;
  up.b = x.b, up.b_row = x.b_row, up.b_column = x.b_column;
  up.a_dtype = up.b_dtype = kFloat32;
  up.c = x.y, up.c_row = x.y_row, up.accumulate = true;
  up.m = x.rows, up.n = x.out, up.k = x.rank;
  up.workspace = x.workspace, up.threads = x.threads;
  if constexpr (std::is_same_v<T, float>)
    RLHF_FAST_ISA::matmul(up);
  else
    multiply<kNarrow, float, float, T>(up);
}

template <class T>
void by_format(Format<T>, const LoraLinearArgs& x) {
#if defined(RLHF_FAST_ISA_AVX512BF16)
  segment<std::is_same_v<T, BFloat16>, T>(x);
#else
  segment<false, T>(x);
#endif
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t lora_linear(const LoraLinearArgs& x) {
  if (x.rows <= 0 || x.rank <= 0) return -1;
  with_format(x.dtype, [&](auto format) { by_format(format, x); });
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
