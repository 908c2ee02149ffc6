// How many real tokens, or rows with one: what the denominators of a loss need before its pass.
#pragma once

#include "cuda/rows.cuh"

namespace rlhf_fast::cuda {
namespace {

// Of a block, in its first thread.
__device__ __forceinline__ int64_t block_count(int mine) {
  int x[1] = {mine};
  double sum[1] = {};
  block_sum_of_first(x, sum);
  return static_cast<int64_t>(sum[0]);
}

// Real slots of this block's part [begin, end), in the first thread.
__device__ __forceinline__ int64_t count_slots(const uint8_t* mask, int64_t begin, int64_t end) {
  constexpr int kStep = kThreads * kItems;
  int count = 0;
  for (int64_t at = begin + static_cast<int>(threadIdx.x) * kItems; at < end; at += kCountGroups * kStep) {
#pragma unroll
    for (int j = 0; j < kCountGroups; ++j) count += Group(at + j * kStep, end).count_real(mask);
  }
  return block_count(count);
}

// Rows of [begin, end) with a real slot, a warp each, in the first thread; lengths of rows go to `lengths`, if any.
template <class Args>
__device__ __forceinline__ int64_t count_rows(const Args& a, int64_t begin, int64_t end, int64_t* lengths) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int rows = 0;
  for (int64_t i = begin + warp; i < end; i += kWarps) {
    const Row row = row_of(a, i);
    int count = 0;
#pragma unroll 4
    for (int64_t at = row.begin + lane * kItems; at < row.end; at += kWarp * kItems)
      count += Group(at, row.end).count_real(a.mask);
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) count += __shfl_xor_sync(kAllLanes, count, bits);
    if (lane == 0 && lengths) lengths[i] = count;
    rows += lane == 0 && count > 0;
  }
  return block_count(rows);
}

}  // namespace
}  // namespace rlhf_fast::cuda
