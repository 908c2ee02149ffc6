// KL estimate, reward shaping, GAE, returns and whitening in one call: a pass over every row, then the whitening.
#include "gae_rows.h"
#include "kl.h"
#include "ops.h"

namespace rlhf_fast {
namespace {

template <class T>
struct Arrays {
  const T *scores, *values, *logprobs, *ref, *bootstrap;
  T *advantages, *returns, *rewards, *kl;

  explicit Arrays(const AdvantagesArgs& a)
      : scores(static_cast<const T*>(a.scores)),
        values(static_cast<const T*>(a.values)),
        logprobs(static_cast<const T*>(a.logprobs)),
        ref(static_cast<const T*>(a.ref_logprobs)),
        bootstrap(static_cast<const T*>(a.bootstrap)),
        advantages(static_cast<T*>(a.advantages)),
        returns(static_cast<T*>(a.returns)),
        rewards(static_cast<T*>(a.rewards)),
        kl(static_cast<T*>(a.kl)) {}
};

// KL and token rewards of the n slots from `begin` on; kl and rewards begin there.
template <class T>
void shape_rewards(const AdvantagesArgs& a, const Arrays<T>& x, int64_t begin, int n, T* __restrict kl,
                   T* __restrict rewards) {
  const uint8_t* mask = a.mask + begin;
  if (x.logprobs) {
    estimate(x.logprobs + begin, x.ref + begin, mask, kl, 0, n, a.kl_kind, static_cast<T>(a.clamp_in),
             static_cast<T>(a.clamp_out), false);
    const T coef = static_cast<T>(a.kl_coef);
    for (int i = 0; i < n; ++i) rewards[i] = -coef * kl[i];
  } else {
    memset(kl, 0, sizeof(T) * n);
    memset(rewards, 0, sizeof(T) * n);
  }
  if (a.token_scores)
    for (int i = 0; i < n; ++i) rewards[i] += mask[i] ? x.scores[begin + i] : T(0);
}

template <class T>
void run(const AdvantagesArgs& a) {
  const Arrays<T> x(a);
  const GaeRules rules{a.gamma, a.lam, a.decay_gaps};
  const bool past = a.n * static_cast<int64_t>(7 * sizeof(T)) > kStreamBytes;
  // The advantages stay in the caches for the whitening.
  const GaeArrays<T> scanned{x.values, a.mask, x.advantages, x.returns, past && !a.whiten, past};
  const T clip = static_cast<T>(a.score_clip);
  const auto run_row = [&](GaeRowScan<T>* scan, int64_t i, MomentSums<T>* sums) {
    Row row = row_of(a, i);
    alignas(kLine) T staged[2][kBlock];  // KL and rewards on their way past the caches
    const int64_t last = real_end(a.mask, row) - 1;
    const bool any = last >= row.begin, after = any && a.after_last && last + 1 < row.end;
    const int64_t slot = after ? last + 1 : last;  // of the score
    T* const outputs[] = {x.advantages, x.returns, x.rewards, x.kl};
    for (T* out : outputs) zero(out + slot + 1, row.end - slot - 1, past);
    row.end = slot + 1;
    scan->run(row, x.bootstrap ? static_cast<double>(x.bootstrap[i]) : 0.0, after ? slot : -1, sums,
              [&](int64_t begin, int64_t end) {
                const int n = static_cast<int>(end - begin);
                if (past && begin - row.begin >= 2 * kBlock)
                  fetch<T>({x.logprobs, x.ref, x.values}, begin - 2 * kBlock, kBlock);
                T *kl = past ? staged[0] : x.kl + begin, *rewards = past ? staged[1] : x.rewards + begin;
                shape_rewards(a, x, begin, n, kl, rewards);
                if (end == row.end) {
                  if (!a.token_scores)
                    rewards[n - 1] += clamp_of(x.scores[i], -clip, clip);
                  else if (after)
                    rewards[n - 1] += x.scores[slot];
                }
                if (past) {
                  stream_copy(x.kl + begin, kl, n);
                  stream_copy(x.rewards + begin, rewards, n);
                }
                return static_cast<const T*>(rewards);
              });
  };
  // Rows go in chunks that depend on their number alone, so that the moments have the same bits for any number of
  // threads.
  const int64_t size = (a.rows + kMaxChunks - 1) / kMaxChunks, chunks = size ? (a.rows + size - 1) / size : 0;
  PartMoments parts[kMaxChunks];
  for_phases(chunks, (row_grain(a) + size - 1) / (size ? size : 1), a.threads, a.whiten ? 2 : 1,
             [&](int phase, int64_t from, int64_t to) {
               const int64_t end = to * size < a.rows ? to * size : a.rows;
               if (phase == 1) {
                 const Moments m = pooled(parts, chunks, {a.unbiased, a.floor_variance, a.eps});
                 return standardise(x.advantages, a.mask, x.advantages, row_of(a, from * size).begin,
                                    row_of(a, end - 1).end, m, 0.0, false);
               }
               GaeRowScan<T> scan(rules, scanned);
               for (int64_t c = from; c < to; ++c) {
                 MomentSums<T> sums;
                 for (int64_t i = c * size; i < (c + 1) * size && i < end; ++i)
                   run_row(&scan, i, a.whiten ? &sums : nullptr);
                 parts[c] = sums.moments();
               }
               if (past) fence();
             });
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t advantages(const AdvantagesArgs& a) {
  a.f64 ? run<double>(a) : run<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
