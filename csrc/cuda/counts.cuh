// How many real tokens, how many rows with one, and the first one: what the denominators of a loss need before its
// pass.
#pragma once

#include "cuda/rows.cuh"

namespace rlhf_fast::cuda {
namespace {

struct Counts {
  double tokens = 0, rows = 0;
  int64_t first = -1;  // slot of the first real token
};

// Of this block's part, into `parts`: of the slots [begin, end), where the numbers of rows are not asked for.
__device__ __forceinline__ void count_slots(const uint8_t* mask, int64_t begin, int64_t end, double* part) {
  int count = 0;
  int first = 0x7fffffff;
  for (int64_t at = begin + static_cast<int>(threadIdx.x) * kItems; at < end; at += kThreads * kItems) {
    bool real[kItems];
    Group(at, end).load_mask(mask, real);
#pragma unroll
    for (int k = kItems - 1; k >= 0; --k) {
      count += real[k];
      const int slot = static_cast<int>(at - begin) + k;
      if (real[k] && slot < first) first = slot;
    }
  }
  double x[1] = {static_cast<double>(count)};
  block_sum(x);
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, first, bits);
    first = other < first ? other : first;
  }
  SIMT_SHARED(int, firsts, [kWarps]);
  if (threadIdx.x % kWarp == 0) firsts[threadIdx.x / kWarp] = first;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) first = firsts[w] < first ? firsts[w] : first;
  part[0] = x[0];
  part[1] = 0;
  part[2] = static_cast<double>(begin + first);
}

// The same of the rows [begin, end), a warp each; lengths of rows go to `lengths`, if any.
template <class Args>
__device__ __forceinline__ void count_rows(const Args& a, int64_t begin, int64_t end, int64_t* lengths, double* part) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  SIMT_SHARED(double, of_warps, [kCountNumbers * kWarps]);
  double tokens = 0, rows = 0;
  int64_t first = -1;
  for (int64_t i = begin + warp; i < end; i += kWarps) {
    const Row row = row_of(a, i);
    int count = 0;
    for (int64_t at = row.begin; at < row.end; at += kWarp) {
      const unsigned votes = __ballot_sync(kAllLanes, at + lane < row.end && a.mask[at + lane]);
      if (votes && first < 0) first = at + 31 - __clz(static_cast<int>(votes & -votes));
      count += __popc(votes);
    }
    if (lane == 0 && lengths) lengths[i] = count;
    tokens += count;
    rows += count > 0;
  }
  if (lane == 0) {
    of_warps[kCountNumbers * warp] = tokens;
    of_warps[kCountNumbers * warp + 1] = rows;
    of_warps[kCountNumbers * warp + 2] = static_cast<double>(first);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) {
    tokens += of_warps[kCountNumbers * w];
    rows += of_warps[kCountNumbers * w + 1];
    const int64_t other = static_cast<int64_t>(of_warps[kCountNumbers * w + 2]);
    if (other >= 0 && (first < 0 || other < first)) first = other;
  }
  part[0] = tokens;
  part[1] = rows;
  part[2] = static_cast<double>(first);
}

// Of all parts, in every thread.
__device__ __forceinline__ Counts all_counts(const double* parts, int count) {
  double sums[2] = {};
  float first = 0;  // kMaxParts less the first part with a token
  for (int p = static_cast<int>(threadIdx.x); p < count; p += kThreads) {
    const double tokens = parts[p * kCountNumbers];
    sums[0] += tokens;
    sums[1] += parts[p * kCountNumbers + 1];
    if (tokens > 0) first = fmaxf(first, static_cast<float>(kMaxParts - p));
  }
  block_sum(sums);
  first = block_max(first);
  Counts all;
  all.tokens = sums[0];
  all.rows = sums[1];
  if (first > 0) all.first = static_cast<int64_t>(parts[(kMaxParts - static_cast<int>(first)) * kCountNumbers + 2]);
  return all;
}

}  // namespace
}  // namespace rlhf_fast::cuda
