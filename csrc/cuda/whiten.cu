#include "cuda/whiten.cuh"

using namespace rlhf_fast::cuda;

SIMT_KERNEL(whiten_moments, kThreads, 4, WhitenTask) { whiten_moments_part(a); }
SIMT_KERNEL(whiten_apply, kThreads, 4, WhitenTask) { whiten_apply_part(a); }
SIMT_KERNEL(whiten_backward_moments, kThreads, 4, WhitenBackwardTask) { whiten_moments_part(a); }
SIMT_KERNEL(whiten_backward_sums, kThreads, 4, WhitenBackwardTask) { whiten_sums_part(a); }
SIMT_KERNEL(whiten_backward, kThreads, 4, WhitenBackwardTask) { whiten_backward_part(a); }
