// token_logprobs with every template argument in some variant: the sanitizers take long to compile all.
#include "cuda/token_logprobs.cuh"
#include "cuda/token_logprobs_backward.cuh"

using namespace rlhf_fast;
using namespace rlhf_fast::cuda;

#define VARIANT(suffix, T, Out, cap, ref)                                                                      \
  SIMT_KERNEL(token_logprobs_##suffix, kThreads, 1, TokenLogprobsTask) { token_logprobs_row<T, cap, ref>(a); } \
  SIMT_KERNEL(token_logprobs_backward_##suffix, kThreads, 1, TokenLogprobsBackwardTask) {                      \
    token_logprobs_backward_chunk<T, Out, cap, ref>(a);                                                        \
  }

VARIANT(bf16, BFloat16, BFloat16, false, false)
#if !defined(ONE_VARIANT)
VARIANT(f32_cap, float, float, true, false)
VARIANT(f16_ref, Float16, Float16, false, true)
SIMT_KERNEL(token_logprobs_backward_f32_to_bf16_cap, kThreads, 1, TokenLogprobsBackwardTask) {
  token_logprobs_backward_chunk<float, BFloat16, true, false>(a);
}
#endif
