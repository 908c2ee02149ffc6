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

// KL and token rewards of the slots [begin, end).
template <class T>
void shape_rewards(const AdvantagesArgs& a, const Arrays<T>& x, int64_t begin, int64_t end) {
  const size_t size = sizeof(T) * (end - begin);
  if (x.logprobs) {
    estimate(x.logprobs, x.ref, a.mask, x.kl, begin, end, a.kl_kind, static_cast<T>(a.clamp_in),
             static_cast<T>(a.clamp_out));
    const T coef = static_cast<T>(a.kl_coef);
    for (int64_t t = begin; t < end; ++t) x.rewards[t] = -coef * x.kl[t];
  } else {
    memset(x.kl + begin, 0, size);
    memset(x.rewards + begin, 0, size);
  }
  if (a.token_scores)
    for (int64_t t = begin; t < end; ++t) x.rewards[t] += a.mask[t] ? x.scores[t] : T(0);
}

template <class T>
void run(const AdvantagesArgs& a) {
  const Arrays<T> x(a);
  const GaeRules rules{a.gamma, a.lam, a.decay_gaps};
  const GaeArrays<T> scanned{x.rewards, x.values, a.mask, x.advantages, x.returns};
  const T clip = static_cast<T>(a.score_clip);
  const auto run_row = [&](GaeRowScan<T>* scan, int64_t i, MomentSums<T>* sums) {
    Row row = row_of(a, i);
    const int64_t last = real_end(a.mask, row) - 1;
    const bool any = last >= row.begin, after = any && a.after_last && last + 1 < row.end;
    const int64_t slot = after ? last + 1 : last;  // of the score
    T* const outputs[] = {x.advantages, x.returns, x.rewards, x.kl};
    for (T* out : outputs) memset(out + slot + 1, 0, sizeof(T) * (row.end - slot - 1));
    row.end = slot + 1;
    scan->run(row, x.bootstrap ? static_cast<double>(x.bootstrap[i]) : 0.0, after ? slot : -1, sums,
              [&](int64_t begin, int64_t end) {
                shape_rewards(a, x, begin, end);
                if (end < row.end) return;
                if (!a.token_scores)
                  x.rewards[slot] += clamp_of(x.scores[i], -clip, clip);
                else if (after)
                  x.rewards[slot] += x.scores[slot];
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
                                    row_of(a, end - 1).end, m, 0.0);
               }
               GaeRowScan<T> scan(rules, scanned);
               for (int64_t c = from; c < to; ++c) {
                 MomentSums<T> sums;
                 for (int64_t i = c * size; i < (c + 1) * size && i < end; ++i)
                   run_row(&scan, i, a.whiten ? &sums : nullptr);
                 parts[c] = sums.moments();
               }
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
