#include "cuda/group_advantages.cuh"

using namespace rlhf_fast::cuda;

SIMT_KERNEL(group_advantages, kThreads, 2, GroupAdvantagesTask) { advantage_of_sample(a); }
SIMT_KERNEL(group_advantages_scale, kThreads, 4, GroupAdvantagesTask) { scale_sample(a); }
