// The native core's interface: one plain argument struct per kernel (those of layers in layer_args.h), and one line per
// kernel in the list below.
//
// Pointers are raw; (n, m) are shapes in elements; "wide" buffers are float, or double when `f64` is set. Optional
// pointers are null. Python fills the structs by position (csrc/bindings.cpp), so the order of the fields is part of
// the ABI: changing it means raising kAbi here and ABI in rlhf_fast/_native.py.
//
// Every kernel returns -1, or the index of the first row it refuses (a token id or a temperature out of range).
#pragma once

#include <stdint.h>

#include "layer_args.h"

namespace rlhf_fast {

constexpr int kAbi = 9;

struct GaeArgs {
  const void* rewards;        // (rows, length) or (cu_seqlens[rows],), wide
  const void* values;         // as rewards
  const uint8_t* mask;        // as rewards, or null: all real
  const void* bootstrap;      // (rows,) or null, wide
  const int64_t* cu_seqlens;  // (rows + 1,) or null: padded
  void* advantages;           // as rewards
  void* returns;              // as rewards
  int64_t rows, length;
  double gamma, lam;
  bool decay_gaps, f64;
  int threads;
};

struct GaeBackwardArgs {
  const void* grad_advantages;  // (rows, length) or (cu_seqlens[rows],), wide
  const void* grad_returns;     // as grad_advantages
  const uint8_t* mask;          // as grad_advantages, or null
  const int64_t* cu_seqlens;    // (rows + 1,) or null
  void* grad_rewards;           // as grad_advantages
  void* grad_values;            // as grad_advantages
  void* grad_bootstrap;         // (rows,)
  int64_t rows, length;
  double gamma, lam;
  bool decay_gaps, f64;
  int threads;
};

struct KlEstimateArgs {
  const void* logprobs;      // (n,), wide
  const void* ref_logprobs;  // (n,), wide
  const uint8_t* mask;       // (n,) or null
  void* out;                 // (n,), wide
  int64_t n;
  int kind;                    // KlKind of common/token_losses.h
  double clamp_in, clamp_out;  // infinity for none
  bool f64;
  int threads;
};

struct KlEstimateBackwardArgs {
  const void* grad;          // (n,), wide
  const void* logprobs;      // (n,), wide
  const void* ref_logprobs;  // (n,), wide
  const uint8_t* mask;       // (n,) or null
  void* grad_logprobs;       // (n,), wide
  int64_t n;
  int kind;
  bool straight_through;  // gradient of k2
  double clamp_in, clamp_out;
  bool f64;
  int threads;
};

struct WhitenArgs {
  const void* x;        // (n,), wide
  const uint8_t* mask;  // (n,) or null
  void* out;            // (n,), wide
  int64_t n;
  bool shift_mean, unbiased;
  double eps;
  bool f64;
  int threads;
};

struct WhitenBackwardArgs {
  const void* grad;     // (n,), wide
  const void* x;        // (n,), wide
  const uint8_t* mask;  // (n,) or null
  void* grad_x;         // (n,), wide
  int64_t n;
  bool shift_mean, unbiased;
  bool floor_variance;  // scale by 1 / sqrt(max(var, eps))
  double eps;
  bool f64;
  int threads;
};

struct AdvantagesArgs {
  const void* scores;         // (rows,), or as values with token_scores; wide
  const void* values;         // (rows, length) or (cu_seqlens[rows],), wide
  const uint8_t* mask;        // as values
  const void* logprobs;       // as values, or null
  const void* ref_logprobs;   // as values, or null
  const void* bootstrap;      // (rows,) or null, wide
  const int64_t* cu_seqlens;  // (rows + 1,) or null: padded
  void* advantages;           // as values
  void* returns;              // as values
  void* rewards;              // as values
  void* kl;                   // as values
  int64_t rows, length, n;    // n: all slots
  bool token_scores;
  double kl_coef;
  int kl_kind;
  double clamp_in, clamp_out, score_clip;
  bool after_last;  // the score goes to the slot after the last real token
  double gamma, lam;
  bool decay_gaps, whiten, unbiased, floor_variance;
  double eps;
  bool f64;
  int threads;
};

struct GroupAdvantagesArgs {
  const void* grad;          // (n,) wide: backward; null: forward
  const void* scores;        // (n,), wide
  const int64_t* group_ids;  // (n,)
  const uint8_t* mask;       // (n,) or null
  const int64_t* lengths;    // (n,), for opo
  const void* greedy;        // (n,) wide, for remax
  void* out;                 // (n,), wide: advantages, or the gradient of the scores
  int64_t* scratch;          // (slots + 6 n,)
  int64_t n, slots;          // slots: a power of two >= 2 n
  int kind;                  // GroupKind of group_advantages.cpp
  bool unbiased;
  double eps;
  bool f64;
};

struct RewardLossArgs {
  const void* chosen;    // (n,), wide
  const void* rejected;  // (n,), wide
  const void* margin;    // (n,) or null, wide
  const uint8_t* mask;   // (n,) or null
  void* loss;            // (1,), wide
  void* stats;           // (6,), wide: accuracy, margin, chosen, rejected, center, pairs
  void* grads;           // (2, n) of chosen and rejected, wide, or null
  int64_t n;
  double center_coef, smoothing;
  bool f64;
  int threads;
};

struct PpoLossArgs {
  const void* logprobs;  // (rows, length) or (n,), wide; so are all arrays below unless said otherwise
  const void* old_logprobs;
  const void* advantages;
  const uint8_t* mask;
  const void* entropy;             // or null
  const void* ref_logprobs;        // or null
  const void* values;              // or null
  const void* old_values;          // or null: no value clipping
  const void* returns;             // null without values
  const void* importance_weights;  // or null
  const void* normalizer;          // (1,), wide, or null
  const int64_t* cu_seqlens;       // (rows + 1,) or null: padded
  void* loss;                      // (1,)
  void* stats;                     // (16,), named in rlhf_fast/reference/ppo_loss.py
  void* grad_logprobs;             // or null: no gradients
  void* grad_entropy;              // or null
  void* grad_values;               // or null
  int64_t* lengths;                // (rows,) working memory, for seq-mean-token-mean and with row_ratios
  void* row_ratios;                // (rows, 3) double, working memory; null for kToken
  int64_t rows, length, n;
  int level, surrogate;  // Level and Surrogate of common/token_losses.h
  double clip_low, clip_high, dual_clip, ratio_clamp;
  double entropy_coef, kl_coef;
  int kl_kind;
  bool kl_straight_through;
  double kl_clamp_in, kl_clamp_out, value_clip, value_coef;
  int reduction;   // Reduction of ppo_loss.cpp
  double divisor;  // denominator, when positive
  bool f64;
  int threads;
};

// Working memory of dpo_loss, for an answer.
struct DpoLossRow {
  double compared;  // the sum of its log-ratios (log-probs without a reference), or their mean
  double part;      // of that, of each token: 1, or 1 / length
};

struct DpoLossArgs {
  const void* chosen;                  // (pairs, chosen_length) or (chosen_cu_seqlens[pairs],), wide, as all below
  const void* rejected;                // the same with its own length
  const void* ref_chosen;              // as chosen, or null
  const void* ref_rejected;            // as rejected, or null
  const uint8_t* chosen_mask;          // as chosen, or null: all real
  const uint8_t* rejected_mask;        // as rejected, or null
  const uint8_t* mask;                 // (pairs,) or null: all real
  const void* weights;                 // (pairs,) or null
  const void* normalizer;              // (1,) or null
  const int64_t* chosen_cu_seqlens;    // (pairs + 1,) or null: padded
  const int64_t* rejected_cu_seqlens;  // the same
  void* loss;                          // (1,)
  void* rewards;                       // (2, pairs)
  void* grad_chosen;                   // as chosen, or null
  void* grad_rejected;                 // as rejected, or null
  DpoLossRow* rows;                    // (2, pairs)
  int64_t pairs, chosen_length, rejected_length;
  int64_t n;                   // tokens of both
  double beta, scale, offset;  // rewards: beta x what is compared; the loss is a curve of scale x gap - offset
  int curve;                   // Curve of dpo_loss.cpp
  double win, lose;
  bool average;
  double divisor;  // denominator, when positive
  bool f64;
  int threads;
};

enum Limit { kRead, kCopy, kExp };

struct MachineLimitArgs {
  const void* in;  // (n,) float, aligned to 64 bytes
  void* out;       // as in
  int64_t n;
  int kind;         // Limit
  int64_t repeats;  // of kExp
  int threads;
};

// Row i of the logits starts at (i / inner) * outer_stride + (i % inner) * inner_stride; the vocabulary has stride 1.
// A masked row is never read, nor are its id and temperature.
struct TokenLogprobsArgs {
  const void* logits;       // (rows, vocab), `dtype`
  const void* ref_logits;   // (rows, vocab), `dtype`, or null
  const void* token_ids;    // (rows,), int64 or (ids32) int32
  const uint8_t* mask;      // (rows,), or null: all real
  const void* temperature;  // (rows,), wide, or null: `temperature_value`
  void* logprobs;           // (rows,), wide
  void* entropy;            // (rows,), wide
  void* logsumexp;          // (rows,), wide
  void* kl;                 // (rows,), wide, or null without ref_logits
  void* state;              // (rows, 3 or with ref_logits 6), wide: what the backward needs; or null
  int64_t rows, vocab, inner, outer_stride, inner_stride, ref_outer_stride, ref_inner_stride;
  double temperature_value, softcap;  // softcap 0: none
  int dtype;                          // Dtype of csrc/common/dtype.h; wide is double for kFloat64
  bool ids32;
  int threads;
};

// The rows of the logits as in TokenLogprobsArgs. A row without a distribution (it holds NaN or +inf, or nothing but
// -inf) gets token -1 and NaN.
struct SampleTokensArgs {
  const void* logits;       // (rows, vocab), `dtype`
  const double* uniform;    // (rows,), in [0, 1); not read where the temperature is 0
  const int64_t* banned;    // (bans,) ids of probability 0, or null
  const uint8_t* mask;      // (rows,), or null: all real
  const void* temperature;  // (rows,), wide, or null: `temperature_value`; 0 takes the most likely token
  int64_t* token_ids;       // (rows,)
  void* logprobs;           // (rows,), wide
  void* entropy;            // (rows,), wide
  int64_t rows, vocab, inner, outer_stride, inner_stride, bans;
  double temperature_value, softcap;
  int dtype;
  int threads;
};

struct TokenLogprobsBackwardArgs {
  const void* logits;      // as in the forward
  const void* ref_logits;  // as in the forward, or null when grad_kl is
  const void* token_ids;
  const uint8_t* mask;
  const void* temperature;
  const void* state;          // as the forward left it
  const void* grad_logprobs;  // (rows,), wide, or null: 0; so the other three
  const void* grad_entropy;
  const void* grad_logsumexp;
  const void* grad_kl;
  void* grad_logits;  // (rows, vocab), rows grad_stride apart, `dtype`; may be the logits themselves
  int64_t rows, vocab, inner, outer_stride, inner_stride, ref_outer_stride, ref_inner_stride, state_width, grad_stride;
  double temperature_value, softcap;
  int dtype;
  bool ids32;
  int threads;
};

}  // namespace rlhf_fast

