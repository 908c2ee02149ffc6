#include "cuda/reward_loss.cuh"

using namespace rlhf_fast::cuda;

SIMT_KERNEL(reward_loss_count, kThreads, 4, RewardLossTask) { reward_loss_count_part(a); }
SIMT_KERNEL(reward_loss, kThreads, 2, RewardLossTask) { reward_loss_part(a); }
