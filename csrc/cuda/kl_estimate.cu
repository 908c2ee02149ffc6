#include "cuda/kl_estimate.cuh"

using namespace rlhf_fast::cuda;

SIMT_KERNEL(kl_estimate, kThreads, 4, KlEstimateArgs) { kl_estimate_group(a); }
SIMT_KERNEL(kl_estimate_backward, kThreads, 4, KlEstimateBackwardArgs) { kl_estimate_backward_group(a); }
