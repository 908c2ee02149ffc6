// What this machine can do at best, for benchmarks to be measured against: reading, copying, and the leanest loop that
// takes an exponential and adds it up on data that stays in the first-level cache.
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace rlhf_fast {
namespace {

constexpr int kSums = 8;

template <class Take>
inline float sum_of(const float* in, int64_t n, Take take) {
  Float sums[kSums];
  for (Float& s : sums) s = Float::splat(0);
  for (int64_t i = 0; i + kSums * kLanes <= n; i += kSums * kLanes)
    for (int k = 0; k < kSums; ++k) sums[k] = sums[k] + take(in + i + k * kLanes);
  for (int k = 1; k < kSums; ++k) sums[0] = sums[0] + sums[k];
  return maximum(sums[0]);
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
        for (int64_t r = 0; r < a.repeats; ++r)
          sum += sum_of(in, a.n, [&](const float* p) RLHF_FAST_INLINE { return exp_of.of_finite(load(p)); });
        out[t] = sum;
      }
    });
    return -1;
  }
  for_ranges(a.n / kLanes, 4096, a.threads, [&](int64_t begin, int64_t end) {
    begin *= kLanes;
    end *= kLanes;
    if (a.kind == kRead) {
      out[begin / kLanes] = sum_of(in + begin, end - begin, [](const float* p) { return load(p); });
      return;
    }
    for (int64_t i = begin; i < end; i += kLanes) {
      prefetch(in + i + 1024);
      stream(out + i, load(in + i));
    }
    fence();
  });
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
