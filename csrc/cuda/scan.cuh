// The scan of a row: a recurrence over its tokens, taken by all threads of a block at once.
//
// A run of tokens maps the state before it (running sum and value) to the state after it; runs compose, and a masked
// slot maps the state to itself exactly. So a row has the same bits with any padding. Everything is in double: lambda =
// gamma = 1 sums thousands of terms.
#pragma once

#include "cuda/rows.cuh"

namespace rlhf_fast::cuda {
namespace {

constexpr int kTile = kItems * kThreads;  // tokens of a block at a time

struct State {
  double sum, value;
};

// sum -> by_sum sum + by_value value + plus, value -> the last value seen; `any` false: nothing changes.
struct Run {
  double by_sum = 1, by_value = 0, plus = 0, value = 0;
  int any = 0;

  __device__ __forceinline__ State after(const State& s) const {
    if (!any) return s;
    return {fma(by_sum, s.sum, fma(by_value, s.value, plus)), value};
  }
  // This run, and then `next`.
  __device__ __forceinline__ Run then(const Run& next) const {
    if (!next.any) return *this;
    if (!any) return next;
    Run both;
    both.by_sum = next.by_sum * by_sum;
    both.by_value = next.by_sum * by_value;
    both.plus = fma(next.by_sum, plus, fma(next.by_value, value, next.plus));
    both.value = next.value;
    both.any = 1;
    return both;
  }
  __device__ __forceinline__ Run from_below(int lanes) const {
    Run r;
    r.by_sum = __shfl_up_sync(kAllLanes, by_sum, lanes);
    r.by_value = __shfl_up_sync(kAllLanes, by_value, lanes);
    r.plus = __shfl_up_sync(kAllLanes, plus, lanes);
    r.value = __shfl_up_sync(kAllLanes, value, lanes);
    r.any = __shfl_up_sync(kAllLanes, any, lanes);
    return r;
  }
};

// The state before each thread's run, when the runs of the threads before it have changed `state`; which becomes the
// state after all of them.
__device__ __forceinline__ State scan_block(const Run& mine, State* state) {
  SIMT_SHARED(double, numbers, [4 * kWarps]);
  SIMT_SHARED(int, anys, [kWarps]);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  Run until = mine;  // of the lanes up to this one
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const Run before = until.from_below(lanes);
    if (lane >= lanes) until = before.then(until);
  }
  Run before = until.from_below(1);
  if (lane == 0) before = Run();
  if (lane == kWarp - 1) {
    numbers[4 * warp] = until.by_sum;
    numbers[4 * warp + 1] = until.by_value;
    numbers[4 * warp + 2] = until.plus;
    numbers[4 * warp + 3] = until.value;
    anys[warp] = until.any;
  }
  __syncthreads();
  State at_warp = *state, end = *state;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) at_warp = end;
    Run run;
    run.by_sum = numbers[4 * w];
    run.by_value = numbers[4 * w + 1];
    run.plus = numbers[4 * w + 2];
    run.value = numbers[4 * w + 3];
    run.any = anys[w];
    end = run.after(end);
  }
  *state = end;
  __syncthreads();
  return before.after(at_warp);
}

struct GaeRules {
  double gamma, lam;
  bool decay_gaps;  // a masked slot between real tokens is a step of zero reward and value; otherwise it is skipped
};

// Generalised advantage estimation (arXiv 1506.02438, eq. 16) over a row, from its last token to its first:
//   delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lambda A_{t+1}.
// The row ends with its last slot that counts. extra: a masked slot that counts, but for its advantage; -1: none.
// reward(group, real, out) gives the rewards of a group; done(real, advantages) hears of every group.
template <class Reward, class Done>
__device__ __forceinline__ void scan_gae(const GaeRules& rules, const float* from_values, const uint8_t* mask, Row row,
                                         double bootstrap, int64_t extra, float* advantages, float* returns,
                                         const Reward& reward, const Done& done) {
  const double c = rules.gamma * rules.lam;
  State state = {0, bootstrap};
  // Tiles are counted from the first token. Threads run from the last token to the first, like the scan.
  for (int64_t tile = row.end > row.begin ? (row.end - row.begin - 1) / kTile : -1; tile >= 0; --tile) {
    const Group group(row.begin + tile * kTile + (kThreads - 1 - static_cast<int>(threadIdx.x)) * kItems, row.end);
    float rewards[kItems], values[kItems], results[kItems];
    bool real[kItems], valued[kItems];
    group.load_mask(mask, real);
#pragma unroll
    for (int k = 0; k < kItems; ++k) valued[k] = real[k] || (k < group.count && group.first + k == extra);
    group.load(from_values, valued, values);
    reward(group, real, rewards);
    Run run;
#pragma unroll
    for (int k = kItems - 1; k >= 0; --k) {
      if (!valued[k]) rewards[k] = 0;
      if (!valued[k] && !(rules.decay_gaps && k < group.count)) continue;
      Run one;
      one.by_sum = c;
      one.by_value = rules.gamma;
      one.plus = static_cast<double>(rewards[k]) - static_cast<double>(values[k]);
      one.value = static_cast<double>(values[k]);
      one.any = 1;
      run = run.then(one);
    }
    State at = scan_block(run, &state);
#pragma unroll
    for (int k = kItems - 1; k >= 0; --k) {
      const double r = static_cast<double>(rewards[k]), v = static_cast<double>(values[k]);
      if (valued[k] || (rules.decay_gaps && k < group.count)) at = {(r + rules.gamma * at.value) - v + c * at.sum, v};
      values[k] = valued[k] ? static_cast<float>(at.sum + v) : 0;
      results[k] = real[k] ? static_cast<float>(at.sum) : 0;
    }
    group.store(returns, values);
    group.store(advantages, results);
    done(real, results);
  }
}

}  // namespace
}  // namespace rlhf_fast::cuda
