// What the launcher of ppo_loss tells its kernel.
#pragma once

#include "common/ppo_stats.h"
#include "cuda/ops.h"

namespace rlhf_fast::cuda {

// Counting goes by parts of the rows for the seq-* reductions, and by parts of the tokens otherwise.
struct PpoLossTask : PpoLossArgs {
  int count_parts;       // 0: nothing has to be counted
  int64_t count_length;  // rows or tokens
  int parts;
  int64_t part_length;  // tokens
};

}  // namespace rlhf_fast::cuda
