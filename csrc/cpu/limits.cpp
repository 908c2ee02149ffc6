// What this machine can do at best, for benchmarks to be measured against: reading, copying, and the leanest loop that
// takes an exponential and adds it up on data that stays in the first-level cache.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("schedule-insns", "sched-pressure")  // exponentials side by side: a tenth faster
#endif
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace rlhf_fast {
namespace {

constexpr int kSums = 8, kStreams = 4;
constexpr int64_t kAhead = 512;  // floats that a stream is fetched ahead

inline float total_of(Float (&sums)[kSums]) {
  for (int k = 1; k < kSums; ++k) sums[0] = sums[0] + sums[k];
  return maximum(sums[0]);
}

// Four streams, which memory serves a little faster than one.
inline float read(const float* in, int64_t n) {
  constexpr int each = kSums / kStreams;
  const int64_t apart = n / kStreams / kLanes * kLanes;
  Float sums[kSums];
  for (Float& s : sums) s = Float::splat(0);
  for (int64_t i = 0; i + each * kLanes <= apart; i += each * kLanes)
    for (int k = 0; k < kSums; ++k) {
      const float* p = in + k / each * apart + i + k % each * kLanes;
      prefetch_once(p + kAhead);
      sums[k] = sums[k] + load(p);
    }
  return total_of(sums);
}

inline float sum_of_exp(const float* in, int64_t n, const ScaledExp<Float>& exp_of) {
  Float sums[kSums];
  for (Float& s : sums) s = Float::splat(0);
  for (int64_t i = 0; i + kSums * kLanes <= n; i += kSums * kLanes)
    for (int k = 0; k < kSums; ++k) sums[k] = sums[k] + exp_of.of_finite(load(in + i + k * kLanes));
  return total_of(sums);
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t machine_limit(const MachineLimitArgs& a) {
  const float* in = static_cast<const float*>(a.in);
  float* out = static_cast<float*>(a.out);
  if (a.kind == kExp) {  // every thread takes the same block, and `repeats` times
    for_ranges(a.threads, 1, a.threads, [&](int64_t begin, int64_t end) {
      const ScaledExp<Float> exp_of(1.0);
      for (int64_t t = begin; t < end; ++t) {
        float sum = 0;
        for (int64_t r = 0; r < a.repeats; ++r) sum += sum_of_exp(in, a.n, exp_of);
        out[t] = sum;
      }
    });
    return -1;
  }
  for_ranges(a.n / kLanes, 4096, a.threads, [&](int64_t begin, int64_t end) {
    begin *= kLanes;
    end *= kLanes;
    if (a.kind == kRead) {
      out[begin / kLanes] = read(in + begin, end - begin);
      return;
    }
    for (int64_t i = begin; i < end; i += kLanes) stream(out + i, load(in + i));
    fence();
  });
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
