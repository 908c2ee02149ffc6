// The gate of a feed-forward layer, silu(gate) up with silu(x) = x / (1 + e^-x), rounded once.
#include "formats.h"
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kGrain = 16384;  // numbers; below this a second thread costs more than it saves

// 1 / (1 + e^-x), 0 below -88, and its complement.
struct Sigmoid {
  Float value, rest;

  RLHF_FAST_INLINE explicit Sigmoid(const Float& x) {
    const Float least = Float::splat(-88.0f), e = exp(Float::splat(0) - max(x, least));
    value = where(not_less(x, least), Float::splat(1.0f) / (Float::splat(1.0f) + e));
    rest = e * value;
  }
};

// body(row, j, lanes) for the vectors of every row.
template <class Args, class Body>
inline void each(const Args& a, Body body) {
  for_ranges(a.rows, kGrain / (a.width + 1) + 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t j = 0;
      for (; j + kLanes <= a.width; j += kLanes) body(i, j, kLanes);
      if (j < a.width) body(i, j, static_cast<int>(a.width - j));
    }
  });
}

template <class T>
void forward(Format<T>, const SiluMulArgs& a) {
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  T* out = static_cast<T*>(a.out);
  each(a, [&](int64_t i, int64_t j, int lanes) RLHF_FAST_INLINE {
    const Float g = load_lanes(gate + i * a.gate_row + j, lanes);
    store_lanes(out + i * a.width + j, g * Sigmoid(g).value * load_lanes(up + i * a.up_row + j, lanes), lanes);
  });
}

template <class T>
void backward(Format<T>, const SiluMulBackwardArgs& a) {
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up),
          *grad = static_cast<const T*>(a.grad);
  T *grad_gate = static_cast<T*>(a.grad_gate), *grad_up = static_cast<T*>(a.grad_up);
  each(a, [&](int64_t i, int64_t j, int lanes) RLHF_FAST_INLINE {
    const Float g = load_lanes(gate + i * a.gate_row + j, lanes), u = load_lanes(up + i * a.up_row + j, lanes);
    const Float d = load_lanes(grad + i * a.grad_row + j, lanes);
    const Sigmoid s(g);
    const Float silu = g * s.value;
    store_lanes(grad_gate + i * a.width + j, d * u * fma(silu, s.rest, s.value), lanes);
    store_lanes(grad_up + i * a.width + j, d * silu, lanes);
  });
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t silu_mul(const SiluMulArgs& a) {
  with_format(a.dtype, [&](auto format) { forward(format, a); });
  return -1;
}

int64_t silu_mul_backward(const SiluMulBackwardArgs& a) {
  with_format(a.dtype, [&](auto format) { backward(format, a); });
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
