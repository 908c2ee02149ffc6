// The vectors of vec.h in one zmm register. Included by vec.h alone.
#pragma once

namespace rlhf_fast {
namespace {

struct Mask {
  __mmask16 m;
};

struct Float {
  using Scalar = float;
  using Mask = rlhf_fast::Mask;
  static constexpr int width = kLanes;
  __m512 v;
  static Float splat(float x) { return {_mm512_set1_ps(x)}; }
};

inline Float operator+(Float a, Float b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Float operator-(Float a, Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Float operator*(Float a, Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Float operator/(Float a, Float b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Float fma(Float a, Float b, Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Float fms(Float a, Float b, Float c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline Float max(Float a, Float b) { return {_mm512_max_ps(a.v, b.v)}; }  // b when either is NaN
inline Float abs(Float a) { return {_mm512_abs_ps(a.v)}; }
inline Float copysign(Float a, Float s) {
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  return {
      _mm512_castsi512_ps(_mm512_ternarylogic_epi32(sign, _mm512_castps_si512(s.v), _mm512_castps_si512(a.v), 0xca))};
}
inline Mask not_less(Float a, Float b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)}; }
inline Float select(Mask m, Float a, Float b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
inline Float where(Mask m, Float a) { return {_mm512_maskz_mov_ps(m.m, a.v)}; }
inline Float fma_where(Mask m, Float a, Float b, Float c) { return {_mm512_mask3_fmadd_ps(a.v, b.v, c.v, m.m)}; }
inline Mask first_lanes(int n) { return {static_cast<__mmask16>((1u << n) - 1)}; }
inline Float times_power_of_2(Mask m, Float a, Float, Float n) { return {_mm512_maskz_scalef_ps(m.m, a.v, n.v)}; }
// 2^n (1 + f) for n in sixteenths, 16 n being in the low bits of t; NaN where 2^n is too large. No product of 2^n
// alone, which may be too small where the result is not.
inline Float power_of_2(Float t, Float n, Float f) {
  const __m512 entry = _mm512_permutexvar_ps(_mm512_castps_si512(t.v), _mm512_loadu_ps(kSixteenths));
  const __m512 p = _mm512_scalef_ps(entry, n.v);
  return {_mm512_fmadd_ps(p, f.v, p)};
}

template <int N>
inline double sum_of(const Float (&v)[N]) {
  __m512d lo = _mm512_setzero_pd(), hi = lo;
  for (const Float& x : v) {
    lo = _mm512_add_pd(lo, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    hi = _mm512_add_pd(hi, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
  }
  lo = _mm512_add_pd(lo, hi);
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(lo), _mm512_extractf64x4_pd(lo, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

inline Float load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Float load(const BFloat16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline Float load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Float load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n).m, p)}; }
inline Float load(const BFloat16* p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16(first_lanes(n).m, p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline Float load(const Float16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n).m, p))}; }

// The bf16 nearest to each lane in its upper 16 bits; the lower ones are noise. A NaN that arithmetic made stays one:
// its payload has room for the carry.
inline __m512i rounded(Float a) {
  const __m512i b = _mm512_castps_si512(a.v), half = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(half, _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000)), half, _mm512_set1_epi32(1));
}
inline __m256i pack(Float a, BFloat16*) {
#if defined(RLHF_FAST_ISA_AVX512BF16)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(a), 16));
#endif
}
inline __m256i pack(Float a, Float16*) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store(float* p, Float a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Float a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n).m, a.v); }
inline void stream(float* p, Float a) { _mm512_stream_ps(p, a.v); }
template <class T>
inline void store(T* p, Float a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack(a, p));
}
template <class T>
inline void store(T* p, Float a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n).m, pack(a, p));
}
template <class T>
inline void stream(T* p, Float a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack(a, p));
}

// 32 bf16: the even ones and the odd ones, which need no shuffle.
inline Pair<Float> load_pair(const BFloat16* p) {
  const __m512i w = _mm512_loadu_si512(p), odd = _mm512_and_si512(w, _mm512_set1_epi32(~0xffff));
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))}, {_mm512_castsi512_ps(odd)}};
}
inline __m512i pack_pair(const Pair<Float>& x) {
#if defined(RLHF_FAST_ISA_AVX512BF16)
  alignas(64) constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x.b.v, x.a.v));
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
#else
  const __m512i even = _mm512_srli_epi32(rounded(x.a), 16), keep = _mm512_set1_epi32(~0xffff);
  return _mm512_ternarylogic_epi32(keep, rounded(x.b), even, 0xca);
#endif
}
inline void store_pair(BFloat16* p, const Pair<Float>& x) { _mm512_storeu_si512(p, pack_pair(x)); }
inline void stream_pair(BFloat16* p, const Pair<Float>& x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack_pair(x));
}

}  // namespace
}  // namespace rlhf_fast
