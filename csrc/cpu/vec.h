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
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif
#if !defined(RLHF_FAST_VEC512) && !defined(RLHF_FAST_VEC256) && defined(__GNUC__) && !defined(__clang__)
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

// 2^(j / 16).
constexpr float kSixteenths[16] = {0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f,
                                   0x1.306fe0p+0f, 0x1.3dea64p+0f, 0x1.4bfdaep+0f, 0x1.5ab07ep+0f,
                                   0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f,
                                   0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f};

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_once(const void* p) { __builtin_prefetch(p, 0, 0); }  // for a single use

// Two vectors of consecutive memory, in whatever order is cheapest to load; storing a pair undoes it.
template <class V>
struct Pair {
  V a, b;
};

}  // namespace
}  // namespace rlhf_fast

#if defined(RLHF_FAST_VEC512)
#include "vec_avx512.h"
#elif defined(RLHF_FAST_VEC256)
#include "vec_avx2.h"
#else
#include "vec_generic.h"
#endif

namespace rlhf_fast {
namespace {

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
inline double maximum(Double a) { return a.v; }
inline double first(Double a) { return a.v; }

// The first `lanes` numbers, 0 in the other lanes. A whole vector takes no mask, nor a branch where the compiler knows
// it.
template <class T>
inline RLHF_FAST_INLINE Float load_lanes(const T* p, int lanes) {
  return lanes == kLanes ? load(p) : load(p, lanes);
}
template <class T>
inline RLHF_FAST_INLINE void store_lanes(T* p, const Float& x, int lanes) {
  lanes == kLanes ? store(p, x) : store(p, x, lanes);
}

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

// The sum of all lanes in double: lane by lane first, then the two halves of the lanes again and again.
#if !defined(RLHF_FAST_VEC512)
template <int N>
inline double sum_of(const Float (&v)[N]) {
  double t[kLanes] = {};
  float lanes[kLanes];
  for (const Float& x : v) {
    store(lanes, x);
    for (int i = 0; i < kLanes; ++i) t[i] += lanes[i];
  }
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) t[i] += t[i + half];
  return t[0];
}
#endif
template <int N>
inline double sum_of(const Double (&v)[N]) {
  double t = 0;
  for (const Double& x : v) t += x.v;
  return t;
}

inline float maximum(const Float& a) {
  float v[kLanes];
  store(v, a);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
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

// From here on results and operands below the smallest normal number count as 0: one of them costs the processor a
// hundred additions, and a row whose logits lie 90 nats apart has thousands. Returns what restore_denormals wants.
// Two functions and no destructor, which would pull in the runtime of exceptions.
inline unsigned flush_denormals() {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // FTZ and DAZ
  return before;
#else
  return 0;
#endif
}
inline void restore_denormals(unsigned before) {
#if defined(__SSE2__)
  _mm_setcsr(before);
#else
  (void)before;
#endif
}

constexpr float kExpFloor = -87.33f;  // e^kExpFloor is the smallest normal number
constexpr float kExpTop = 88.0f;
constexpr float kLargest = 3.4028234663852886e38f;

// 2^(x by) = 2^n (1 + f), as if the product were exact: n is x by rounded to sixteenths, which a table holds, and 1 + f
// is 2^r of the rest |r| <= 1/32. Three multiply-adds fewer than a polynomial over |r| <= 1/2, and those are what an
// exponential costs.
struct PowerOf2 {
  Float t, n, f;  // t holds 16 n in its low bits

  RLHF_FAST_INLINE PowerOf2(const Float& x, const Float& by) {
    const Float shifter = Float::splat(0x1.8p19f);  // rounds to a sixteenth and keeps it in the low bits
    t = fma(x, by, shifter);
    n = t - shifter;
    const Float r = fms(x, by, n);
    f = fma(Float::splat(0x1.c6b08ep-5f), r, Float::splat(0x1.ebfff0p-3f));  // minimax, relative error 2^-29
    f = r * fma(f, r, Float::splat(0x1.62e430p-1f));
  }
};

// e^(scale x), at most 1 ulp off for a scale of 24 bits in base 2; NaN for NaN.
template <class V>
struct ScaledExp;

template <>
struct ScaledExp<Float> {
  Float by, floor, top;

  explicit ScaledExp(double scale)
      : by(Float::splat(clamped(scale * 1.4426950408889634))),
        floor(Float::splat(clamped(kExpFloor / scale))),
        top(Float::splat(clamped(kExpTop / scale))) {}
  static float clamped(double x) { return static_cast<float>(x < -kLargest ? -kLargest : x > kLargest ? kLargest : x); }
  // For scale x <= 88; exactly 0 below kExpFloor. `alive`: the lanes that are not 0.
  RLHF_FAST_INLINE Float operator()(const Float& x, Mask* alive) const {
    *alive = not_less(x, floor);
    return where(*alive, of_normal(x));
  }
  // For any x, but -inf may give NaN, which saves an instruction. 0 below kExpFloor after flush_denormals; huge where
  // scale x > 88.
  RLHF_FAST_INLINE Float of_finite(const Float& x) const {
#if defined(RLHF_FAST_VEC512)
    return of_normal(x);
#else
    Mask alive;
    return (*this)(min(top, x), &alive);
#endif
  }

 private:
  // Where the result is a normal number.
  RLHF_FAST_INLINE Float of_normal(const Float& x) const {
    const PowerOf2 e(x, by);
    return power_of_2(e.t, e.n, e.f);
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
  Double of_finite(Double x) const { return {::exp(x.v * scale)}; }
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
