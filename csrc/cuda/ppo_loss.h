// What the launcher of ppo_loss tells its kernels.
#pragma once

#include "cuda/ops.h"

namespace rlhf_fast::cuda {

enum Reduction { kTokenMean, kTokenSum, kSeqMeanTokenMean, kSeqMeanTokenSum };  // order of reference REDUCTIONS

// Counting goes by parts of the rows for the seq-* reductions, and by parts of the tokens otherwise.
struct PpoLossTask : PpoLossArgs {
  int count_parts;
  int64_t count_length;  // rows or tokens
  int64_t part_length;   // tokens
};

}  // namespace rlhf_fast::cuda
