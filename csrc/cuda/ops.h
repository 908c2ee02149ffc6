// The CUDA core's interface: one plain argument struct per launcher, and one line per launcher in the list below.
//
// Pointers are raw device memory; (n, m) are shapes in elements. Optional pointers are null. Python fills the structs
// by position, so the order of the fields is part of the ABI: changing it means raising kAbi. "Scratch" need not be
// initialised; how much there has to be is a constant below or in the comment.
//
// Launchers run on the current device and on `stream`; they neither allocate nor wait. They return 0, or the CUresult
// of the launch that failed. Device code takes the same structs, so they hold no more than NVRTC knows.
#pragma once

#include "common/dtype.h"
#include "common/portable.h"

namespace rlhf_fast::cuda {

constexpr int kAbi = 3;
constexpr int kThreads = 256;  // of every block

// The vocabulary is summed in slices, a few of which make a row long enough for several blocks. Their number depends on
// the vocabulary alone.
constexpr int64_t kSlice = 65536;                     // at most
constexpr int kSliceFloats = 3, kRefSliceFloats = 8;  // of what a thread keeps of a slice

// Arrays are summed in at most so many parts, which depend on their size alone, and the parts in their order.
constexpr int kMaxParts = 1024;
constexpr int kMomentDoubles = 3, kSumDoubles = 2;  // of a part, in the scratch memory of whiten and advantages

// Counting is one byte a token: few blocks, with several loads of each thread on their way.
constexpr int kCountParts = 256, kCountGroups = 4;  // at most; of four slots, a thread's at a time

constexpr int kPpoNumbers = 23;  // of a part of ppo_loss: sums, counts, extremes, centres
constexpr int kRewardNumbers = 5;

using Counter = unsigned long long;  // what a launch counts its blocks with; launches that share some follow each other

struct GaeArgs {
  const float* rewards;       // (rows, length) or (cu_seqlens[rows],)
  const float* values;        // as rewards
  const uint8_t* mask;        // as rewards, or null: all real
  const float* bootstrap;     // (rows,) or null
  const int64_t* cu_seqlens;  // (rows + 1,) or null: padded
  float* advantages;          // as rewards
  float* returns;             // as rewards
  int64_t rows, length, n;    // n: all slots
  double gamma, lam;
  bool decay_gaps;
  void* stream;
};

struct GaeBackwardArgs {
  const float* grad_advantages;  // (rows, length) or (cu_seqlens[rows],)
  const float* grad_returns;     // as grad_advantages
  const uint8_t* mask;           // as grad_advantages, or null
  const int64_t* cu_seqlens;     // (rows + 1,) or null
  float* grad_rewards;           // as grad_advantages
  float* grad_values;            // as grad_advantages
  float* grad_bootstrap;         // (rows,)
  int64_t rows, length, n;       // n: all slots
  double gamma, lam;
  bool decay_gaps;
  void* stream;
};

struct KlEstimateArgs {
  const float* logprobs;      // (n,)
  const float* ref_logprobs;  // (n,)
  const uint8_t* mask;        // (n,) or null
  float* out;                 // (n,)
  int64_t n;
  int kind;                    // KlKind of common/token_losses.h
  double clamp_in, clamp_out;  // infinity for none
  void* stream;
};

struct KlEstimateBackwardArgs {
  const float* grad;          // (n,)
  const float* logprobs;      // (n,)
  const float* ref_logprobs;  // (n,)
  const uint8_t* mask;        // (n,) or null
  float* grad_logprobs;       // (n,)
  int64_t n;
  int kind;
  bool straight_through;  // gradient of k2
  double clamp_in, clamp_out;
  void* stream;
};

struct WhitenArgs {
  const float* x;       // (n,)
  const uint8_t* mask;  // (n,) or null
  float* out;           // (n,); may be x
  double* scratch;      // (kMaxParts, 3)
  int64_t n;
  bool shift_mean, unbiased;
  double eps;
  void* stream;
};

struct WhitenBackwardArgs {
  const float* grad;    // (n,)
  const float* x;       // (n,)
  const uint8_t* mask;  // (n,) or null
  float* grad_x;        // (n,)
  double* scratch;      // (kMaxParts, 3 + 2)
  int64_t n;
  bool shift_mean, unbiased;
  bool floor_variance;  // scale by 1 / sqrt(max(var, eps))
  double eps;
  void* stream;
};

struct AdvantagesArgs {
  const float* scores;        // (rows,), or as values with token_scores
  const float* values;        // (rows, length) or (cu_seqlens[rows],)
  const uint8_t* mask;        // as values
  const float* logprobs;      // as values, or null
  const float* ref_logprobs;  // as values, or null
  const float* bootstrap;     // (rows,) or null
  const int64_t* cu_seqlens;  // (rows + 1,) or null: padded
  float* advantages;          // as values
  float* returns;             // as values
  float* rewards;             // as values
  float* kl;                  // as values
  double* scratch;            // (kMaxParts, 3); or null without whiten
  int64_t rows, length, n;    // n: all slots
  bool token_scores;
  double kl_coef;
  int kl_kind;
  double clamp_in, clamp_out, score_clip;
  bool after_last;  // the score goes to the slot after the last real token
  double gamma, lam;
  bool decay_gaps, whiten, unbiased, floor_variance;
  double eps;
  void* stream;
};

struct GroupAdvantagesArgs {
  const float* grad;         // (n,): backward; null: forward
  const float* scores;       // (n,)
  const int64_t* group_ids;  // (n,)
  const uint8_t* mask;       // (n,) or null
  const int64_t* lengths;    // (n,), for opo
  const float* greedy;       // (n,), for remax
  float* out;                // (n,): advantages, or the gradient of the scores
  double* scratch;           // (n, 4) and (blocks of kThreads samples, 2)
  int64_t n;
  int kind;  // GroupKind of group_advantages.cuh
  bool unbiased;
  double eps;
  void* stream;
};

struct RewardLossArgs {
  const float* chosen;    // (n,)
  const float* rejected;  // (n,)
  const float* margin;    // (n,) or null
  const uint8_t* mask;    // (n,) or null
  float* loss;            // (1,)
  float* stats;           // (6,): accuracy, margin, chosen, rejected, center, pairs
  float* grads;           // (2, n) of chosen and rejected, or null
  Counter* counters;      // (4,) of zeros, before and after
  double* scratch;        // (kMaxParts, 5)
  int64_t n;
  double center_coef, smoothing;
  void* stream;
};

struct PpoLossArgs {
  const float* logprobs;  // (rows, length) or (n,); so are all arrays below unless said otherwise
  const float* old_logprobs;
  const float* advantages;
  const uint8_t* mask;
  const float* entropy;             // or null
  const float* ref_logprobs;        // or null
  const float* values;              // or null
  const float* old_values;          // or null: no value clipping
  const float* returns;             // null without values
  const float* importance_weights;  // or null
  const float* normalizer;          // (1,) or null
  const int64_t* cu_seqlens;        // (rows + 1,) or null: padded
  float* loss;                      // (1,)
  float* stats;                     // (16,), named in rlhf_fast/reference/ppo_loss.py
  float* grad_logprobs;             // or null: no gradients
  float* grad_entropy;              // or null
  float* grad_values;               // or null
  int64_t* lengths;                 // (rows,) scratch, for seq-mean-token-mean; else null
  Counter* counters;                // (4,) of zeros, before and after
  double* scratch;                  // (kMaxParts, 23)
  int64_t rows, length, n;
  bool weights;  // the ratio is a weight without gradient, for which there is no dual clip
  double clip_low, clip_high, dual_clip, ratio_clamp;
  double entropy_coef, kl_coef;
  int kl_kind;
  bool kl_straight_through;
  double kl_clamp_in, kl_clamp_out, value_clip, value_coef;
  int reduction;   // Reduction of common/ppo_stats.h
  double divisor;  // denominator, when positive
  void* stream;
};

// Row i of the logits starts at (i / inner) * outer_stride + (i % inner) * inner_stride; the vocabulary has stride 1.
// A masked row is never read, nor are its id and temperature. A row whose id or temperature is out of range gives NaN.
struct TokenLogprobsArgs {
  const void* logits;        // (rows, vocab), `dtype`
  const void* ref_logits;    // (rows, vocab), `dtype`, or null
  const void* token_ids;     // (rows,), int64 or (ids32) int32
  const uint8_t* mask;       // (rows,), or null: all real
  const float* temperature;  // (rows,), or null: `temperature_value`
  float* logprobs;           // (rows,)
  float* entropy;            // (rows,)
  float* logsumexp;          // (rows,)
  float* kl;                 // (rows,), or null without ref_logits
  float* state;              // (rows, 3 or with ref_logits 6): what the backward needs; or null
  float* scratch;            // (rows, slices, 3 or with ref_logits 8, kThreads), or null: one block a row
  int64_t rows, vocab, inner, outer_stride, inner_stride, ref_outer_stride, ref_inner_stride;
  double temperature_value, softcap;  // softcap 0: none
  int dtype;                          // Dtype of csrc/common/dtype.h, not kFloat64
  bool ids32;
  void* stream;
};

struct TokenLogprobsBackwardArgs {
  const void* logits;      // as in the forward
  const void* ref_logits;  // as in the forward, or null when grad_kl is
  const void* token_ids;
  const uint8_t* mask;
  const float* temperature;
  const float* state;          // as the forward left it
  const float* grad_logprobs;  // (rows,), or null: 0; so the other three
  const float* grad_entropy;
  const float* grad_logsumexp;
  const float* grad_kl;
  void* grad_logits;  // (rows, vocab), rows grad_stride apart, `grad_dtype`; may be the logits themselves
  int64_t rows, vocab, inner, outer_stride, inner_stride, ref_outer_stride, ref_inner_stride, state_width, grad_stride;
  double temperature_value, softcap;
  int dtype, grad_dtype;  // the same, or a narrow gradient of fp32 logits
  bool ids32;
  void* stream;
};

}  // namespace rlhf_fast::cuda

