// KL estimate, reward shaping, GAE, returns and the moments of the advantages in one pass over the rows; whiten.cuh
// does the whitening.
#pragma once

#include "cuda/advantages.h"
#include "cuda/kl.cuh"
#include "cuda/moments.cuh"
#include "cuda/scan.cuh"

namespace rlhf_fast::cuda {
namespace {

__device__ __forceinline__ void advantages_row(const AdvantagesArgs& a, int64_t i, MomentSums* sums) {
  Row row = row_of(a, i);
  const int64_t last = last_real(a.mask, row);
  const bool any = last >= row.begin, after = any && a.after_last && last + 1 < row.end;
  const int64_t slot = after ? last + 1 : last;  // of the score
  float* const outputs[] = {a.advantages, a.returns, a.rewards, a.kl};
  for (float* out : outputs) zero(out, slot + 1, row.end);
  row.end = slot + 1;
  const KlRules rules = {a.kl_kind, false, static_cast<float>(a.clamp_in), static_cast<float>(a.clamp_out)};
  const float coef = static_cast<float>(a.kl_coef), clip = static_cast<float>(a.score_clip);
  const float score = any && !a.token_scores ? clamp_of(a.scores[i], -clip, clip) : 0;
  scan_gae(
      {a.gamma, a.lam, a.decay_gaps}, a.values, a.mask, row, a.bootstrap ? static_cast<double>(a.bootstrap[i]) : 0.0,
      after ? slot : -1, a.advantages, a.returns,
      [&](const Group& group, const bool (&real)[kItems], float (&out)[kItems]) {
        float kl[kItems] = {}, ref[kItems], scores[kItems];
        if (a.logprobs) {
          group.load(a.logprobs, real, kl);
          group.load(a.ref_logprobs, real, ref);
#pragma unroll
          for (int k = 0; k < kItems; ++k) kl[k] = kl_of(kl[k], ref[k], rules).value;
        }
        if (a.token_scores) {
          bool scored[kItems];
#pragma unroll
          for (int k = 0; k < kItems; ++k) scored[k] = real[k] || group.first + k == slot;
          group.load(a.scores, scored, scores);
        }
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
          out[k] = real[k] ? -coef * kl[k] : 0;
          if (a.token_scores)
            out[k] += scores[k];
          else if (group.first + k == slot)
            out[k] += score;
        }
        group.store(a.kl, kl);
        group.store(a.rewards, out);
      },
      [&](const bool (&real)[kItems], const float (&advantages)[kItems]) {
#pragma unroll
        for (int k = 0; k < kItems; ++k)
          if (real[k]) sums->take(advantages[k]);
      });
}

__device__ __forceinline__ void advantages_part(const AdvantagesTask& a) {
  MomentSums sums;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * a.part_rows, end = begin + a.part_rows;
  for (int64_t i = begin; i < end && i < a.rows; ++i) advantages_row(a, i, &sums);
  if (a.whiten) save(pooled(sums.moments()), a.scratch + blockIdx.x * kMomentDoubles);
}

}  // namespace
}  // namespace rlhf_fast::cuda
