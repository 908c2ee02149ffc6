// The vectors of vec.h in two ymm registers. Included by vec.h alone.
#pragma once

namespace rlhf_fast {
namespace {

struct Mask {
  __m256 lo, hi;
};

struct Float {
  using Scalar = float;
  using Mask = rlhf_fast::Mask;
  static constexpr int width = kLanes;
  __m256 lo, hi;
  static Float splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
};

inline Float operator+(Float a, Float b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Float operator-(Float a, Float b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Float operator*(Float a, Float b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Float operator/(Float a, Float b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Float fma(Float a, Float b, Float c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Float fms(Float a, Float b, Float c) {
  return {_mm256_fmsub_ps(a.lo, b.lo, c.lo), _mm256_fmsub_ps(a.hi, b.hi, c.hi)};
}
inline Float max(Float a, Float b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}  // b when either is NaN
inline Float min(Float a, Float b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }  // the same
inline Float abs(Float a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Float copysign(Float a, Float s) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, a.lo), _mm256_and_ps(sign, s.lo)),
          _mm256_or_ps(_mm256_andnot_ps(sign, a.hi), _mm256_and_ps(sign, s.hi))};
}
inline Mask not_less(Float a, Float b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ)};
}
inline Float select(Mask m, Float a, Float b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
inline Float where(Mask m, Float a) { return {_mm256_and_ps(m.lo, a.lo), _mm256_and_ps(m.hi, a.hi)}; }
inline Float fma_where(Mask m, Float a, Float b, Float c) { return select(m, fma(a, b, c), c); }
inline Mask first_lanes(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), count = _mm256_set1_epi32(n);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(count, lane)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_sub_epi32(count, _mm256_set1_epi32(8)), lane))};
}
// a 2^n where m, else 0; t = n + 1.5 * 2^23, whose low bits are the integer.
inline Float times_power_of_2(Mask m, Float a, Float t, Float) {
  const auto half = [](__m256 x, __m256 y) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(y), 23)));
  };
  return where(m, {half(a.lo, t.lo), half(a.hi, t.hi)});
}
// 2^n (1 + f) for n in sixteenths, 16 n being in the low bits of t; noise where 2^n is not a normal number.
inline Float power_of_2(Float t, Float, Float f) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto entries = [&](int i) RLHF_FAST_INLINE {  // less the bits that 16 n << 19 has below the exponent
    const __m256i fraction = _mm256_slli_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(i)), 19);
    return _mm256_sub_epi32(_mm256_castps_si256(_mm256_loadu_ps(kSixteenths + i)), fraction);
  };
  const __m256i low = entries(0), high = entries(8);
  const auto half = [&](__m256 x) RLHF_FAST_INLINE {
    const __m256i i = _mm256_castps_si256(x);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    const __m256 entry = _mm256_blendv_ps(_mm256_castsi256_ps(_mm256_permutevar8x32_epi32(low, i)),
                                          _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(high, i)), upper);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(entry), _mm256_slli_epi32(i, 19)));
  };
  const Float p = {half(t.lo), half(t.hi)};
  return fma(p, f, p);
}

inline Float load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Float load(const BFloat16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(h)),
                hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
inline Float load(const Float16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
template <class T>
inline Float load(const T* p, int n) {
  T lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

// The bf16 nearest to each lane in its upper 16 bits; the lower ones are noise. A NaN that arithmetic made stays one:
// its payload has room for the carry.
inline __m256i rounded(__m256 v) {
  const __m256i b = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
inline __m256i pack(Float a, BFloat16*) {
  const __m256i lo = _mm256_srli_epi32(rounded(a.lo), 16), hi = _mm256_srli_epi32(rounded(a.hi), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
}
inline __m256i pack(Float a, Float16*) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(a.lo, mode)), _mm256_cvtps_ph(a.hi, mode), 1);
}

inline void store(float* p, Float a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void stream(float* p, Float a) {
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
template <class T>
inline void store(T* p, Float a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack(a, p));
}
template <class T>
inline void stream(T* p, Float a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack(a, p));
}
template <class T>
inline void store(T* p, Float a, int n) {
  T lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// 32 bf16: the even ones and the odd ones, which need no shuffle.
inline Pair<Float> load_pair(const BFloat16* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  const __m256i u = _mm256_loadu_si256(q), w = _mm256_loadu_si256(q + 1), odd = _mm256_set1_epi32(~0xffff);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(u, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(w, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(u, odd)), _mm256_castsi256_ps(_mm256_and_si256(w, odd))}};
}
inline __m256i interleaved(__m256 even, __m256 odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xaa);
}
inline void store_pair(BFloat16* p, const Pair<Float>& x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), interleaved(x.a.lo, x.b.lo));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, interleaved(x.a.hi, x.b.hi));
}
inline void stream_pair(BFloat16* p, const Pair<Float>& x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), interleaved(x.a.lo, x.b.lo));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, interleaved(x.a.hi, x.b.hi));
}

}  // namespace
}  // namespace rlhf_fast
