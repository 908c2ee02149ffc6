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

// Moments of what was taken so far, joined without going back (Chan et al. 1979).
struct RunningMoments {
  int64_t count = 0;
  double mean = 0, squares = 0;  // squares: sum (x - mean)^2

  void join(const RunningMoments& other) {
    if (other.count == 0) return;
    const double total = static_cast<double>(count + other.count), gap = other.mean - mean;
    squares += other.squares + gap * gap * (static_cast<double>(count) * static_cast<double>(other.count) / total);
    mean += gap * (static_cast<double>(other.count) / total);
    count += other.count;
  }
  // x[0..n) for n > 0, in lanes of a fixed order.
  template <class T>
  void take(const T* x, int n) {
    const auto at = [x](int i) { return static_cast<double>(x[i]); };
    const auto total = [](const double* lane) {
      return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    };
    double sum[kLaneCount] = {}, square[kLaneCount] = {};
    int i = 0;
    for (; i + kLaneCount <= n; i += kLaneCount)
      for (int k = 0; k < kLaneCount; ++k) sum[k] += at(i + k);
    for (; i < n; ++i) sum[0] += at(i);
    const double centre = total(sum) / n;
    for (i = 0; i + kLaneCount <= n; i += kLaneCount)
      for (int k = 0; k < kLaneCount; ++k) square[k] += (at(i + k) - centre) * (at(i + k) - centre);
    for (; i < n; ++i) square[0] += (at(i) - centre) * (at(i) - centre);
    RunningMoments block;
    block.count = n;
    block.mean = centre;
    block.squares = total(square);
    join(block);
  }
};

inline Moments finish(const RunningMoments& taken, ScaleRules rules) {
  Moments m;
  m.count = taken.count;
  m.mean = taken.mean;
  const int64_t divisor = m.count - (rules.unbiased ? 1 : 0);
  m.divisor = static_cast<double>(divisor > 1 ? divisor : 1);
  const double variance = taken.squares / m.divisor;
  m.scale = 1 / sqrt(rules.floor_variance ? (variance < rules.eps ? rules.eps : variance) : variance + rules.eps);
  return m;
}

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
  RunningMoments taken;
  taken.count = count_real(mask, n);
  const double sum = sum_chunks(chunks, threads, [=](int64_t at, int size) {
    T real[kBlock], block[kBlock];
    load_mask(real, mask, at, size);
    load_block(block, x, real, at, size);
    return total_of(block);
  });
  const double mean = taken.mean = taken.count ? sum / taken.count : 0;
  taken.squares = sum_chunks(chunks, threads, [=](int64_t at, int size) {
    CentredBlock<T> block;
    block.load(x, mask, mean, at, size);
    return dot_of(block.value, block.value);
  });
  return finish(taken, rules);
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
