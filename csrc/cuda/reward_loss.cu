#include "cuda/reward_loss.cuh"

using namespace rlhf_fast::cuda;

SIMT_KERNEL(reward_loss, kThreads, 2, RewardLossTask) { reward_loss_block(a); }
