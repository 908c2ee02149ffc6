// What the launcher of reward_loss tells its kernel.
#pragma once

#include "cuda/ops.h"

namespace rlhf_fast::cuda {

struct RewardLossTask : RewardLossArgs {
  int count_parts;  // 0: without a mask, or without a pair
  int64_t count_length;
  int parts;
  int64_t part_length;
};

}  // namespace rlhf_fast::cuda
