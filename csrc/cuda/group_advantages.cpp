#include "cuda/group_advantages.h"

#include "cuda/launch.h"

namespace rlhf_fast::cuda {

int64_t group_advantages(const GroupAdvantagesArgs& a) {
  const int64_t blocks = (a.n + kThreads - 1) / kThreads;
  const GroupAdvantagesTask task{a, static_cast<int>(blocks)};
  if (const int64_t error = launch_blocks("group_advantages", blocks, task, a.stream)) return error;
  if (a.kind != kReinforcePlusPlus) return 0;
  return launch_blocks("group_advantages_scale", blocks, task, a.stream);
}

}  // namespace rlhf_fast::cuda
