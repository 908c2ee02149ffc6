// Advantages relative to a group, and their adjoint. There are as many samples as sequences, so every thread looks
// through all of them for the members of its group, in their order and in double: no sorting, no hashing, no atomics,
// and a group has the same bits whatever other groups the batch holds.
#pragma once

#include "cuda/block.cuh"
#include "cuda/group_advantages.h"

namespace rlhf_fast::cuda {
namespace {

constexpr double kWhitenEps = 1e-8;
constexpr int kSampleDoubles = 4;  // of a sample in the scratch memory: centred score, size, sums of its group
constexpr int kPartDoubles = 2;    // of a part, after the samples

// body(j) for the members j of the group `id`, in order. Every thread of the block has to call it.
template <class Body>
__device__ __forceinline__ void each_member(const GroupAdvantagesArgs& a, int64_t id, const Body& body) {
  SIMT_SHARED(int64_t, ids, [kThreads]);
  SIMT_SHARED(int, reals, [kThreads]);
  for (int64_t at = 0; at < a.n; at += kThreads) {
    const int64_t j = at + static_cast<int>(threadIdx.x);
    const bool real = j < a.n && (!a.mask || a.mask[j]);
    reals[threadIdx.x] = real;
    ids[threadIdx.x] = real ? a.group_ids[j] : 0;
    __syncthreads();
    for (int k = 0; k < kThreads; ++k)
      if (reals[k] && ids[k] == id) body(at + k);
    __syncthreads();
  }
}

// What a thread finds out about the group of its sample. Scores are taken around the first of the group, so that equal
// scores are zeros and leave no rounding to be scaled up.
struct Group {
  const GroupAdvantagesArgs& a;
  int64_t id;
  int64_t first = -1;
  double size = 0, mean = 0;

  __device__ __forceinline__ double score(int64_t j) const {
    return static_cast<double>(a.scores[j]) - static_cast<double>(a.scores[first]);
  }
  __device__ __forceinline__ double centred(int64_t j) const { return score(j) - mean; }
  __device__ __forceinline__ double upstream(int64_t j) const { return static_cast<double>(a.grad[j]); }

