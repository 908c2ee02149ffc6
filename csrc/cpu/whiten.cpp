// Whitening over the real entries (arXiv 2403.17031, section 3), and its adjoint.
#include "moments.h"
#include "ops.h"

namespace rlhf_fast {
namespace {

template <class T>
void forward(const WhitenArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  const Moments m = moments_of(x, a.mask, a.n, {a.unbiased, false, a.eps}, a.threads);
  standardise(x, a.mask, static_cast<T*>(a.out), a.n, m, a.shift_mean ? 0.0 : m.mean, a.threads);
}

// y = (x - mu) s + shift: dx = s (g - mean g) - s^3 (x - mu) sum(g (x - mu)) / divisor, + mean g without shift_mean.
// With a variance below the floor the scale is a constant and the middle term vanishes.
template <class T>
void backward(const WhitenBackwardArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* grad = static_cast<const T*>(a.grad);
  T* grad_x = static_cast<T*>(a.grad_x);
  const uint8_t* mask = a.mask;
  const Moments m = moments_of(x, mask, a.n, {a.unbiased, a.floor_variance, a.eps}, a.threads);
  const Chunks chunks(a.n);
  const double mean = m.mean, s = m.scale;
  const double sum = sum_chunks(chunks, a.threads, [=](int64_t at, int size) {
    T real[kBlock], block[kBlock];
    load_mask(real, mask, at, size);
    load_block(block, grad, real, at, size);
    return total_of(block);
  });
  const double dot = sum_chunks(chunks, a.threads, [=](int64_t at, int size) {
    CentredBlock<T> block;
    block.load(x, mask, mean, at, size);
    load_block(block.x, grad, block.real, at, size);
    return dot_of(block.x, block.value);
  });
  const bool floored = a.floor_variance && s * s >= 1 / a.eps;
  const double grad_mean = m.count ? sum / m.count : 0;
  const double constant = (a.shift_mean ? 0.0 : grad_mean) - s * grad_mean;
  const double slope = floored ? 0.0 : s * s * s * dot / m.divisor;
  chunks.each(a.threads, [=](int64_t, int64_t begin, int64_t end) {
    each_block(begin, end, [=](int64_t at, int size) {
      CentredBlock<T> block;
      block.load(x, mask, mean, at, size);
      load_block(block.x, grad, block.real, at, size);
      for (int i = 0; i < kBlock; ++i)
        block.x[i] = static_cast<T>(s * static_cast<double>(block.x[i]) - slope * block.value[i] + constant);
      block.store(grad_x, at, size);
    });
  });
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t whiten(const WhitenArgs& a) {
  a.f64 ? forward<double>(a) : forward<float>(a);
  return -1;
}

int64_t whiten_backward(const WhitenBackwardArgs& a) {
  a.f64 ? backward<double>(a) : backward<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
