// Sixteen vectors seen as a square.
#pragma once

#include "vec.h"

namespace rlhf_fast {
namespace {

inline void transpose(Float (&x)[kLanes]) {
#if defined(RLHF_FAST_VEC512)
  __m512 t[kLanes], r[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  const auto both = [](__m512 a, __m512 b, bool high) RLHF_FAST_INLINE {
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(c, d) : _mm512_unpacklo_pd(c, d));
  };
  for (int i = 0; i < kLanes; i += 4)  // lane L of r[i + c]: column 4 L + c of the rows i to i + 3
    for (int c = 0; c < 4; ++c) r[i + c] = both(t[i + c / 2], t[i + c / 2 + 2], c % 2);
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 e = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    x[c].v = _mm512_shuffle_f32x4(a, d, 0x88);
    x[4 + c].v = _mm512_shuffle_f32x4(b, e, 0x88);
    x[8 + c].v = _mm512_shuffle_f32x4(a, d, 0xdd);
    x[12 + c].v = _mm512_shuffle_f32x4(b, e, 0xdd);
  }
#else
  float t[kLanes][kLanes], column[kLanes];
  for (int i = 0; i < kLanes; ++i) store(t[i], x[i]);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) column[j] = t[j][i];
    x[i] = load(column);
  }
#endif
}

}  // namespace
}  // namespace rlhf_fast
