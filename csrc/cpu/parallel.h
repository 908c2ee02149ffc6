// Splits rows over threads. The OpenMP region lives in parallel.cpp, which is built without SIMD flags.
#pragma once

#include <stdint.h>

namespace rlhf_fast {

// Calls body(context, begin, end) on disjoint ranges that cover [0, n), on at most `threads` threads and never with
// fewer than `grain` items a thread. In a forked child everything runs on the calling thread: OpenMP would hang there.
void parallel_for(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context);

namespace {

template <class Body>
inline void for_ranges(int64_t n, int64_t grain, int threads, Body body) {
  parallel_for(
      n, grain, threads, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
      &body);
}

}  // namespace
}  // namespace rlhf_fast
