// The vocabulary of the SIMD kernels: 16 fp32 lanes on every instruction set (one zmm, two ymm, or an array), so that
// sums are ordered alike everywhere; and one fp64 lane with the same names. AVX2 and AVX-512 give the same bits. The
// scalar variant has no fused multiply-add and differs in the last place.
//
// Everything has internal linkage: an inline function compiled for AVX-512 must never be the copy the linker keeps for
// all.
#pragma once

#include <math.h>
#include <stdint.h>

#include "common/dtype.h"
#if defined(RLHF_FAST_ISA_AVX512) || defined(RLHF_FAST_ISA_AVX512BF16)
#define RLHF_FAST_VEC512
#elif defined(RLHF_FAST_ISA_AVX2)
#define RLHF_FAST_VEC256
#endif
#if defined(RLHF_FAST_VEC512) || defined(RLHF_FAST_VEC256)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc bug 105593: its own undefined operands
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // nothing here crosses an ABI
#endif

#define RLHF_FAST_INLINE __attribute__((always_inline))

namespace rlhf_fast {
namespace {

constexpr int kLanes = 16;
#if defined(RLHF_FAST_VEC512) || defined(RLHF_FAST_VEC256)
constexpr bool kRegisters = true;  // a vector lives in registers; otherwise it is an array
#else
constexpr bool kRegisters = false;
#endif

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Two vectors of consecutive memory, in whatever order is cheapest to load; storing a pair undoes it.
template <class V>
struct Pair {
  V a, b;
};

#if defined(RLHF_FAST_VEC512)

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

// The bf16 nearest to each lane in its upper 16 bits; the lower ones are noise.
inline __m512i rounded(Float a) {
  const __m512i b = _mm512_castps_si512(a.v), half = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
  const __m512i up =
      _mm512_mask_add_epi32(half, _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000)), half, _mm512_set1_epi32(1));
  return _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), b, _mm512_set1_epi32(0x400000));
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
  const auto bits = [](Float a) { return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v))); };
  return _mm512_or_si512(bits(x.a), _mm512_slli_epi32(bits(x.b), 16));
#else
  const __m512i even = _mm512_srli_epi32(rounded(x.a), 16), keep = _mm512_set1_epi32(~0xffff);
  return _mm512_ternarylogic_epi32(keep, rounded(x.b), even, 0xca);
#endif
}
inline void store_pair(BFloat16* p, const Pair<Float>& x) { _mm512_storeu_si512(p, pack_pair(x)); }
inline void stream_pair(BFloat16* p, const Pair<Float>& x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack_pair(x));
}

#elif defined(RLHF_FAST_VEC256)

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

