// The last block of a launch, for sums that are put together in the same launch.
#pragma once

#include "cuda/block.cuh"

namespace rlhf_fast::cuda {
namespace {

// True in every thread of the block that gets here last, which then sees what the first threads of all blocks wrote
// before. The counter starts at 0.
__device__ __forceinline__ bool is_last_block(int* counter) {
  SIMT_SHARED(int, last, [1]);
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  return last[0] != 0;
}

}  // namespace
}  // namespace rlhf_fast::cuda
