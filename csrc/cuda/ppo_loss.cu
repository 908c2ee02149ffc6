#include "cuda/ppo_loss.cuh"

using namespace rlhf_fast::cuda;

SIMT_KERNEL(ppo_loss_count, kThreads, 4, PpoLossTask) { ppo_loss_count_part(a); }
SIMT_KERNEL(ppo_loss, kThreads, 2, PpoLossTask) { ppo_loss_part(a); }
