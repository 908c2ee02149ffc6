#include "cuda/ppo_loss.cuh"

using namespace rlhf_fast::cuda;

SIMT_KERNEL(ppo_loss, kThreads, 2, PpoLossTask) { ppo_loss_block(a); }
