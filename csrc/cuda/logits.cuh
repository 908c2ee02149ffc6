// Rows of logits, and what else a row of token_logprobs comes with.
#pragma once

#include "common/softmax.h"
#include "cuda/token_logprobs.h"
#include "cuda/vectors.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr float kLargest = 3.4028234663852886e38f;

// The logits of one row, soft-capped: cap * tanh(y / cap).
template <class T, bool kCap>
struct Logits {
  const T* row;
  float cap, inverse;

  __device__ __forceinline__ float tanh_of(float x) const { return tanhf(x * inverse); }
  __device__ __forceinline__ float capped(float x) const {
    if constexpr (kCap) return cap * tanh_of(x);
    return x;
  }
  __device__ __forceinline__ float one(int64_t i) const { return capped(widen(row[i])); }
  __device__ __forceinline__ float slope(int64_t i) const {
    if constexpr (!kCap) return 1;
    const float t = tanh_of(widen(row[i]));
    return 1 - t * t;
  }
};

template <bool kCap, class T, class Args>
__device__ __forceinline__ Logits<T, kCap> logits_of(const Args& a, const void* base, int64_t outer_stride,
                                                     int64_t inner_stride, int64_t i) {
  const T* row = static_cast<const T*>(base) +
                 (i < a.inner ? i * inner_stride : (i / a.inner) * outer_stride + (i % a.inner) * inner_stride);
  const float cap = static_cast<float>(a.softcap);
  return {row, cap, kCap ? 1 / cap : 0};
}

template <class Args>
__device__ __forceinline__ int64_t id_of(const Args& a, int64_t i) {
  return a.ids32 ? static_cast<const int32_t*>(a.token_ids)[i] : static_cast<const int64_t*>(a.token_ids)[i];
}

// 1 / temperature, kept finite so that 0 * scale stays 0; or NaN where the CPU kernels refuse the row.
template <class Args>
__device__ __forceinline__ double scale_of(const Args& a, int64_t i) {
  const int64_t id = id_of(a, i);
  const double temperature = a.temperature ? static_cast<double>(a.temperature[i]) : a.temperature_value;
  if (id < 0 || id >= a.vocab || !(temperature > 0) || !isfinite(temperature)) return static_cast<double>(NAN);
  const double scale = 1 / temperature, largest = static_cast<double>(kLargest);
  return scale < largest ? scale : largest;
}

// e^(scale u) as 2^(high u + low u), with scale log2(e) in two parts; u is a logit relative to another one.
//
// A row by itself takes the exponent as one rounding, d = high y - offset with `offset` the rounded high base and
// `rest` what that lost: d = high (y - base) + rest. Two rows that are compared (exact KL) take u, whose gaps keep
// their digits.
struct Exponent {
  static constexpr float kLargestOffset = 1 << 20;  // from there on the rest would not be small: d is taken from u

  float high, low;

  __device__ __forceinline__ explicit Exponent(double scale) {
    const double both = scale * 1.4426950408889634, largest = static_cast<double>(kLargest);
    high = static_cast<float>(both < largest ? both : largest);
    low = both < largest ? static_cast<float>(both - static_cast<double>(high)) : 0;
  }
  __device__ __forceinline__ bool has_offset(float base) const { return fabsf(base * high) < kLargestOffset; }
  // NaN where there is none.
  __device__ __forceinline__ float offset(float base) const {
    return has_offset(base) ? base * high : static_cast<float>(NAN);
  }
  __device__ __forceinline__ float rest(float base) const {
    return has_offset(base) ? fmaf(base, high, -(base * high)) : 0;
  }
  // Without the rounding of the product, which KL would show; NaN at -inf.
  __device__ __forceinline__ float exactly(float u) const {
    const float x = u * high, rest = fmaf(u, low, fmaf(u, high, -x)), e = exp2_of(x);
    return fmaf(e, rest * 0.69314718f, e);
  }
  __device__ __forceinline__ float exactly_or_0(float u) const { return u * high == -INFINITY ? 0 : exactly(u); }
};

}  // namespace
}  // namespace rlhf_fast::cuda
