// Bradley-Terry loss of a reward model: loss, statistics and both gradients in one pass over the pairs, in double.
#include <math.h>

#include "chunks.h"
#include "common/elementary.h"
#include "ops.h"

namespace rlhf_fast {
namespace {

enum Stat { kAccuracy, kMargin, kChosen, kRejected, kCenter, kPairs, kStats };

struct Sums {
  double loss = 0, stat[kStats] = {0};
};

// A block of pairs; the arrays let every loop vectorise. Masked pairs have zeros everywhere.
template <class T>
struct Block {
  Int<T> on_[kBlock];
  T chosen[kBlock], rejected[kBlock], margin[kBlock], grad[kBlock];
  double gap[kBlock], sum[kBlock], loss[kBlock], slope[kBlock], right[kBlock];

  void run(const RewardLossArgs& a, int64_t at, int size, double share, Sums* s) {
    load_mask(on_, a.mask, at, size);
    load_block(chosen, static_cast<const T*>(a.chosen), on_, at, size);
    load_block(rejected, static_cast<const T*>(a.rejected), on_, at, size);
    if (a.margin)
      load_block(margin, static_cast<const T*>(a.margin), on_, at, size);
    else
      memset(margin, 0, sizeof(margin));
    const double smoothing = a.smoothing;
    for (int i = 0; i < kBlock; ++i) {
      const double on = -on_[i], w = chosen[i], l = rejected[i], x = (w - l) - static_cast<double>(margin[i]);
      gap[i] = w - l;
      sum[i] = w + l;
      right[i] = on * (gap[i] > 0 ? 1.0 : (gap[i] == 0 ? 0.5 : 0.0));
      // (1 - e) softplus(-x) + e softplus(x) and its derivative, without overflow.
      const double tail = exp_of(x < 0 ? x : -x);                  // e^-|x|
      const double smoothed = smoothing != 0 ? smoothing * x : 0;  // 0 * inf would be NaN
      loss[i] = on * ((x < 0 ? -x : 0) + log1p_of(tail) + smoothed);
      slope[i] = on * (smoothing - (x < 0 ? 1.0 : tail) / (1 + tail));
    }
    s->loss += total_of(loss);
    s->stat[kAccuracy] += total_of(right);
    s->stat[kMargin] += total_of(gap);
    s->stat[kChosen] += total_of(chosen);
    s->stat[kRejected] += total_of(rejected);
    s->stat[kCenter] += dot_of(sum, sum);
    T* out = static_cast<T*>(a.grads);
    if (!out) return;
    const double centre = 2 * a.center_coef;
    for (int i = 0; i < kBlock; ++i) grad[i] = static_cast<T>((centre * sum[i] + slope[i]) * share);
    memcpy(out + at, grad, sizeof(T) * size);
    for (int i = 0; i < kBlock; ++i) grad[i] = static_cast<T>((centre * sum[i] - slope[i]) * share);
    memcpy(out + a.n + at, grad, sizeof(T) * size);
  }
};

template <class T>
void run(const RewardLossArgs& a) {
  const int64_t pairs = count_real(a.mask, a.n);
  const double share = 1.0 / (pairs > 0 ? pairs : 1);
  const Chunks chunks(a.n);
  Sums partial[kMaxChunks];
  chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
    Block<T> block;
    each_block(begin, end, [&](int64_t at, int size) { block.run(a, at, size, share, &partial[c]); });
  });
  Sums total;
  for (int64_t c = 0; c < chunks.count; ++c) {
    total.loss += partial[c].loss;
    for (int k = 0; k < kStats; ++k) total.stat[k] += partial[c].stat[k];
  }
  for (int k = 0; k < kStats; ++k) total.stat[k] *= share;
  total.stat[kPairs] = static_cast<double>(pairs);
  const double centred = a.center_coef != 0 ? a.center_coef * total.stat[kCenter] : 0;
  *static_cast<T*>(a.loss) = static_cast<T>(total.loss * share + centred);
  for (int k = 0; k < kStats; ++k) static_cast<T*>(a.stats)[k] = static_cast<T>(total.stat[k]);
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t reward_loss(const RewardLossArgs& a) {
  a.f64 ? run<double>(a) : run<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
