// Mean and scale of the real entries of an array, and the standardisation with them.
#pragma once

#include <math.h>

#include "chunks.h"
#include "output.h"

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

// Of a part of the array.
struct PartMoments {
  int64_t count;
  double mean, squares;  // squares: sum (x - mean)^2
};

// The moments of the whole from those of its parts (Chan et al. 1979), around the mean of one of them: equal numbers
// have exactly the variance 0.
inline Moments pooled(const PartMoments* parts, int64_t n, ScaleRules rules) {
  int64_t count = 0;
  double centre = 0, sum = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (count == 0) centre = parts[i].mean;
    count += parts[i].count;
    sum += static_cast<double>(parts[i].count) * (parts[i].mean - centre);
  }
  Moments m;
  m.count = count;
  m.mean = count ? centre + sum / static_cast<double>(count) : 0;
  for (int64_t i = 0; i < n; ++i) {
    const double gap = parts[i].mean - m.mean;
    squares += parts[i].squares + static_cast<double>(parts[i].count) * (gap * gap);
  }
  const int64_t divisor = count - (rules.unbiased ? 1 : 0);
  m.divisor = static_cast<double>(divisor > 1 ? divisor : 1);
  const double variance = squares / m.divisor;
  m.scale = 1 / sqrt(rules.floor_variance ? (variance < rules.eps ? rules.eps : variance) : variance + rules.eps);
  return m;
}

// body(x - centre) for eight of x[0..n) at a time, 0 where masked and past the end.
template <class T, class Body>
inline RLHF_FAST_INLINE void each_deviation(const T* x, const uint8_t* mask, int n, double centre, const Body& body) {
  const Eight c = Eight::splat(centre);
  int i = 0;
  if (all_real(mask, n))
    for (; i + kEight <= n; i += kEight) body(Eight::load(x + i) - c);
  else
    for (; i + kEight <= n; i += kEight) body(where(mask + i, Eight::load(x + i) - c));
  if (i == n) return;
  T tail[kEight] = {};
  uint8_t real[kEight] = {};
  for (int k = 0; i < n; ++k, ++i) {
    tail[k] = x[i];
    real[k] = !mask || mask[i];
  }
  body(where(real, Eight::load(tail) - c));
}

// Sums of what was taken so far, around the mean of the first block: little is then lost in taking n (c - mean)^2 off
// the sum of the (x - c)^2.
template <class T>
class MomentSums {
 public:
  // The real ones of x[0..n), a block at most.
  void take(const T* x, const uint8_t* mask, int n) {
    const int64_t count = count_real(mask, n);
    if (count == 0) return;
    Eight sum = sum_, square = square_;
    if (count_ == 0) {
      const void* first = mask ? memchr(mask, 1, n) : nullptr;
      centre_ = static_cast<double>(x[first ? static_cast<const uint8_t*>(first) - mask : 0]);
      each_deviation(x, mask, n, centre_, [&](const Eight& d) RLHF_FAST_INLINE { sum = sum + d; });
      centre_ += total(sum) / static_cast<double>(count);  // exactly x when all are equal
      sum = sum_;
    }
    count_ += count;
    each_deviation(x, mask, n, centre_, [&](const Eight& d) RLHF_FAST_INLINE {
      sum = sum + d;
      square = square + d * d;
    });
    sum_ = sum;
    square_ = square;
  }
  PartMoments moments() const {
    if (count_ == 0) return {0, 0, 0};
    const double n = static_cast<double>(count_), sum = total(sum_), squares = total(square_) - sum * (sum / n);
    return {count_, centre_ + sum / n, squares < 0 ? 0 : squares};
  }

 private:
  int64_t count_ = 0;
  double centre_ = 0;
  Eight sum_ = Eight::splat(0), square_ = Eight::splat(0);
};

template <class T>
PartMoments moments_of(const T* x, const uint8_t* mask, int64_t begin, int64_t end) {
  MomentSums<T> sums;
  each_block(begin, end, [&](int64_t at, int size) { sums.take(x + at, mask ? mask + at : nullptr, size); });
  return sums.moments();
}

// y = (x - mean) scale + shift of [begin, end), 0 where masked; y may be x. past: past the caches.
template <class T>
void standardise(const T* x, const uint8_t* mask, T* y, int64_t begin, int64_t end, const Moments& m, double shift,
                 bool past) {
  const Eight mean = Eight::splat(m.mean), scale = Eight::splat(m.scale), add = Eight::splat(shift);
  const auto at = [=](const T* p) RLHF_FAST_INLINE { return (Eight::load(p) - mean) * scale + add; };
  alignas(kLine) T staged[kBlock];
  each_block(begin, end, [&](int64_t begin, int size) {
    const uint8_t* real = mask ? mask + begin : nullptr;
    const T* from = x + begin;
    const bool whole = all_real(real, size);
    if (!whole && !memchr(real, 1, size)) return zero(y + begin, size, past);
    T* to = past ? staged : y + begin;
    int i = 0;
    if (whole)
      for (; i + kEight <= size; i += kEight) at(from + i).store(to + i);
    else
      for (; i + kEight <= size; i += kEight) where(real + i, at(from + i)).store(to + i);
    if (i < size) {
      T tail[kEight] = {};
      memcpy(tail, from + i, sizeof(T) * (size - i));
      at(tail).store(tail);
      for (int k = 0; i < size; ++k, ++i) to[i] = whole || real[i] ? tail[k] : T(0);
    }
    if (past) stream_copy(y + begin, to, size);
  });
}

}  // namespace
}  // namespace rlhf_fast
