// What the launcher of advantages tells its kernel.
#pragma once

#include "cuda/ops.h"

namespace rlhf_fast::cuda {

// Each block takes the rows [part, part + 1) * part_rows.
struct AdvantagesTask : AdvantagesArgs {
  int64_t part_rows;
};

}  // namespace rlhf_fast::cuda
