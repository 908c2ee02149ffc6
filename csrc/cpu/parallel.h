// Splits rows over threads. The OpenMP region lives in parallel.cpp, which is built without SIMD flags.
#pragma once

#include <stdint.h>

namespace rlhf_fast {

// Calls body(context, phase, begin, end) on disjoint ranges that cover [0, n), on at most `threads` threads and never
// with fewer than `grain` items a thread; all that for phase 0, then for phase 1, and so on: the same thread has the
// same range in every phase, and no phase starts before the one before has ended. In a forked child everything runs on
// the calling thread: OpenMP would hang there.
void parallel_for(int64_t n, int64_t grain, int threads, int phases, void (*body)(void*, int, int64_t, int64_t),
                  void* context);

namespace {

// body(phase, begin, end)
template <class Body>
inline void for_phases(int64_t n, int64_t grain, int threads, int phases, Body body) {
  parallel_for(
      n, grain, threads, phases,
      [](void* context, int phase, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(phase, begin, end); },
      &body);
}

// body(begin, end)
template <class Body>
inline void for_ranges(int64_t n, int64_t grain, int threads, Body body) {
  for_phases(n, grain, threads, 1, [&](int, int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace
}  // namespace rlhf_fast
