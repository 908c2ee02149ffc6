// Whitening over the real entries (arXiv 2403.17031, section 3), and its adjoint. Every launch begins with the moments
// or sums of at most kMaxParts parts, which each block puts together for itself.
#pragma once

#include "cuda/moments.cuh"
#include "cuda/whiten.h"

namespace rlhf_fast::cuda {
namespace {

// body(group) for the groups of this block's part.
template <class Task, class Body>
__device__ __forceinline__ void each_group(const Task& a, const Body& body) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.part_length;
  const int64_t end = begin + a.part_length < a.n ? begin + a.part_length : a.n;
  for (int64_t at = begin + static_cast<int>(threadIdx.x) * kItems; at < end; at += kThreads * kItems)
    body(Group(at, end));
}

template <class Task>
__device__ __forceinline__ void whiten_moments_part(const Task& a) {
  MomentSums sums;
  each_group(a, [&](const Group& group) {
    bool real[kItems];
    float x[kItems];
    group.load_mask(a.mask, real);
    group.load(a.x, real, x);
#pragma unroll
    for (int k = 0; k < kItems; ++k)
      if (real[k]) sums.take(x[k]);
  });
  save(pooled(sums.moments()), a.scratch + blockIdx.x * kMomentDoubles);
}

__device__ __forceinline__ void whiten_apply_part(const WhitenTask& a) {
  const Moments m = pooled(a.scratch, a.parts);
  const double scale = scale_of(m, a.unbiased, a.floor_variance, a.eps).scale, shift = a.shift_mean ? 0 : m.mean;
  const Group group((static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x)) * kItems, a.n);
  bool real[kItems];
  float x[kItems];
  group.load_mask(a.mask, real);
  group.load(a.x, real, x);
#pragma unroll
  for (int k = 0; k < kItems; ++k)
    x[k] = real[k] ? static_cast<float>((static_cast<double>(x[k]) - m.mean) * scale + shift) : 0;
  group.store(a.out, x);
}

// sum g and sum g (x - mean) of a part.
__device__ __forceinline__ void whiten_sums_part(const WhitenBackwardTask& a) {
  const double mean = pooled(a.scratch, a.parts).mean;
  double sums[kSumDoubles] = {};
  each_group(a, [&](const Group& group) {
    bool real[kItems];
    float x[kItems], grad[kItems];
    group.load_mask(a.mask, real);
    group.load(a.x, real, x);
    group.load(a.grad, real, grad);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!real[k]) continue;
      sums[0] += static_cast<double>(grad[k]);
      sums[1] += static_cast<double>(grad[k]) * (static_cast<double>(x[k]) - mean);
    }
  });
  block_sum(sums);
  double* to = a.scratch + kMaxParts * kMomentDoubles + blockIdx.x * kSumDoubles;
  if (threadIdx.x == 0) to[0] = sums[0], to[1] = sums[1];
}

// y = (x - mu) s + shift: dx = s (g - mean g) - s^3 (x - mu) sum(g (x - mu)) / divisor, + mean g without shift_mean.
// With a variance below the floor the scale is a constant and the middle term vanishes.
__device__ __forceinline__ void whiten_backward_part(const WhitenBackwardTask& a) {
  const Moments m = pooled(a.scratch, a.parts);
  double sums[kSumDoubles] = {};
  const double* parts = a.scratch + kMaxParts * kMomentDoubles;
  for (int p = static_cast<int>(threadIdx.x); p < a.parts; p += kThreads) {
    sums[0] += parts[p * kSumDoubles];
    sums[1] += parts[p * kSumDoubles + 1];
  }
  block_sum(sums);
  const Scale found = scale_of(m, a.unbiased, a.floor_variance, a.eps);
  const double s = found.scale, grad_mean = m.count > 0 ? sums[0] / m.count : 0;
  const bool floored = a.floor_variance && s * s >= 1 / a.eps;
  const double constant = (a.shift_mean ? 0 : grad_mean) - s * grad_mean;
  const double slope = floored ? 0 : s * s * s * sums[1] / found.divisor;
  const Group group((static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x)) * kItems, a.n);
  bool real[kItems];
  float x[kItems], grad[kItems];
  group.load_mask(a.mask, real);
  group.load(a.x, real, x);
  group.load(a.grad, real, grad);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const double g = s * static_cast<double>(grad[k]) - slope * (static_cast<double>(x[k]) - m.mean) + constant;
    grad[k] = real[k] ? static_cast<float>(g) : 0;
  }
  group.store(a.grad_x, grad);
}

}  // namespace
}  // namespace rlhf_fast::cuda
