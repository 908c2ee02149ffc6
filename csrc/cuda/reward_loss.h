// What the launcher of reward_loss tells its kernels.
#pragma once

#include "cuda/ops.h"

namespace rlhf_fast::cuda {

struct RewardLossTask : RewardLossArgs {
  int parts;
  int64_t part_length;
};

}  // namespace rlhf_fast::cuda
