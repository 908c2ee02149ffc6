// Eight fp64 lanes, for scans and sums that fp32 cannot: one zmm, two ymm, or four of the compiler's own pairs. Plain
// operations without a fused multiply-add, so every instruction set gives the same bits.
#pragma once

#include "vec.h"

namespace rlhf_fast {
namespace {

constexpr int kEight = 8;

#if defined(RLHF_FAST_VEC512)

struct Eight {
  __m512d v;

  static Eight splat(double x) { return {_mm512_set1_pd(x)}; }
  static Eight load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Eight load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store(float* p) const { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
};

inline Eight operator+(Eight a, Eight b) { return {_mm512_add_pd(a.v, b.v)}; }
inline Eight operator-(Eight a, Eight b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline Eight operator*(Eight a, Eight b) { return {_mm512_mul_pd(a.v, b.v)}; }
// Lanes k to k + 7 of `low` followed by `high`.
template <int k>
inline Eight shifted(Eight low, Eight high) {
  return {_mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(high.v), _mm512_castpd_si512(low.v), k))};
}

// The lanes whose byte of `mask` is not 0, and 0 in the others.
inline Eight where(const uint8_t* mask, Eight a) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
  return {_mm512_maskz_mov_pd(static_cast<__mmask8>(_mm_test_epi8_mask(bytes, bytes)), a.v)};
}

#elif defined(RLHF_FAST_VEC256)

struct Eight {
  __m256d lo, hi;

  Eight() = default;
  Eight(__m256d low, __m256d high) : lo(low), hi(high) {}
  // Copied by halves: gcc 12 moves the struct as integers through memory.
  Eight(const Eight& x) : lo(x.lo), hi(x.hi) {}
  Eight& operator=(const Eight& x) {
    lo = x.lo;
    hi = x.hi;
    return *this;
  }
  static Eight splat(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
  static Eight load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
  static Eight load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))}; }
  void store(double* p) const {
    _mm256_storeu_pd(p, lo);
    _mm256_storeu_pd(p + 4, hi);
  }
  void store(float* p) const {
    _mm_storeu_ps(p, _mm256_cvtpd_ps(lo));
    _mm_storeu_ps(p + 4, _mm256_cvtpd_ps(hi));
  }
};

inline Eight operator+(Eight a, Eight b) { return {_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi)}; }
inline Eight operator-(Eight a, Eight b) { return {_mm256_sub_pd(a.lo, b.lo), _mm256_sub_pd(a.hi, b.hi)}; }
inline Eight operator*(Eight a, Eight b) { return {_mm256_mul_pd(a.lo, b.lo), _mm256_mul_pd(a.hi, b.hi)}; }
// Lanes k to k + 7 of `low` followed by `high`.
template <int k>
inline Eight shifted(Eight low, Eight high) {
  if constexpr (k == 4) return {low.hi, high.lo};
  const __m256d a = _mm256_permute2f128_pd(low.lo, low.hi, 0x21), b = _mm256_permute2f128_pd(low.hi, high.lo, 0x21);
  if constexpr (k == 2) return {a, b};
  static_assert(k == 1 || k == 2 || k == 4);
  return {_mm256_shuffle_pd(low.lo, a, 5), _mm256_shuffle_pd(low.hi, b, 5)};
}
// The lanes whose byte of `mask` is not 0, and 0 in the others.
inline Eight where(const uint8_t* mask, Eight a) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
  const auto four = [](__m128i x, __m256d y) {
    return _mm256_andnot_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_cvtepu8_epi64(x), _mm256_setzero_si256())),
                            y);
  };
  return {four(bytes, a.lo), four(_mm_srli_epi64(bytes, 32), a.hi)};
}

#else

typedef double Two __attribute__((vector_size(16)));

struct Eight {
  Two v[4];

  static Eight splat(double x) {
    const Two q = {x, x};
    return {{q, q, q, q}};
  }
  template <class T>
  static Eight load(const T* p) {
    const auto two = [p](int i) { return Two{static_cast<double>(p[i]), static_cast<double>(p[i + 1])}; };
    return {{two(0), two(2), two(4), two(6)}};
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < kEight; ++i) p[i] = static_cast<T>(v[i / 2][i % 2]);
  }
};

inline Eight operator+(const Eight& a, const Eight& b) {
  return {{a.v[0] + b.v[0], a.v[1] + b.v[1], a.v[2] + b.v[2], a.v[3] + b.v[3]}};
}
inline Eight operator-(const Eight& a, const Eight& b) {
  return {{a.v[0] - b.v[0], a.v[1] - b.v[1], a.v[2] - b.v[2], a.v[3] - b.v[3]}};
}
inline Eight operator*(const Eight& a, const Eight& b) {
  return {{a.v[0] * b.v[0], a.v[1] * b.v[1], a.v[2] * b.v[2], a.v[3] * b.v[3]}};
}
// Lanes k to k + 7 of `low` followed by `high`.
template <int k>
inline Eight shifted(const Eight& low, const Eight& high) {
  double lanes[2 * kEight];
  low.store(lanes);
  high.store(lanes + kEight);
  return Eight::load(lanes + k);
}
// The lanes whose byte of `mask` is not 0, and 0 in the others.
inline Eight where(const uint8_t* mask, const Eight& a) {
  double lanes[kEight];
  a.store(lanes);
  for (int i = 0; i < kEight; ++i) lanes[i] = mask[i] ? lanes[i] : 0;
  return Eight::load(lanes);
}

#endif

inline double total(const Eight& a) {
  double v[kEight];
  a.store(v);
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

}  // namespace
}  // namespace rlhf_fast
