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

template <class T>
__device__ __forceinline__ void unpack(const unsigned (&words)[4], float* y) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(T) == 4) {
      y[k] = float_of(words[k]);
    } else {
      y[2 * k] = widen(T{static_cast<uint16_t>(words[k])});
      y[2 * k + 1] = widen(T{static_cast<uint16_t>(words[k] >> 16)});
    }
  }
}
template <>
__device__ __forceinline__ void unpack<BFloat16>(const unsigned (&words)[4], float* y) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    y[2 * k] = float_of(words[k] << 16);
    y[2 * k + 1] = float_of(words[k] & 0xffff0000u);
  }
}

// The kLanes<T> elements from p on. Rows that do not begin at a multiple of 16 bytes, as those of an odd vocabulary,
// are read by the two vectors that hold the elements, which are then shifted into place: so the elements that a thread
// adds up do not depend on where the row begins, and the second vector is the neighbour's first. What the two hold
// beyond the elements is the caller's to allow.
template <int kShift, class T>
__device__ __forceinline__ void load_vector(const T* p, float* y) {
  unsigned out[4];
  if constexpr (kShift == kAligned) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
  } else {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    const uint4* from = reinterpret_cast<const uint4*>(address & ~static_cast<uintptr_t>(15));
    const uint4 a = __ldg(from), b = __ldg(from + 1);
    unsigned w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    const unsigned bits = static_cast<unsigned>(address & 2) * 8;  // half a word
    int shift = kShift;
    if constexpr (kShift == kAnyShift) {
      if (address & 8) {
#pragma unroll
        for (int k = 0; k < 6; ++k) w[k] = w[k + 2];
      }
      if (address & 4) {
#pragma unroll
        for (int k = 0; k < 5; ++k) w[k] = w[k + 1];
      }
      shift = 0;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if constexpr (sizeof(T) == 4)
        out[k] = w[k + shift];
      else
        out[k] = __funnelshift_r(w[k + shift], w[k + shift + 1], bits);
    }
  }
  unpack<T>(out, y);
}

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
