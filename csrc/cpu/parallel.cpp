#include "parallel.h"

#include <atomic>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace rlhf_fast {
namespace {

std::atomic<bool> forked{false};
#if !defined(_WIN32)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif

}  // namespace

void parallel_for(int64_t n, int64_t grain, int threads, int phases, void (*body)(void*, int, int64_t, int64_t),
                  void* context) {
  if (n <= 0) return;
  const auto alone = [=] {
    for (int phase = 0; phase < phases; ++phase) body(context, phase, 0, n);
  };
  const int64_t most = grain > 0 ? (n + grain - 1) / grain : n;
  int64_t workers = threads < most ? threads : most;
  if (workers <= 1 || forked.load(std::memory_order_relaxed)) return alone();
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(workers))
  {
    // The runtime may grant fewer threads than asked for, so the split follows what it granted.
    const int64_t count = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t begin = n * i / count, end = n * (i + 1) / count;
    for (int phase = 0; phase < phases; ++phase) {
      if (phase > 0) {
#pragma omp barrier
      }
      if (begin < end) body(context, phase, begin, end);
    }
  }
#else
  alone();
#endif
}

}  // namespace rlhf_fast
