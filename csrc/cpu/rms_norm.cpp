// RMSNorm of rows with a frozen weight: y = x rstd (w + offset), rstd = 1 / sqrt(mean(x^2) + eps), rounded once.
//
// A row is read twice and lies in the first-level cache the second time. Its sums are ordered by its width alone.
#include "formats.h"
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace rlhf_fast {
namespace {

constexpr int kSums = 4;
constexpr int64_t kGrain = 32768;  // numbers; below this a second thread costs more than it saves

// body(v, j, lanes) for the vectors of [0, width); v rises by one and starts again at kSums.
template <class Body>
inline RLHF_FAST_INLINE void each_vector(int64_t width, Body body) {
  int64_t j = 0;
  for (; j + kSums * kLanes <= width; j += kSums * kLanes)
    for (int v = 0; v < kSums; ++v) body(v, j + v * kLanes, kLanes);
  for (int v = 0; j < width; ++v, j += kLanes) body(v, j, static_cast<int>(width - j < kLanes ? width - j : kLanes));
}

template <class T>
void forward(Format<T>, const RmsNormArgs& a) {
  const Float offset = Float::splat(static_cast<float>(a.offset));
  const T* weight = static_cast<const T*>(a.weight);
  for_ranges(a.rows, kGrain / (a.width + 1) + 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = static_cast<const T*>(a.x) + i * a.x_row;
      T* y = static_cast<T*>(a.y) + i * a.width;
      Float sums[kSums];
      for (Float& s : sums) s = Float::splat(0);
      each_vector(a.width, [&](int v, int64_t j, int lanes) RLHF_FAST_INLINE {
        const Float z = load_lanes(x + j, lanes);
        sums[v] = fma(z, z, sums[v]);
      });
      const float rstd = static_cast<float>(1 / sqrt(sum_of(sums) / static_cast<double>(a.width) + a.eps));
      if (a.rstd) a.rstd[i] = rstd;
      const Float r = Float::splat(rstd);
      each_vector(a.width, [&](int, int64_t j, int lanes) RLHF_FAST_INLINE {
        store_lanes(y + j, load_lanes(x + j, lanes) * r * (load_lanes(weight + j, lanes) + offset), lanes);
      });
    }
  });
}

// grad_x = rstd (u - x rstd^2 mean(u x)), u = grad (w + offset).
template <class T>
void backward(Format<T>, const RmsNormBackwardArgs& a) {
  const Float offset = Float::splat(static_cast<float>(a.offset));
  const T* weight = static_cast<const T*>(a.weight);
  for_ranges(a.rows, kGrain / (a.width + 1) + 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T *x = static_cast<const T*>(a.x) + i * a.x_row, *grad = static_cast<const T*>(a.grad) + i * a.grad_row;
      T* grad_x = static_cast<T*>(a.grad_x) + i * a.width;
      Float sums[kSums];
      for (Float& s : sums) s = Float::splat(0);
      each_vector(a.width, [&](int v, int64_t j, int lanes) RLHF_FAST_INLINE {
        sums[v] = fma(load_lanes(grad + j, lanes) * (load_lanes(weight + j, lanes) + offset), load_lanes(x + j, lanes),
                      sums[v]);
      });
      const double rstd = a.rstd[i], mean = sum_of(sums) / static_cast<double>(a.width);
      const Float r = Float::splat(a.rstd[i]), pull = Float::splat(static_cast<float>(-rstd * rstd * rstd * mean));
      each_vector(a.width, [&](int, int64_t j, int lanes) RLHF_FAST_INLINE {
        const Float u = load_lanes(grad + j, lanes) * (load_lanes(weight + j, lanes) + offset);
        store_lanes(grad_x + j, fma(load_lanes(x + j, lanes), pull, u * r), lanes);
      });
    }
  });
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t rms_norm(const RmsNormArgs& a) {
  with_format(a.dtype, [&](auto format) { forward(format, a); });
  return -1;
}

int64_t rms_norm_backward(const RmsNormBackwardArgs& a) {
  with_format(a.dtype, [&](auto format) { backward(format, a); });
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
