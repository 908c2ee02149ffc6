// The variants of token_logprobs.cuh that ship: storage format, soft cap, reference.
#include "cuda/token_logprobs.cuh"
#include "cuda/token_logprobs_backward.cuh"

using namespace rlhf_fast;
using namespace rlhf_fast::cuda;

// Four blocks a multiprocessor hide the latency of memory with 64 registers a thread; two streams of logits need more.
#define FORWARD(suffix, T, cap, ref) \
  SIMT_KERNEL(token_logprobs_##suffix, kThreads, ref ? 2 : 4, TokenLogprobsTask) { token_logprobs_row<T, cap, ref>(a); }
#define BACKWARD(suffix, T, Out, cap, ref)                                                          \
  SIMT_KERNEL(token_logprobs_backward_##suffix, kThreads, ref ? 2 : 4, TokenLogprobsBackwardTask) { \
    token_logprobs_backward_chunk<T, Out, cap, ref>(a);                                             \
  }
#define EACH(VARIANT, suffix, ...)                \
  VARIANT(suffix, __VA_ARGS__, false, false)      \
  VARIANT(suffix##_cap, __VA_ARGS__, true, false) \
  VARIANT(suffix##_ref, __VA_ARGS__, false, true) \
  VARIANT(suffix##_cap_ref, __VA_ARGS__, true, true)

EACH(FORWARD, f32, float)
EACH(FORWARD, bf16, BFloat16)
EACH(FORWARD, f16, Float16)
EACH(BACKWARD, f32, float, float)
EACH(BACKWARD, bf16, BFloat16, BFloat16)
EACH(BACKWARD, f16, Float16, Float16)
EACH(BACKWARD, f32_to_bf16, float, BFloat16)
EACH(BACKWARD, f32_to_f16, float, Float16)
