// 16 bytes of a row at a time, wherever the row begins.
#pragma once

#include "common/dtype.h"
#include "cuda/simt.h"

namespace rlhf_fast::cuda {
namespace {

template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));  // elements of a vector

template <class T>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

// How the rows lie: their distance from a multiple of 16 bytes, in words of 4 bytes, 0 to 3; or the special cases.
enum Shift { kAligned = -1, kAnyShift = 4 };

// Elements past a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ int phase_of(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15) / static_cast<int>(sizeof(T));
}

// The numbers in four words.
template <class T>
__device__ __forceinline__ void unpack(const unsigned* words, float* y) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(T) == 4) {
      y[k] = float_of(words[k]);
    } else if constexpr (kIsBFloat16<T>) {
#if defined(__CUDA_ARCH__)  // without a move between registers of two kinds
      asm("shl.b32 %0, %1, 16;" : "=f"(y[2 * k]) : "r"(words[k]));
      asm("and.b32 %0, %1, 0xffff0000;" : "=f"(y[2 * k + 1]) : "r"(words[k]));
#else
      y[2 * k] = float_of(words[k] << 16);
      y[2 * k + 1] = float_of(words[k] & 0xffff0000u);
#endif
    } else {
      y[2 * k] = widen(T{static_cast<uint16_t>(words[k])});
      y[2 * k + 1] = widen(T{static_cast<uint16_t>(words[k] >> 16)});
    }
  }
}

// from[i], of memory that the kernel does not write; the offset is part of the instruction.
template <int i>
__device__ __forceinline__ uint4 load_vector(const uint4* from) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from), "n"(16 * i));
  return v;
#else
  return from[i];
#endif
}

template <int i, int kVectors>
__device__ __forceinline__ void load_words(const uint4* from, unsigned* w) {
  const uint4 v = load_vector<i>(from);
  w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
  if constexpr (i + 1 < kVectors) load_words<i + 1, kVectors>(from, w);
}

// Runs of kCount elements of a row, whole vectors of them. Rows that do not begin at a multiple of 16 bytes, as those
// of an odd vocabulary, are read by the vectors that hold the elements, one more, and then shifted into place: so the
// elements that a thread adds up do not depend on where the row begins. What the vectors hold beyond the elements is
// the caller's to allow.
template <class T, int kShift, int kCount>
struct Runs {
  const char* vectors;  // where the vector with the first element begins
  unsigned bits;        // half a word or nothing, of the distance in between
  int words;            // the rest of it, for kAnyShift

  __device__ __forceinline__ explicit Runs(const T* first) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(first), distance = address & 15;
    vectors = reinterpret_cast<const char*>(address - distance);
    bits = static_cast<unsigned>(distance & 2) * 8;
    words = static_cast<int>(distance / 4);
  }
  // That which begins at element i, a multiple of kLanes<T>.
  __device__ __forceinline__ void load(int i, float* y) const {
    constexpr int kWords = 4 * kCount / kLanes<T>;
    const uint4* from = reinterpret_cast<const uint4*>(vectors + static_cast<int64_t>(i) * static_cast<int>(sizeof(T)));
    unsigned w[kWords + 4];
    load_words<0, kWords / 4 + (kShift == kAligned ? 0 : 1)>(from, w);
    if constexpr (kShift == kAnyShift) {
      if (words & 2) {
#pragma unroll
        for (int k = 0; k < kWords + 2; ++k) w[k] = w[k + 2];
      }
      if (words & 1) {
#pragma unroll
        for (int k = 0; k < kWords + 1; ++k) w[k] = w[k + 1];
      }
    } else if constexpr (kShift != kAligned) {
#pragma unroll
      for (int k = 0; k < kWords + 4 - kShift; ++k) w[k] = w[k + kShift];
    }
    if constexpr (kShift != kAligned && sizeof(T) == 2) {
#pragma unroll
      for (int k = 0; k < kWords; ++k) w[k] = __funnelshift_r(w[k], w[k + 1], bits);
    }
#pragma unroll
    for (int k = 0; k < kWords; k += 4) unpack<T>(w + k, y + k / 4 * kLanes<T>);
  }
};

// Two numbers in storage format, the first in the lower half; and one of them.
template <class T>
__device__ __forceinline__ unsigned pack_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned word;
  if constexpr (kIsBFloat16<T>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return static_cast<unsigned>(narrow<T>(low).bits) | static_cast<unsigned>(narrow<T>(high).bits) << 16;
#endif
}

template <class T>
__device__ __forceinline__ void store_vector(T* p, const float* y) {
  uint4 v;
  if constexpr (sizeof(T) == 4)
    v = {bits_of(y[0]), bits_of(y[1]), bits_of(y[2]), bits_of(y[3])};
  else
    v = {pack_pair<T>(y[0], y[1]), pack_pair<T>(y[2], y[3]), pack_pair<T>(y[4], y[5]), pack_pair<T>(y[6], y[7])};
  *reinterpret_cast<uint4*>(p) = v;
}

// 2^x; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

}  // namespace
}  // namespace rlhf_fast::cuda
