#include "cuda/ppo_loss.h"

#include "cuda/launch.h"

namespace rlhf_fast::cuda {

int64_t ppo_loss(const PpoLossArgs& a) {
  const Parts tokens(a.n);
  PpoLossTask task{a, static_cast<int>(tokens.count), tokens.length, tokens.length};
  if (a.reduction == kSeqMeanTokenMean || a.reduction == kSeqMeanTokenSum) {
    constexpr int64_t kRows = 8;  // a warp each
    const int64_t each = (a.rows + kMaxParts - 1) / kMaxParts;
    task.count_length = (each + kRows - 1) / kRows * kRows;
    task.count_parts = static_cast<int>(a.rows ? (a.rows + task.count_length - 1) / task.count_length : 0);
  }
  // Without a token one block writes the zeros, and sets the counter before.
  const int64_t counting = task.count_parts ? task.count_parts : 1, blocks = tokens.count ? tokens.count : 1;
  if (task.count_length == 0) task.count_length = 1;
  if (const int64_t error = launch_blocks("ppo_loss_count", counting, task, a.stream)) return error;
  return launch_blocks("ppo_loss", blocks, task, a.stream);
}

}  // namespace rlhf_fast::cuda