  // Size and mean of the scores; the sum of weight(j) score(j) and of weight(j); the sum of the upstream gradients.
  __device__ __forceinline__ void look(double* weights, double* weighted, double* grads) {
    double sum = 0;
    each_member(a, id, [&](int64_t j) {
      if (first < 0) first = j;
      size += 1;
      sum += score(j);
      if (a.kind == kOpo) {
        const double w = static_cast<double>(a.lengths[j]);
        *weights += w;
        *weighted += w * score(j);
      }
      if (a.grad) *grads += upstream(j);
    });
    mean = size > 0 ? sum / size : 0;
  }
};

__device__ __forceinline__ double pass_at_k(const Group& group, int64_t i) {
  const GroupAdvantagesArgs& a = group.a;
  int64_t best = -1, second = -1;
  each_member(a, group.id, [&](int64_t j) {
    if (best < 0 || a.scores[j] > a.scores[best]) {
      second = best;
      best = j;
    } else if (second < 0 || a.scores[j] > a.scores[second]) {
      second = j;
    }
  });
  if (second < 0 || !(a.scores[best] > a.scores[second])) return 0;
  if (!a.grad) return i == best ? static_cast<double>(a.scores[i]) - static_cast<double>(a.scores[second]) : 0;
  return i == best ? group.upstream(i) : i == second ? -group.upstream(best) : 0;
}

// One sample a thread; for reinforce++, whose scale is that of the batch, what the second launch needs.
__device__ __forceinline__ void advantage_of_sample(const GroupAdvantagesTask& a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const bool inside = i < a.n, real = inside && (!a.mask || a.mask[i]);
  Group group = {a, real ? a.group_ids[i] : 0};
  double out = 0, weights = 0, weighted = 0, grads = 0, squares = 0, dot = 0;
  if (a.kind == kRemax) {
    if (real) out = a.grad ? group.upstream(i) : static_cast<double>(a.scores[i]) - static_cast<double>(a.greedy[i]);
  } else if (a.kind == kPassAtK) {
    out = pass_at_k(group, i);
  } else {
    group.look(&weights, &weighted, &grads);
    if (a.kind == kGrpo || a.kind == kReinforcePlusPlus) {
      double rest = 0;  // of the mean
      each_member(a, group.id, [&](int64_t j) {
        const double c = group.centred(j);
        squares += c * c;
        rest += c;
        if (a.grad) dot += group.upstream(j) * c;
      });
      if (a.kind == kReinforcePlusPlus) {
        double sums[kPartDoubles] = {};
        if (real) {
          const double c = group.centred(i);
          sums[0] = c * c;
          sums[1] = a.grad ? group.upstream(i) * c : 0;
          double* mine = a.scratch + i * kSampleDoubles;
          mine[0] = c;
          mine[1] = group.size;
          mine[2] = grads;
          mine[3] = rest;
        }
        block_sum(sums);
        double* part = a.scratch + a.n * kSampleDoubles + static_cast<int64_t>(blockIdx.x) * kPartDoubles;
        if (threadIdx.x == 0) part[0] = sums[0], part[1] = sums[1];
        return;
      }
    }
    if (real && a.kind == kOpo) {  // r - sum(w r) / sum(w)
      if (weights > 0)
        out = a.grad ? group.upstream(i) - static_cast<double>(a.lengths[i]) * grads / weights
                     : group.score(i) - weighted / weights;
    } else if (real && a.kind == kGrpo) {  // (r - mean) / (std + eps)
      const double less = group.size - (a.unbiased ? 1 : 0), divisor = less > 1 ? less : 1,
                   std = sqrt(squares / divisor);
      const double s = std + a.eps;
      // dr_i = (g_i - mean g) / (std + eps) - (r_i - mean) sum(g (r - mean)) / (divisor std (std + eps)^2)
      if (std != 0)
        out = a.grad ? (group.upstream(i) - grads / group.size) / s - group.centred(i) * dot / (divisor * std * s * s)
                     : group.centred(i) / s;
    } else if (real) {
      const double factor = a.kind == kDrGrpo ? 1 : group.size > 1 ? group.size / (group.size - 1) : 0;
      out = factor * (a.grad ? group.upstream(i) - grads / group.size : group.centred(i));
    }
  }
  if (inside) a.out[i] = real ? static_cast<float>(out) : 0;
}

// reinforce++: y = x s with x = r - group mean, whose batch mean is 0, and s = 1 / sqrt(var + eps) over the batch.
__device__ __forceinline__ void scale_sample(const GroupAdvantagesTask& a) {
  const double* parts = a.scratch + a.n * kSampleDoubles;
  double sums[3] = {};  // squares, gradients times centred scores, samples
  for (int64_t p = threadIdx.x; p < a.parts; p += kThreads) {
    sums[0] += parts[p * kPartDoubles];
    sums[1] += parts[p * kPartDoubles + 1];
  }
  for (int64_t j = threadIdx.x; j < a.n; j += kThreads) sums[2] += !a.mask || a.mask[j];
  block_sum(sums);
  const double divisor = sums[2] > 1 ? sums[2] - 1 : 1, s = 1 / sqrt(sums[0] / divisor + kWhitenEps);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= a.n) return;
  const double* mine = a.scratch + i * kSampleDoubles;
  double out = 0;
  if (!a.mask || a.mask[i]) {
    const double slope = s * s * s * sums[1] / divisor;
    out = a.grad ? s * static_cast<double>(a.grad[i]) - slope * mine[0] - (s * mine[2] - slope * mine[3]) / mine[1]
                 : mine[0] * s;
  }
  a.out[i] = static_cast<float>(out);
}

}  // namespace
}  // namespace rlhf_fast::cuda
