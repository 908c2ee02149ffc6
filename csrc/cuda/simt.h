// What a kernel needs of its compiler. nvcc and NVRTC know CUDA C++; under a host compiler tests/gpu/shim/simt.hpp runs
// the same sources on the CPU, one fiber per thread.
//
// A kernel takes one argument struct and says how many threads a block has, and how many blocks a multiprocessor should
// be able to hold; shared arrays are declared as SIMT_SHARED(float, name, [32]).
#pragma once

#if defined(__CUDACC__)
#define SIMT_SHARED(T, name, dims) __shared__ T name dims
#define SIMT_KERNEL(name, threads, blocks, Args) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Args a)
#else
#include "simt.hpp"
#endif

namespace rlhf_fast::cuda {
// Four bytes that are objects of another type.
#if defined(__CUDACC__)
using Word = unsigned;
#else
using Word = unsigned __attribute__((may_alias));
#endif
}  // namespace rlhf_fast::cuda
