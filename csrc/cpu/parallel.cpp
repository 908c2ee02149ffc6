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

void parallel_for(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (n <= 0) return;
  const int64_t most = grain > 0 ? (n + grain - 1) / grain : n;
  int64_t workers = threads < most ? threads : most;
  if (workers <= 1 || forked.load(std::memory_order_relaxed)) return body(context, 0, n);
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(workers))
  {
    // The runtime may grant fewer threads than asked for, so the split follows what it granted.
    const int64_t count = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t begin = n * i / count, end = n * (i + 1) / count;
    if (begin < end) body(context, begin, end);
  }
#else
  body(context, 0, n);
#endif
}

}  // namespace rlhf_fast