// KERNEL(name, argument struct)
#define RLHF_FAST_CUDA_KERNELS(KERNEL)                       \
  KERNEL(advantages, AdvantagesArgs)                         \
  KERNEL(gae, GaeArgs)                                       \
  KERNEL(gae_backward, GaeBackwardArgs)                      \
  KERNEL(group_advantages, GroupAdvantagesArgs)              \
  KERNEL(kl_estimate, KlEstimateArgs)                        \
  KERNEL(kl_estimate_backward, KlEstimateBackwardArgs)       \
  KERNEL(ppo_loss, PpoLossArgs)                              \
  KERNEL(reward_loss, RewardLossArgs)                        \
  KERNEL(token_logprobs, TokenLogprobsArgs)                  \
  KERNEL(token_logprobs_backward, TokenLogprobsBackwardArgs) \
  KERNEL(whiten, WhitenArgs)                                 \
  KERNEL(whiten_backward, WhitenBackwardArgs)

#if !defined(__CUDACC__)
namespace rlhf_fast::cuda {
#define RLHF_FAST_DECLARE(name, Args) int64_t name(const Args&);
RLHF_FAST_CUDA_KERNELS(RLHF_FAST_DECLARE)
#undef RLHF_FAST_DECLARE
}  // namespace rlhf_fast::cuda
#endif
