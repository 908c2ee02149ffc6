#include "cuda/reward_loss.h"

#include "cuda/launch.h"

namespace rlhf_fast::cuda {

int64_t reward_loss(const RewardLossArgs& a) {
  const Parts parts(a.n), counts = slots_to_count(a.mask ? a.n : 0);
  const int64_t blocks = parts.count ? parts.count : 1;  // without a pair one block writes the zeros
  const RewardLossTask task{a, static_cast<int>(counts.count), counts.length, static_cast<int>(blocks), parts.length};
  return launch_blocks("reward_loss", counts.count + blocks, task, a.stream);
}

}  // namespace rlhf_fast::cuda
