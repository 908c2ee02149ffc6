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

// Fills the token rewards of a row. Returns the slot after the last real token when that one has a value too, otherwise
// -1.
template <class T>
int64_t shape_rewards(const AdvantagesArgs& a, const Arrays<T>& x, Row row, int64_t i) {
  int64_t last = row.end - 1;
  while (last >= row.begin && !a.mask[last]) --last;
  const bool any = last >= row.begin, extra = any && a.after_last && last + 1 < row.end;
  if (x.logprobs) {
    const T coef = static_cast<T>(a.kl_coef);
    KlBlock<T> block;
    each_block(row.begin, row.end, [&](int64_t at, int size) {
      block.load(x.logprobs, x.ref, a.mask, at, size);
      block.values(a.kl_kind, static_cast<T>(a.clamp_in), static_cast<T>(a.clamp_out));
      memcpy(x.kl + at, block.out, sizeof(T) * size);
      for (int i = 0; i < size; ++i) x.rewards[at + i] = -coef * block.out[i];
    });
  } else {
    for (int64_t t = row.begin; t < row.end; ++t) x.kl[t] = x.rewards[t] = 0;
  }
  if (a.token_scores) {
    for (int64_t t = row.begin; t < row.end; ++t) x.rewards[t] += a.mask[t] ? x.scores[t] : T(0);
    if (extra) x.rewards[last + 1] += x.scores[last + 1];
  } else if (any) {
    const T clip = static_cast<T>(a.score_clip);
    x.rewards[extra ? last + 1 : last] += clamp_of(x.scores[i], -clip, clip);
  }
  return extra ? last + 1 : -1;
}

template <class T>
void run(const AdvantagesArgs& a) {
  const Arrays<T> x(a);
  const GaeRules rules{a.gamma, a.lam, a.decay_gaps};
  const GaeArrays<T> scanned{x.rewards, x.values, a.mask, x.advantages, x.returns};
  // Rows go in chunks that depend on their number alone, so that the moments have the same bits for any number of
  // threads.
  const int64_t size = (a.rows + kMaxChunks - 1) / kMaxChunks, chunks = size ? (a.rows + size - 1) / size : 0;
  RunningMoments moments[kMaxChunks];
  for_ranges(chunks, (row_grain(a) + size - 1) / (size ? size : 1), a.threads, [&](int64_t from, int64_t to) {
    GaeRowScan<T> scan(rules, scanned);
    for (int64_t c = from; c < to; ++c) {
      for (int64_t i = c * size; i < (c + 1) * size && i < a.rows; ++i) {
        const Row row = row_of(a, i);
        const int64_t extra = shape_rewards(a, x, row, i);
        scan.run(row, x.bootstrap ? static_cast<double>(x.bootstrap[i]) : 0.0, extra, a.whiten ? &moments[c] : nullptr);
      }
    }
  });
  if (!a.whiten) return;
  RunningMoments all;
  for (int64_t c = 0; c < chunks; ++c) all.join(moments[c]);
  const Moments m = finish(all, {a.unbiased, a.floor_variance, a.eps});
  standardise(x.advantages, a.mask, x.advantages, a.n, m, 0.0, a.threads);
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t advantages(const AdvantagesArgs& a) {
  a.f64 ? run<double>(a) : run<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
