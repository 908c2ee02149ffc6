// The variants of token_logprobs.cuh that ship: storage format, soft cap, reference.
#include "cuda/token_logprobs.cuh"
#include "cuda/token_logprobs_backward.cuh"

using namespace rlhf_fast;
using namespace rlhf_fast::cuda;

// Four blocks a multiprocessor hide the latency of memory with 64 registers a thread; two streams of logits need more.
#define VARIANT(suffix, T, cap, ref)                                                                \
  SIMT_KERNEL(token_logprobs_##suffix, kThreads, ref ? 2 : 4, TokenLogprobsTask) {                  \
    token_logprobs_row<T, cap, ref>(a);                                                             \
  }                                                                                                 \
  SIMT_KERNEL(token_logprobs_backward_##suffix, kThreads, ref ? 2 : 4, TokenLogprobsBackwardTask) { \
    token_logprobs_backward_chunk<T, cap, ref>(a);                                                  \
  }
#define VARIANTS(suffix, T)             \
  VARIANT(suffix, T, false, false)      \
  VARIANT(suffix##_cap, T, true, false) \
  VARIANT(suffix##_ref, T, false, true) \
  VARIANT(suffix##_cap_ref, T, true, true)

VARIANTS(f32, float)
VARIANTS(bf16, BFloat16)
VARIANTS(f16, Float16)
