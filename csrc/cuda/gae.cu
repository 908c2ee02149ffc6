#include "cuda/gae.cuh"

using namespace rlhf_fast::cuda;

SIMT_KERNEL(gae, kThreads, 3, GaeArgs) { gae_row(a); }
SIMT_KERNEL(gae_backward, kThreads, 3, GaeBackwardArgs) { gae_backward_row(a); }