// The bf16 nearest to each lane in its upper 16 bits; the lower ones are noise.
inline __m256i rounded(__m256 v) {
  const __m256i b = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
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

#else

// Four of the compiler's own vectors, which it maps to the baseline (SSE2, NEON).
typedef float QuadF __attribute__((vector_size(16)));
typedef int32_t QuadI __attribute__((vector_size(16)));

struct Mask {
  QuadI m[4];  // all ones or all zeros
};

struct Float {
  using Scalar = float;
  using Mask = rlhf_fast::Mask;
  static constexpr int width = kLanes;
  QuadF v[4];
  static Float splat(float x) {
    const QuadF q = {x, x, x, x};
    return {{q, q, q, q}};
  }
};

inline QuadI bits(QuadF x) { return reinterpret_cast<QuadI>(x); }
inline QuadF number(QuadI x) { return reinterpret_cast<QuadF>(x); }

template <class R = Float, class F>
inline RLHF_FAST_INLINE R quads(const F& f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline Float operator+(const Float& a, const Float& b) {
  return quads([&](int i) { return a.v[i] + b.v[i]; });
}
inline Float operator-(const Float& a, const Float& b) {
  return quads([&](int i) { return a.v[i] - b.v[i]; });
}
inline Float operator*(const Float& a, const Float& b) {
  return quads([&](int i) { return a.v[i] * b.v[i]; });
}
inline Float operator/(const Float& a, const Float& b) {
  return quads([&](int i) { return a.v[i] / b.v[i]; });
}
inline Float fma(const Float& a, const Float& b, const Float& c) {
  return quads([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Float fms(const Float& a, const Float& b, const Float& c) {
  return quads([&](int i) { return a.v[i] * b.v[i] - c.v[i]; });
}
inline Float select(const Mask& m, const Float& a, const Float& b) {
  return quads([&](int i) { return number((bits(a.v[i]) & m.m[i]) | (bits(b.v[i]) & ~m.m[i])); });
}
inline Float where(const Mask& m, const Float& a) {
  return quads([&](int i) { return number(bits(a.v[i]) & m.m[i]); });
}
inline Float max(const Float& a, const Float& b) {  // b when either is NaN
  return select(quads<Mask>([&](int i) { return a.v[i] > b.v[i]; }), a, b);
}
inline Float abs(const Float& a) {
  return quads([&](int i) { return number(bits(a.v[i]) & INT32_MAX); });
}
inline Float copysign(const Float& a, const Float& s) {
  return quads([&](int i) { return number((bits(a.v[i]) & INT32_MAX) | (bits(s.v[i]) & INT32_MIN)); });
}
inline Mask not_less(const Float& a, const Float& b) {
  return quads<Mask>([&](int i) { return ~(a.v[i] < b.v[i]); });
}
inline Float fma_where(const Mask& m, const Float& a, const Float& b, const Float& c) {
  return select(m, fma(a, b, c), c);
}
inline Mask first_lanes(int n) {
  return quads<Mask>([&](int i) { return QuadI{0, 1, 2, 3} + 4 * i < n; });
}
// a 2^n where m, else 0; t = n + 1.5 * 2^23, whose low bits are the integer.
inline Float times_power_of_2(const Mask& m, const Float& a, const Float& t, const Float&) {
  return quads([&](int i) { return number((bits(a.v[i]) + (bits(t.v[i]) << 23)) & m.m[i]); });
}

inline Float load(const float* p) {
  Float r;
  __builtin_memcpy(&r, p, sizeof(r));
  return r;
}
inline void store(float* p, const Float& a) { __builtin_memcpy(p, &a, sizeof(a)); }
template <class T>
__attribute__((noinline)) Float load(const T* p, int n = kLanes) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = widen(p[i]);
  return load(lanes);
}
template <class T>
__attribute__((noinline)) void store(T* p, const Float& a, int n = kLanes) {
  float lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) p[i] = narrow<T>(lanes[i]);
}
template <class T>
inline void stream(T* p, const Float& a) {
  store(p, a);
}

// 32 bf16: the even ones and the odd ones, as on the other instruction sets (little endian).
inline Pair<Float> load_pair(const BFloat16* p) {
  QuadI w[4];
  __builtin_memcpy(&w, p, sizeof(w));
  return {quads([&](int i) { return number(w[i] << 16); }), quads([&](int i) { return number(w[i] & ~0xffff); })};
}
__attribute__((noinline)) void store_pair(BFloat16* p, const Pair<Float>& x) {
  float even[kLanes], odd[kLanes];
  store(even, x.a);
  store(odd, x.b);
  for (int i = 0; i < kLanes; ++i) {
    p[2 * i] = narrow<BFloat16>(even[i]);
    p[2 * i + 1] = narrow<BFloat16>(odd[i]);
  }
}
inline void stream_pair(BFloat16* p, const Pair<Float>& x) { store_pair(p, x); }

#endif

// One fp64 lane. No fused multiply-add: every instruction set gives the same bits.
struct Flag {
  bool m;
};

struct Double {
  using Scalar = double;
  using Mask = Flag;
  static constexpr int width = 1;
  double v;
  static Double splat(double x) { return {x}; }
};

inline Double operator+(Double a, Double b) { return {a.v + b.v}; }
inline Double operator-(Double a, Double b) { return {a.v - b.v}; }
inline Double operator*(Double a, Double b) { return {a.v * b.v}; }
inline Double fma(Double a, Double b, Double c) { return {a.v * b.v + c.v}; }
inline Double max(Double a, Double b) { return {a.v > b.v ? a.v : b.v}; }
inline Double select(Flag m, Double a, Double b) { return m.m ? a : b; }
inline Double where(Flag m, Double a) { return {m.m ? a.v : 0.0}; }
inline Double fma_where(Flag m, Double a, Double b, Double c) { return m.m ? fma(a, b, c) : c; }
inline Double load(const double* p) { return {*p}; }
inline Double load(const double* p, int) { return {*p}; }
inline void store(double* p, Double a) { *p = a.v; }
inline void store(double* p, Double a, int) { *p = a.v; }
inline void stream(double* p, Double a) { *p = a.v; }
inline double sum(Double a) { return a.v; }
inline double maximum(Double a) { return a.v; }
inline double first(Double a) { return a.v; }

template <class T>
inline auto load_pair(const T* p) {
  using V = decltype(load(p));
  return Pair<V>{load(p), load(p + V::width)};
}
template <class T, class V>
inline void store_pair(T* p, const Pair<V>& x) {
  store(p, x.a);
  store(p + V::width, x.b);
}
template <class T, class V>
inline void stream_pair(T* p, const Pair<V>& x) {
  stream(p, x.a);
  stream(p + V::width, x.b);
}

// Raises *up to the largest as int16, lowers *down to the smallest as uint16.
inline void largest_bits(const uint16_t* p, int64_t n, int16_t* up, uint16_t* down) {
  int16_t u = *up;
  uint16_t d = *down;
  int64_t i = 0;
#if defined(RLHF_FAST_VEC512)
  if (n >= 64) {
    __m512i u0 = _mm512_loadu_si512(p), u1 = u0, d0 = u0, d1 = u0;
    const auto take = [&](const uint16_t* q) RLHF_FAST_INLINE {
      const __m512i x = _mm512_loadu_si512(q), y = _mm512_loadu_si512(q + 32);
      u0 = _mm512_max_epi16(u0, x);
      u1 = _mm512_max_epi16(u1, y);
      d0 = _mm512_min_epu16(d0, x);
      d1 = _mm512_min_epu16(d1, y);
    };
    for (; i + 64 <= n; i += 64) take(p + i);
    take(p + n - 64);
    alignas(64) uint16_t lanes[64];
    _mm512_store_si512(lanes, _mm512_max_epi16(u0, u1));
    _mm512_store_si512(lanes + 32, _mm512_min_epu16(d0, d1));
    for (int k = 0; k < 32; ++k) {
      u = static_cast<int16_t>(lanes[k]) > u ? static_cast<int16_t>(lanes[k]) : u;
      d = lanes[32 + k] < d ? lanes[32 + k] : d;
    }
    i = n;
  }
#endif
  for (; i < n; ++i) {  // the compiler turns this into packed integer instructions
    u = static_cast<int16_t>(p[i]) > u ? static_cast<int16_t>(p[i]) : u;
    d = p[i] < d ? p[i] : d;
  }
  *up = u;
  *down = d;
}

// `a` in the first n lanes, -inf in the others.
inline Float pad(const Float& a, int n) { return select(first_lanes(n), a, Float::splat(-INFINITY)); }
inline Double pad(Double a, int) { return a; }

// t[i] += lane i.
inline void add_lanes(const Float& a, double (&t)[kLanes]) {
  float v[kLanes];
  store(v, a);
  for (int i = 0; i < kLanes; ++i) t[i] += v[i];
}
inline void add_lanes(Double a, double (&t)[1]) { t[0] += a.v; }

// Folds lane i with lane i + 8, then + 4, + 2, + 1: the same order, and bits, on every instruction set.
template <class F>
inline RLHF_FAST_INLINE float fold(Float a, F f) {
  float v[kLanes];
  store(v, a);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = f(v[i], v[i + half]);
  return v[0];
}
inline float sum(Float a) {
  return fold(a, [](float x, float y) { return x + y; });
}
inline float maximum(Float a) {
  return fold(a, [](float x, float y) { return x > y ? x : y; });
}
inline float first(const Float& a) {
  float v[kLanes];
  store(v, a);
  return v[0];
}

// Largest of n > 0 numbers; NaN may be passed over. The last vector overlaps the one before: a maximum does not mind.
template <class V>
inline typename V::Scalar largest(const typename V::Scalar* p, int64_t n) {
  constexpr int64_t W = V::width;
  typename V::Scalar m = p[0];
  if (n < W) {
    for (int64_t i = 1; i < n; ++i) m = p[i] > m ? p[i] : m;
    return m;
  }
  V a = load(p), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = max(load(p + i), a);
    b = max(load(p + i + W), b);
    c = max(load(p + i + 2 * W), c);
    d = max(load(p + i + 3 * W), d);
  }
  for (; i + W <= n; i += W) a = max(load(p + i), a);
  b = max(load(p + n - W), b);
  return maximum(max(max(a, b), max(c, d)));
}

// 16-bit floats order like signed integers when positive and against unsigned ones when negative, so two integer passes
// find the largest without widening.
template <class V, class T>
inline float largest(const T* p, int64_t n) {
  int16_t up = INT16_MIN;
  uint16_t down = UINT16_MAX;
  largest_bits(reinterpret_cast<const uint16_t*>(p), n, &up, &down);
  return widen(T{up >= 0 ? static_cast<uint16_t>(up) : down});
}

// Orders streaming stores before what other threads see of this one.
inline void fence() {
#if defined(RLHF_FAST_VEC512) || defined(RLHF_FAST_VEC256)
  _mm_sfence();
#endif
}

constexpr float kExpFloor = -87.33f;  // e^kExpFloor is the smallest normal number
constexpr float kLargest = 3.4028234663852886e38f;

// 2^(x by) for -126 <= x by <= 127, rounded as if the product were exact; 0 outside of `alive`.
inline RLHF_FAST_INLINE Float exp2_of_product(const Float& x, const Float& by, const Mask& alive) {
  const Float shifter = Float::splat(0x1.8p23f);  // rounds to an integer and keeps it in the low bits
  const Float t = fma(x, by, shifter), n = t - shifter;
  const Float r = fms(x, by, n);
  Float p = Float::splat(0x1.3eb2d8p-13f);  // minimax on |r| <= 1/2, relative error 2^-28
  p = fma(p, r, Float::splat(0x1.5f0b8ep-10f));
  p = fma(p, r, Float::splat(0x1.3b320ap-7f));
  p = fma(p, r, Float::splat(0x1.c6af76p-5f));
  p = fma(p, r, Float::splat(0x1.ebfbd6p-3f));
  p = fma(p, r, Float::splat(0x1.62e430p-1f));
  p = fma(p, r, Float::splat(1.0f));
  return times_power_of_2(alive, p, t, n);
}

// e^(scale x) for scale x <= 88, at most 1 ulp off for a scale of 24 bits in base 2; exactly 0 below kExpFloor; NaN for
// NaN. `alive`: the lanes that are not 0.
template <class V>
struct ScaledExp;

template <>
struct ScaledExp<Float> {
  Float by, floor;

  explicit ScaledExp(double scale)
      : by(Float::splat(clamped(scale * 1.4426950408889634))), floor(Float::splat(clamped(kExpFloor / scale))) {}
  static float clamped(double x) { return static_cast<float>(x < -kLargest ? -kLargest : x > kLargest ? kLargest : x); }
  RLHF_FAST_INLINE Float operator()(const Float& x, Mask* alive) const {
    *alive = not_less(x, floor);
    return exp2_of_product(x, by, *alive);
  }
};

template <>
struct ScaledExp<Double> {
  double scale;

  explicit ScaledExp(double s) : scale(s) {}
  Double operator()(Double x, Flag* alive) const {
    const double e = ::exp(x.v * scale);
    *alive = {!(e == 0)};
    return {e};
  }
};

// e^x for x <= 88, at most 1 ulp off; 0 below kExpFloor.
inline RLHF_FAST_INLINE Float exp(const Float& x) {
  const Float shifter = Float::splat(0x1.8p23f);  // rounds to an integer and keeps it in the low bits
  const Float t = fma(x, Float::splat(0x1.715476p0f), shifter);
  const Float n = t - shifter;
  Float r = fma(n, Float::splat(-0x1.62e4p-1f), x);  // ln 2 in two parts; the first has 15 bits, so n times it is exact
  r = fma(n, Float::splat(-0x1.7f7d1cp-20f), r);
  Float p = Float::splat(0x1.6a23d0p-10f);  // minimax on |r| <= ln(2)/2, relative error 2^-28
  p = fma(p, r, Float::splat(0x1.123a20p-7f));
  p = fma(p, r, Float::splat(0x1.5558f2p-5f));
  p = fma(p, r, Float::splat(0x1.555492p-3f));
  p = fma(p, r, Float::splat(0x1.fffffcp-2f));
  p = fma(p, r, Float::splat(1.0f));
  p = fma(p, r, Float::splat(1.0f));
  return times_power_of_2(not_less(x, Float::splat(kExpFloor)), p, t, n);
}

inline RLHF_FAST_INLINE Float tanh(const Float& x) {
  const Float a = abs(x), square = x * x;
  const Float e = exp(Float::splat(-2.0f) * a);
  const Float far = (Float::splat(1.0f) - e) / (Float::splat(1.0f) + e);
  Float p = Float::splat(-5.70498872745e-3f);  // Cephes tanhf
  p = fma(p, square, Float::splat(2.06390887954e-2f));
  p = fma(p, square, Float::splat(-5.37397155531e-2f));
  p = fma(p, square, Float::splat(1.33314422036e-1f));
  p = fma(p, square, Float::splat(-3.33332819422e-1f));
  const Float near = fma(p * square, x, x);
  return select(not_less(a, Float::splat(0.625f)), copysign(far, x), near);
}

inline Double tanh(Double x) { return {::tanh(x.v)}; }

}  // namespace
}  // namespace rlhf_fast
