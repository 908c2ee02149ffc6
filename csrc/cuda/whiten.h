// What the launchers of whiten and advantages tell the kernels of whiten.
#pragma once

#include "cuda/ops.h"

namespace rlhf_fast::cuda {

// (x - mean) scale of the parts in the scratch memory, 0 where masked.
struct WhitenTask : WhitenArgs {
  bool floor_variance;
  int parts;
  int64_t part_length;
};

struct WhitenBackwardTask : WhitenBackwardArgs {
  int parts;
  int64_t part_length;
};

}  // namespace rlhf_fast::cuda
