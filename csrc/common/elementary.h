// exp and its relatives for float and double, host and device. On the host they are plain arithmetic without branches
// or calls, so that the loops around them vectorise, and without contraction, so that every instruction set gives the
// same bits.
#pragma once

#include "common/portable.h"

namespace rlhf_fast {
namespace {

template <class To, class From>
RLHF_FAST_INLINE_HD To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// x = k ln 2 + r with |r| <= ln(2) / 2 (Cody-Waite), so that e^x = 2^k (1 + r + excess). Half of 2^k is kept, which
// does not overflow at k = 128, and half of k ln 2, in two parts.
struct ReducedExp {
  float high, low, r, excess, half;
};

RLHF_FAST_INLINE_HD ReducedExp reduced_exp(float x) {
  const float magic = 0x1.8p23f;
  const float shifted = x * 0x1.715476p0f + magic, k = shifted - magic;
  const float high = k * 0x1.63p-2f, low = k * -0x1.bd0106p-14f;  // the first is exact
  const float r = (x - (high + high)) - (low + low);
  float q = 0x1.6c6a48p-10f;  // (e^r - 1 - r) / r^2, minimax, relative error 1.3e-7
  q = q * r + 0x1.120a1cp-7f;
  q = q * r + 0x1.55557ap-5f;
  q = q * r + 0x1.5554dep-3f;
  q = q * r + 0.5f;
  return {high, low, r, q * (r * r), bits_as<float>((bits_as<int32_t>(shifted) + 126) << 23)};
}

// At most 1.03 ulp off; results below 2^-124 (2^-1020) are flushed to 0.
RLHF_FAST_INLINE_HD float exp_of(float x) {
  const ReducedExp e = reduced_exp(x);
  const float y = (e.excess + e.r + 1.0f) * e.half * 2.0f, low = x < -86.0f ? 0.0f : y;
  return x > 0x1.62e42ep6f ? INFINITY : low;
}

RLHF_FAST_INLINE_HD double exp_of(double x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  const double magic = 0x1.8p52;
  const double shifted = x * 0x1.71547652b82fep0 + magic, k = shifted - magic;
  const double r = (x - k * 0x1.62e42fee00000p-1) - k * 0x1.a39ef35793c76p-33;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const double y = p * bits_as<double>((bits_as<int64_t>(shifted) + 1022) << 52) * 2.0;
  const double low = x < -707.0 ? 0.0 : y;
  return x > 0x1.62e42fefa39efp9 ? static_cast<double>(INFINITY) : low;
#endif
}

// log(1 + x) for 0 <= x <= 1: x times a minimax polynomial; at most 2 ulp off.
RLHF_FAST_INLINE_HD float log1p_of(float x) {
  float q = 0.00523267397f;
  q = q * x - 0.02950516366f;
  q = q * x + 0.07822584363f;
  q = q * x - 0.1366323832f;
  q = q * x + 0.1910600443f;
  q = q * x - 0.2484298207f;
  q = q * x + 0.3331909688f;
  q = q * x - 0.4999949315f;
  q = q * x + 0.9999999699f;
  return q * x;
}

// The same: 2 artanh(z) with z = x / (2 + x) <= 1/3, by its series; relative error below 2^-51.
RLHF_FAST_INLINE_HD double log1p_of(double x) {
  const double z = x / (2 + x), square = z * z;
  double s = 1.0 / 35;
  s = s * square + 1.0 / 33;
  s = s * square + 1.0 / 31;
  s = s * square + 1.0 / 29;
  s = s * square + 1.0 / 27;
  s = s * square + 1.0 / 25;
  s = s * square + 1.0 / 23;
  s = s * square + 1.0 / 21;
  s = s * square + 1.0 / 19;
  s = s * square + 1.0 / 17;
  s = s * square + 1.0 / 15;
  s = s * square + 1.0 / 13;
  s = s * square + 1.0 / 11;
  s = s * square + 1.0 / 9;
  s = s * square + 1.0 / 7;
  s = s * square + 1.0 / 5;
  s = s * square + 1.0 / 3;
  return 2 * z + 2 * z * (square * s);
}

// e^x - 1 - x, which cancels near 0: (2^k - 1 - k ln 2) + (2^k - 1) r + 2^k excess with the terms of e^x, at most 3e-7
// off relative to the result.
RLHF_FAST_INLINE_HD float k3_of(float x) {
  const ReducedExp e = reduced_exp(x);
  const float t = e.half - 0.5f, y = (((t - e.high) - e.low) + t * e.r + e.half * e.excess) * 2.0f;
  const float low = x < -86.0f ? -1.0f - x : y;
  return x > 0x1.62e42ep6f ? INFINITY : low;
}

// The same with a series below |x| = 1.
RLHF_FAST_INLINE_HD double k3_of(double x) {
  double s = 1.0 / 355687428096000.0;
  s = s * x + 1.0 / 20922789888000.0;
  s = s * x + 1.0 / 1307674368000.0;
  s = s * x + 1.0 / 87178291200.0;
  s = s * x + 1.0 / 6227020800.0;
  s = s * x + 1.0 / 479001600;
  s = s * x + 1.0 / 39916800;
  s = s * x + 1.0 / 3628800;
  s = s * x + 1.0 / 362880;
  s = s * x + 1.0 / 40320;
  s = s * x + 1.0 / 5040;
  s = s * x + 1.0 / 720;
  s = s * x + 1.0 / 120;
  s = s * x + 1.0 / 24;
  s = s * x + 1.0 / 6;
  s = s * x + 0.5;
  const double series = s * x * x, direct = (exp_of(x) - 1) - x;
  return (x < 0 ? -x : x) < 1.0 ? series : direct;
}

template <class T>
RLHF_FAST_INLINE_HD T clamp_of(T x, T low, T high) {  // NaN passes through
  const T y = x < low ? low : x;
  return y > high ? high : y;
}

}  // namespace
}  // namespace rlhf_fast
