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

template <class T>
Moments moments_of(const T* x, const uint8_t* mask, int64_t n, ScaleRules rules, int threads) {
  const Chunks chunks(n);
  Moments m;
  m.count = count_real(mask, n);
  const double sum =
      mask ? sum_chunks(chunks, threads, [=](int64_t i) { return mask[i] ? static_cast<double>(x[i]) : 0.0; })
           : sum_chunks(chunks, threads, [=](int64_t i) { return static_cast<double>(x[i]); });
  const double mean = m.mean = m.count ? sum / m.count : 0;
  const auto square = [=](int64_t i) {
    const double d = static_cast<double>(x[i]) - mean;
    return d * d;
  };
  const double squares = mask ? sum_chunks(chunks, threads, [=](int64_t i) { return mask[i] ? square(i) : 0.0; })
                              : sum_chunks(chunks, threads, square);
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
    if (mask) {
      for (int64_t i = begin; i < end; ++i) {
        const T value = static_cast<T>((static_cast<double>(x[i]) - mean) * scale + shift);
        y[i] = mask[i] ? value : T(0);
      }
    } else {
      for (int64_t i = begin; i < end; ++i) y[i] = static_cast<T>((static_cast<double>(x[i]) - mean) * scale + shift);
    }
  });
}

}  // namespace
}  // namespace rlhf_fast
