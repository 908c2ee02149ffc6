// Sums over a whole launch, in one launch: blocks that count first, and a last block that puts the parts together. The
// scheme of kernels/common/grid.py.
//
// Blocks take numbers in the order in which they start. The first of them count and wait for nobody; the others wait
// for the counts of blocks that have started already, so no order in which a device starts blocks can stop a launch.
// Counts are integers, and their sum has no order. What a block does depends on its number alone.
#pragma once

#include "cuda/block.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr int kCountBits = 40;  // of the second counter; above lies how many blocks have counted

// Number of this block in the order of starting, in every thread.
__device__ __forceinline__ int take_ticket(Counter* counters) {
  SIMT_SHARED(int, ticket, [1]);
  if (threadIdx.x == 0) ticket[0] = static_cast<int>(atomicAdd(counters, Counter(1)));
  __syncthreads();
  return ticket[0];
}

// `count` of one of the blocks that count, by its first thread; what that thread has seen written comes before it.
__device__ __forceinline__ void add_count(Counter* counters, int64_t count) {
  __threadfence();
  atomicAdd(counters + 1, (Counter(1) << kCountBits) + static_cast<Counter>(count));
}

// The sum of the counts of `parts` blocks, in every thread, which then sees what came before them.
__device__ __forceinline__ int64_t whole_count(Counter* counters, int parts) {
  SIMT_SHARED(int64_t, whole, [1]);
  if (threadIdx.x == 0) {
    Counter seen;
    do {
      seen = atomicAdd(counters + 1, Counter(0));
    } while (static_cast<int>(seen >> kCountBits) < parts);
    __threadfence();
    whole[0] = static_cast<int64_t>(seen & ((Counter(1) << kCountBits) - 1));
  }
  __syncthreads();
  return whole[0];
}

// True in every thread of the last of `blocks` blocks to get here, which then sees what the first threads of the others
// wrote before. It leaves zeros for the next launch.
__device__ __forceinline__ bool is_last_block(Counter* counters, int blocks) {
  SIMT_SHARED(int, last, [1]);
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = static_cast<int>(atomicAdd(counters + 2, Counter(1))) == blocks - 1;
    __threadfence();
    if (last[0]) counters[0] = counters[1] = counters[2] = 0;
  }
  __syncthreads();
  return last[0] != 0;
}

}  // namespace
}  // namespace rlhf_fast::cuda
