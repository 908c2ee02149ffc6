// What the host launchers share.
#pragma once

#include "cuda/driver.h"
#include "cuda/ops.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int64_t kMaxGrid = 0x7fffffff;

// For four numbers a thread.
inline int64_t blocks_of(int64_t n) { return (n + 4 * kThreads - 1) / (4 * kThreads); }

// At most `most` parts of an array, of whole steps: as a rule, of whole blocks of four numbers a thread.
struct Parts {
  int64_t count, length;

  explicit Parts(int64_t n, int64_t step = 4 * kThreads, int64_t most = kMaxParts) {
    const int64_t steps = (n + step - 1) / step, each = (steps + most - 1) / most;
    length = (each > 0 ? each : 1) * step;
    count = (n + length - 1) / length;
  }
};

// The parts that are counted before a loss.
inline Parts slots_to_count(int64_t n) { return Parts(n, 4 * kThreads * kCountGroups, kCountParts); }
inline Parts rows_to_count(int64_t rows) { return Parts(rows, kThreads / 32, kCountParts); }  // a warp each

// Launches `blocks` blocks of `kernel` with one argument struct, none when there are none.
template <class Task>
int64_t launch_blocks(const char* kernel, int64_t blocks, const Task& task, void* stream) {
  if (blocks == 0) return 0;
  Task copy = task;
  void* arguments[] = {&copy};
  return launch(kernel, {static_cast<unsigned>(blocks), 1, 1}, kThreads, 0, stream, arguments);
}

}  // namespace
}  // namespace rlhf_fast::cuda
