// Rows of padded (rows, length) and packed (cu_seqlens) per-token arrays.
#pragma once

#include "common/dtype.h"
#include "cuda/block.cuh"

namespace rlhf_fast::cuda {
namespace {

struct Row {
  int64_t begin, end;
};

// Boundaries on an accelerator are not checked on the host, so they are clamped here.
template <class Args>
__device__ __forceinline__ Row row_of(const Args& a, int64_t i) {
  if (!a.cu_seqlens) return {i * a.length, (i + 1) * a.length};
  const int64_t from = a.cu_seqlens[i], to = a.cu_seqlens[i + 1];
  const int64_t begin = from < 0 ? 0 : from < a.n ? from : a.n;
  return {begin, to < begin ? begin : to < a.n ? to : a.n};
}

// The last real slot of a row, or the one before the row. Looked for from the end: mostly one step.
__device__ __forceinline__ int64_t last_real(const uint8_t* mask, Row row) {
  if (!mask) return row.end - 1;
  constexpr int kStep = 4 * kThreads;
  for (int64_t end = row.end; end > row.begin; end -= kStep) {
    int found = -1;
    for (int k = 0; k < 4; ++k) {
      const int at = k * kThreads + static_cast<int>(threadIdx.x);
      const int64_t slot = end - kStep + at;
      if (slot >= row.begin && mask[slot]) found = at;
    }
    const int last = static_cast<int>(block_max(static_cast<float>(found)));
    if (last >= 0) return end - kStep + last;
  }
  return row.begin - 1;
}

constexpr int kItems = 4;  // consecutive tokens of a thread

// Up to four consecutive slots; `count` of them are inside of the array. Whole groups go by one access where the array
// lies right for it.
struct Group {
  int64_t first;
  int count;

  __device__ __forceinline__ Group(int64_t first, int64_t end)
      : first(first),
        count(first >= end           ? 0
              : end - first < kItems ? static_cast<int>(end - first)
                                     : kItems) {}
  __device__ __forceinline__ bool whole(const void* at, int bytes) const {
    return count == kItems && reinterpret_cast<uintptr_t>(at) % bytes == 0;
  }
  // 0 where `real` is not set, which is so outside of the array: what the mask hides is not read.
  __device__ __forceinline__ void load(const float* from, const bool (&real)[kItems], float (&x)[kItems]) const {
    if (real[0] && real[1] && real[2] && real[3] && whole(from + first, 16)) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + first);
      x[0] = float_of(v.x), x[1] = float_of(v.y), x[2] = float_of(v.z), x[3] = float_of(v.w);
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) x[k] = real[k] ? from[first + k] : 0;
    }
  }
  __device__ __forceinline__ void load_mask(const uint8_t* mask, bool (&real)[kItems]) const {
#pragma unroll
    for (int k = 0; k < kItems; ++k) real[k] = k < count;
    if (!mask) return;
    if (whole(mask + first, 4)) {
      const unsigned bytes = *reinterpret_cast<const Word*>(mask + first);
#pragma unroll
      for (int k = 0; k < kItems; ++k) real[k] = bytes >> 8 * k & 255;
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) real[k] = k < count && mask[first + k];
    }
  }
  __device__ __forceinline__ int count_real(const uint8_t* mask) const {
    bool real[kItems];
    load_mask(mask, real);
    int found = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) found += real[k];
    return found;
  }
  __device__ __forceinline__ void store(float* to, const float (&x)[kItems]) const {
    if (whole(to + first, 16)) {
      *reinterpret_cast<uint4*>(to + first) = {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])};
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k)
        if (k < count) to[first + k] = x[k];
    }
  }
};

// x[slot] = 0 for the slots [begin, end).
__device__ __forceinline__ void zero(float* x, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) x[i] = 0;
}

}  // namespace
}  // namespace rlhf_fast::cuda
