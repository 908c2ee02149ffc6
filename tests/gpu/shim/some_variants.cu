// token_logprobs with every template argument in some variant: the sanitizers take long to compile all.
#include "cuda/token_logprobs.cuh"
#include "cuda/token_logprobs_backward.cuh"

using namespace rlhf_fast;
using namespace rlhf_fast::cuda;

#define VARIANT(suffix, T, cap, ref)                                                                           \
  SIMT_KERNEL(token_logprobs_##suffix, kThreads, 1, TokenLogprobsTask) { token_logprobs_row<T, cap, ref>(a); } \
  SIMT_KERNEL(token_logprobs_backward_##suffix, kThreads, 1, TokenLogprobsBackwardTask) {                      \
    token_logprobs_backward_chunk<T, cap, ref>(a);                                                             \
  }

VARIANT(bf16, BFloat16, false, false)
#if !defined(ONE_VARIANT)
VARIANT(f32_cap, float, true, false)
VARIANT(f16_ref, Float16, false, true)
#endif
