// What the host launchers share.
#pragma once

#include "cuda/driver.h"
#include "cuda/ops.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int64_t kMaxGrid = 0x7fffffff;

// For four numbers a thread.
inline int64_t blocks_of(int64_t n) { return (n + 4 * kThreads - 1) / (4 * kThreads); }

// At most kMaxParts parts of an array, of whole blocks of four numbers a thread.
struct Parts {
  int64_t count, length;

  explicit Parts(int64_t n) {
    const int64_t blocks = blocks_of(n), each = (blocks + kMaxParts - 1) / kMaxParts;
    length = (each > 0 ? each : 1) * 4 * kThreads;
    count = (n + length - 1) / length;
  }
};

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
