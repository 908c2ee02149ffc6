// Mean and scale of the real entries of an array, and the standardisation with them.
#pragma once

#include <math.h>

#include "chunks.h"

namespace rlhf_fast {
namespace {

struct Moments {
  int64_t count;
  double mean, divisor, scale;  // divisor of the variance; scale = 1 / standard deviation, with eps
};

struct ScaleRules {
  bool unbiased, floor_variance;  // variance over n - 1; max(var, eps) instead of var + eps
  double eps;
};

// Masked x - mean of a block, in double.
template <class T>
struct CentredBlock {
  T real[kBlock], x[kBlock];
  double value[kBlock];

  void load(const T* from, const uint8_t* mask, double mean, int64_t at, int size) {
    load_mask(real, mask, at, size);
    load_block(x, from, real, at, size);
    for (int i = 0; i < kBlock; ++i) value[i] = (static_cast<double>(x[i]) - mean) * static_cast<double>(real[i]);
  }
  void store(T* to, int64_t at, int size) const {
    for (int i = 0; i < size; ++i) to[at + i] = real[i] != 0 ? x[i] : T(0);
  }
};

template <class T>
Moments moments_of(const T* x, const uint8_t* mask, int64_t n, ScaleRules rules, int threads) {
  const Chunks chunks(n);
  Moments m;
  m.count = count_real(mask, n);
  const double sum = sum_chunks(chunks, threads, [=](int64_t at, int size) {
    T real[kBlock], block[kBlock];
    load_mask(real, mask, at, size);
    load_block(block, x, real, at, size);
    return total_of(block);
  });
  const double mean = m.mean = m.count ? sum / m.count : 0;
  const double squares = sum_chunks(chunks, threads, [=](int64_t at, int size) {
    CentredBlock<T> block;
    block.load(x, mask, mean, at, size);
    return dot_of(block.value, block.value);
  });
  const int64_t divisor = m.count - (rules.unbiased ? 1 : 0);
  m.divisor = divisor > 1 ? divisor : 1;
  const double variance = squares / m.divisor;
  m.scale = 1 / sqrt(rules.floor_variance ? (variance < rules.eps ? rules.eps : variance) : variance + rules.eps);
  return m;
}

// y = (x - mean) scale + shift, 0 where masked; y may be x.
template <class T>
void standardise(const T* x, const uint8_t* mask, T* y, int64_t n, const Moments& m, double shift, int threads) {
  const double mean = m.mean, scale = m.scale;
  Chunks(n).each(threads, [=](int64_t, int64_t begin, int64_t end) {
    each_block(begin, end, [=](int64_t at, int size) {
      CentredBlock<T> block;
      block.load(x, mask, mean, at, size);
      for (int i = 0; i < kBlock; ++i) block.x[i] = static_cast<T>(block.value[i] * scale + shift);
      block.store(y, at, size);
    });
  });
}

}  // namespace
}  // namespace rlhf_fast
