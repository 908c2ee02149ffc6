// What the launcher of group_advantages tells its kernels.
#pragma once

#include "cuda/ops.h"

namespace rlhf_fast::cuda {

enum GroupKind { kGrpo, kDrGrpo, kRloo, kReinforcePlusPlus, kOpo, kRemax, kPassAtK };  // order of reference KINDS

struct GroupAdvantagesTask : GroupAdvantagesArgs {
  int parts;  // of the batch, a block of samples each
};

}  // namespace rlhf_fast::cuda