// KERNEL(name, argument struct) of those that multiply or write bf16.
#define RLHF_FAST_BF16_KERNELS(KERNEL)                       \
  KERNEL(cached_attention, CachedAttentionArgs)              \
  KERNEL(lora_linear, LoraLinearArgs)                        \
  KERNEL(matmul, MatmulArgs)                                 \
  KERNEL(pack_linear, PackLinearArgs)                        \
  KERNEL(packed_linear, PackedLinearArgs)                    \
  KERNEL(rms_norm, RmsNormArgs)                              \
  KERNEL(rms_norm_backward, RmsNormBackwardArgs)             \
  KERNEL(rotary, RotaryArgs)                                 \
  KERNEL(silu_mul, SiluMulArgs)                              \
  KERNEL(silu_mul_backward, SiluMulBackwardArgs)             \
  KERNEL(token_logprobs, TokenLogprobsArgs)                  \
  KERNEL(token_logprobs_backward, TokenLogprobsBackwardArgs) \
  KERNEL(varlen_attention, VarlenAttentionArgs)

// The others: instructions for bf16 would change nothing in them, and the variant avx512bf16 has them of avx512.
#define RLHF_FAST_OTHER_KERNELS(KERNEL)                \
  KERNEL(advantages, AdvantagesArgs)                   \
  KERNEL(dpo_loss, DpoLossArgs)                        \
  KERNEL(gae, GaeArgs)                                 \
  KERNEL(gae_backward, GaeBackwardArgs)                \
  KERNEL(group_advantages, GroupAdvantagesArgs)        \
  KERNEL(kl_estimate, KlEstimateArgs)                  \
  KERNEL(kl_estimate_backward, KlEstimateBackwardArgs) \
  KERNEL(machine_limit, MachineLimitArgs)              \
  KERNEL(ppo_loss, PpoLossArgs)                        \
  KERNEL(reward_loss, RewardLossArgs)                  \
  KERNEL(sample_tokens, SampleTokensArgs)              \
  KERNEL(whiten, WhitenArgs)                           \
  KERNEL(whiten_backward, WhitenBackwardArgs)

