// Reductions over a block. Their order is that of the threads, so a result has the same bits wherever the block ran.
#pragma once

#include "cuda/ops.h"
#include "cuda/simt.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// The maximum of x over the block, in every thread; NaN counts as nothing. Every thread has to call it.
__device__ __forceinline__ float block_max(float x) {
  SIMT_SHARED(float, maxima, [kWarps]);
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bits));
  if (threadIdx.x % kWarp == 0) maxima[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = maxima[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) x = fmaxf(x, maxima[i]);
  __syncthreads();
  return x;
}

// The sums of x[0..kCount) over the block, in every thread: pairs of lanes first, then the warps one by one. Between
// two calls with the same kCount there has to be a barrier.
template <int kCount>
__device__ __forceinline__ void block_sum(double (&x)[kCount]) {
  SIMT_SHARED(double, sums, [kCount * kWarps]);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) x[k] += __shfl_xor_sync(kAllLanes, x[k], bits);
    if (threadIdx.x % kWarp == 0) sums[k * kWarps + threadIdx.x / kWarp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    x[k] = sums[k * kWarps];
    for (int i = 1; i < kWarps; ++i) x[k] += sums[k * kWarps + i];
  }
}

// The same in the first thread alone, in `sums`: lanes in the type of x, warps in double.
template <class T, int kCount>
__device__ __forceinline__ void block_sum_of_first(T (&x)[kCount], double (&sums)[kCount]) {
  SIMT_SHARED(double, of_warps, [kCount * kWarps]);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) x[k] += __shfl_xor_sync(kAllLanes, x[k], bits);
    if (threadIdx.x % kWarp == 0) of_warps[k * kWarps + threadIdx.x / kWarp] = static_cast<double>(x[k]);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    sums[k] = of_warps[k * kWarps];
    for (int i = 1; i < kWarps; ++i) sums[k] += of_warps[k * kWarps + i];
  }
}

}  // namespace
}  // namespace rlhf_fast::cuda
