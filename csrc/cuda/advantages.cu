#include "cuda/advantages.cuh"

using namespace rlhf_fast::cuda;

SIMT_KERNEL(advantages, kThreads, 2, AdvantagesTask) { advantages_part(a); }