#define RLHF_FAST_KERNELS(KERNEL) RLHF_FAST_BF16_KERNELS(KERNEL) RLHF_FAST_OTHER_KERNELS(KERNEL)

// ISA(name): the variants every kernel is compiled for, best first; build and run-time choice follow this list.
#if defined(__x86_64__) || defined(_M_X64)
#define RLHF_FAST_ISAS(ISA) ISA(avx512bf16) ISA(avx512) ISA(avx2) ISA(scalar)
#else
#define RLHF_FAST_ISAS(ISA) ISA(scalar)
#endif

namespace rlhf_fast {
#define RLHF_FAST_DECLARE(name, Args) int64_t name(const Args&);
#define RLHF_FAST_DECLARE_ISA(isa)     \
  namespace isa {                      \
  RLHF_FAST_KERNELS(RLHF_FAST_DECLARE) \
  }
RLHF_FAST_ISAS(RLHF_FAST_DECLARE_ISA)
#undef RLHF_FAST_DECLARE_ISA
#undef RLHF_FAST_DECLARE

struct KernelTable {
#define RLHF_FAST_POINTER(name, Args) int64_t (*name)(const Args&);
  RLHF_FAST_KERNELS(RLHF_FAST_POINTER)
#undef RLHF_FAST_POINTER
};

struct Isa {
  const char* name;
  const KernelTable* kernels;
  bool supported;  // by the processor and the operating system
};

// All variants in this build, best first; `count` receives how many.
const Isa* isas(int* count);
// The variant in use. The first call picks the best one the processor supports.
const Isa* active_isa();
// False when the name is unknown or the processor lacks it.
bool select_isa(const char* name);

}  // namespace rlhf_fast
