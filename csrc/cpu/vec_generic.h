// The vectors of vec.h without SIMD intrinsics. Included by vec.h alone.
#pragma once

namespace rlhf_fast {
namespace {

// Four of the compiler's own vectors, which it maps to the baseline (SSE2, NEON).
typedef float QuadF __attribute__((vector_size(16)));
typedef int32_t QuadI __attribute__((vector_size(16)));
typedef double QuadD __attribute__((vector_size(32)));

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
// In double, where the product is exact: the rest of an argument of exp is the small difference of two large numbers.
inline Float fms(const Float& a, const Float& b, const Float& c) {
  return quads([&](int i) {
    const auto wide = [](QuadF x) { return __builtin_convertvector(x, QuadD); };
    return __builtin_convertvector(wide(a.v[i]) * wide(b.v[i]) - wide(c.v[i]), QuadF);
  });
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
inline Float min(const Float& a, const Float& b) {  // the same
  return select(quads<Mask>([&](int i) { return a.v[i] < b.v[i]; }), a, b);
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
// 2^n (1 + f) for n in sixteenths, 16 n being in the low bits of t; noise where 2^n is not a normal number.
inline Float power_of_2(const Float& t, const Float&, const Float& f) {
  return quads([&](int i) {
    const QuadI n = bits(t.v[i]), j = n & 15;
    const QuadF entry = {kSixteenths[j[0]], kSixteenths[j[1]], kSixteenths[j[2]], kSixteenths[j[3]]};
    return number(bits(entry + entry * f.v[i]) + (n >> 4 << 23));
  });
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

}  // namespace
}  // namespace rlhf_fast
