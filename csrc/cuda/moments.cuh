// Mean and scale of the real entries of an array, from those of its parts.
#pragma once

#include "cuda/rows.cuh"

namespace rlhf_fast::cuda {
namespace {

// Count, mean and sum (x - mean)^2 of a part.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // Chan et al. 1979; equal numbers keep exactly the variance 0.
  __device__ __forceinline__ void join(const Moments& other) {
    if (other.count == 0) return;
    if (count == 0) {
      *this = other;
      return;
    }
    const double all = count + other.count, gap = other.mean - mean;
    squares += other.squares + gap * gap * (count * other.count / all);
    mean += gap * (other.count / all);
    count = all;
  }
};

// Of `count` numbers, from the sums of their differences to `centre`, one of them, and of the squares of these.
__device__ __forceinline__ Moments moments_of(double count, double centre, double sum, double square) {
  if (count == 0) return {};
  const double squares = square - sum * (sum / count);
  Moments m;
  m.count = count;
  m.mean = centre + sum / count;
  m.squares = squares < 0 ? 0 : squares;
  return m;
}

// Sums of a thread's numbers around the first of them.
struct MomentSums {
  double count = 0, centre = 0, sum = 0, square = 0;

  __device__ __forceinline__ void take(float x) {
    if (count == 0) centre = static_cast<double>(x);
    const double d = static_cast<double>(x) - centre;
    count += 1;
    sum += d;
    square += d * d;
  }
  __device__ __forceinline__ Moments moments() const { return moments_of(count, centre, sum, square); }
};

// Those of the block from those of its threads, in every thread: around the mean of the first thread that has any.
__device__ __forceinline__ Moments pooled(const Moments& mine) {
  SIMT_SHARED(double, centre, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  const int first = kThreads - static_cast<int>(block_max(mine.count > 0 ? static_cast<float>(kThreads - thread) : 0));
  if (first == kThreads) return {};
  if (thread == first) centre[0] = mine.mean;
  __syncthreads();
  double sums[2] = {mine.count, mine.count * (mine.count > 0 ? mine.mean - centre[0] : 0)};
  block_sum(sums);
  Moments all;
  all.count = sums[0];
  all.mean = centre[0] + sums[1] / sums[0];
  const double gap = mine.count > 0 ? mine.mean - all.mean : 0;
  double squares[1] = {mine.squares + mine.count * gap * gap};
  block_sum(squares);
  all.squares = squares[0];
  return all;
}

__device__ __forceinline__ void save(const Moments& m, double* part) {
  if (threadIdx.x != 0) return;
  part[0] = m.count;
  part[1] = m.mean;
  part[2] = m.squares;
}

// Of the whole array from its parts in the scratch memory.
__device__ __forceinline__ Moments pooled(const double* parts, int count) {
  Moments mine;
  for (int p = static_cast<int>(threadIdx.x); p < count; p += kThreads) {
    Moments part;
    part.count = parts[p * kMomentDoubles];
    part.mean = parts[p * kMomentDoubles + 1];
    part.squares = parts[p * kMomentDoubles + 2];
    mine.join(part);
  }
  return pooled(mine);
}

struct Scale {
  double divisor, scale;  // of the variance; 1 / standard deviation, with eps
};

__device__ __forceinline__ Scale scale_of(const Moments& m, bool unbiased, bool floor_variance, double eps) {
  const double less = m.count - (unbiased ? 1 : 0), divisor = less > 1 ? less : 1, variance = m.squares / divisor;
  return {divisor, 1 / sqrt(floor_variance ? (variance < eps ? eps : variance) : variance + eps)};
}

}  // namespace
}  // namespace rlhf_fast::cuda
