// Whitening over the real entries (arXiv 2403.17031, section 3), and its adjoint.
#include "moments.h"
#include "ops.h"

namespace rlhf_fast {
namespace {

// Masked x - mean and upstream gradient of a block.
template <class T>
struct CentredBlock {
  Int<T> on[kBlock];
  T x[kBlock], grad[kBlock];
  double value[kBlock];

  void load(const T* from, const T* upstream, const uint8_t* mask, double mean, int64_t at, int size) {
    load_mask(on, mask, at, size);
    load_block(x, from, on, at, size);
    load_block(grad, upstream, on, at, size);
    for (int i = 0; i < kBlock; ++i) value[i] = (static_cast<double>(x[i]) - mean) * static_cast<double>(-on[i]);
  }
};

template <class T>
void forward(const WhitenArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  const Chunks chunks(a.n);
  PartMoments parts[kMaxChunks];
  chunks.in_phases(a.threads, 2, [&](int phase, int64_t from, int64_t to) {
    if (phase == 0)
      return chunks.each(from, to,
                         [&](int64_t c, int64_t begin, int64_t end) { parts[c] = moments_of(x, a.mask, begin, end); });
    const Moments m = pooled(parts, chunks.count, {a.unbiased, false, a.eps});
    const bool past = a.n * static_cast<int64_t>(2 * sizeof(T)) > kStreamBytes;
    standardise(x, a.mask, static_cast<T*>(a.out), chunks.begin(from), chunks.end(to - 1), m,
                a.shift_mean ? 0.0 : m.mean, past);
    if (past) fence();
  });
}

// y = (x - mu) s + shift: dx = s (g - mean g) - s^3 (x - mu) sum(g (x - mu)) / divisor, + mean g without shift_mean.
// With a variance below the floor the scale is a constant and the middle term vanishes.
template <class T>
void backward(const WhitenBackwardArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* grad = static_cast<const T*>(a.grad);
  T* grad_x = static_cast<T*>(a.grad_x);
  const uint8_t* mask = a.mask;
  const Chunks chunks(a.n);
  PartMoments parts[kMaxChunks];
  double sums[kMaxChunks], dots[kMaxChunks];
  chunks.in_phases(a.threads, 3, [&](int phase, int64_t from, int64_t to) {
    if (phase == 0)
      return chunks.each(from, to,
                         [&](int64_t c, int64_t begin, int64_t end) { parts[c] = moments_of(x, mask, begin, end); });
    const Moments m = pooled(parts, chunks.count, {a.unbiased, a.floor_variance, a.eps});
    CentredBlock<T> block;
    if (phase == 1)
      return chunks.each(from, to, [&](int64_t c, int64_t begin, int64_t end) {
        sums[c] = dots[c] = 0;
        each_block(begin, end, [&](int64_t at, int size) {
          block.load(x, grad, mask, m.mean, at, size);
          sums[c] += total_of(block.grad);
          dots[c] += dot_of(block.grad, block.value);
        });
      });
    double sum = 0, dot = 0;
    for (int64_t c = 0; c < chunks.count; ++c) {
      sum += sums[c];
      dot += dots[c];
    }
    const double s = m.scale, grad_mean = m.count ? sum / m.count : 0;
    const bool floored = a.floor_variance && s * s >= 1 / a.eps;
    const double constant = (a.shift_mean ? 0.0 : grad_mean) - s * grad_mean;
    const double slope = floored ? 0.0 : s * s * s * dot / m.divisor;
    each_block(chunks.begin(from), chunks.end(to - 1), [&](int64_t at, int size) {
      block.load(x, grad, mask, m.mean, at, size);
      for (int i = 0; i < kBlock; ++i)
        block.grad[i] = static_cast<T>(s * static_cast<double>(block.grad[i]) - slope * block.value[i] + constant);
      for (int i = 0; i < size; ++i) grad_x[at + i] = kept(block.grad[i], block.on[i]);
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
