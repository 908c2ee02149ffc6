// Storage formats of tensors, and their conversion on any host or device.
#pragma once

#include "common/portable.h"

namespace rlhf_fast {

// The codes Python passes (rlhf_fast/_native.py, DTYPES).
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

RLHF_FAST_HD inline uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t b;
  __builtin_memcpy(&b, &x, 4);
  return b;
#endif
}

RLHF_FAST_HD inline float float_of(uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(b);
#else
  float x;
  __builtin_memcpy(&x, &b, 4);
  return x;
#endif
}

RLHF_FAST_HD inline float widen(float x) { return x; }
RLHF_FAST_HD inline double widen(double x) { return x; }
RLHF_FAST_HD inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

RLHF_FAST_HD inline float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0));
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
#endif
}

// Round to nearest, ties to even; a NaN stays a NaN.
template <class To>
RLHF_FAST_HD To narrow(double x) {
  return static_cast<To>(x);
}

template <>
RLHF_FAST_HD inline BFloat16 narrow<BFloat16>(double x) {
  const uint32_t b = bits_of(static_cast<float>(x));
  if ((b & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((b >> 16) | 0x40)};
  return {static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16)};
}

template <>
RLHF_FAST_HD inline Float16 narrow<Float16>(double x) {
  const uint32_t all = bits_of(static_cast<float>(x)), sign = (all >> 16) & 0x8000u, b = all & 0x7fffffffu;
  uint32_t h;
  if (b > 0x7f800000u) {
    h = 0x7e00;
  } else if (b >= 0x477ff000u) {  // 65520 and up round to infinity
    h = 0x7c00;
  } else if (b < 0x38800000u) {  // below 2^-14: the spacing at 0.5 is that of the subnormals
    h = bits_of(float_of(b) + 0.5f) - bits_of(0.5f);
  } else {
    h = (b - (112u << 23) + 0xfff + ((b >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | h)};
}

}  // namespace
}  // namespace rlhf_fast
