#include "cuda/reward_loss.h"

#include "cuda/launch.h"

namespace rlhf_fast::cuda {

int64_t reward_loss(const RewardLossArgs& a) {
  const Parts parts(a.n);
  const RewardLossTask task{a, static_cast<int>(parts.count), parts.length};
  const int64_t blocks = parts.count ? parts.count : 1;  // without a pair one block writes the zeros
  if (const int64_t error = launch_blocks("reward_loss_count", blocks, task, a.stream)) return error;
  return launch_blocks("reward_loss", blocks, task, a.stream);
}

}  // namespace rlhf_fast::cuda
