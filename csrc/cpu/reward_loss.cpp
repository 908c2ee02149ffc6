// Bradley-Terry loss of a reward model: loss, statistics and both gradients in one pass over the pairs, in double.
#include <math.h>

#include "chunks.h"
#include "ops.h"

namespace rlhf_fast {
namespace {

enum Stat { kAccuracy, kMargin, kChosen, kRejected, kCenter, kPairs, kStats };

// softplus(-x) + e x, and its derivative: (1 - e) softplus(-x) + e softplus(x) without overflow.
struct Logistic {
  double loss, slope;

  Logistic(double x, double smoothing) {
    const double tail = exp(x < 0 ? x : -x);  // e^-|x|
    loss = (x < 0 ? -x : 0) + log1p(tail);
    slope = -(x < 0 ? 1 : tail) / (1 + tail);  // -sigmoid(-x)
    if (smoothing != 0) {
      loss += smoothing * x;
      slope += smoothing;
    }
  }
};

struct Sums {
  double loss = 0, stat[kStats] = {0};
};

template <class T>
void run(const RewardLossArgs& a) {
  const T* chosen = static_cast<const T*>(a.chosen);
  const T* rejected = static_cast<const T*>(a.rejected);
  const T* margin = static_cast<const T*>(a.margin);
  T* grad_chosen = static_cast<T*>(a.grads);
  T* grad_rejected = grad_chosen ? grad_chosen + a.n : nullptr;
  const int64_t pairs = count_real(a.mask, a.n);
  const double share = 1.0 / (pairs > 0 ? pairs : 1);
  const Chunks chunks(a.n);
  Sums partial[kMaxChunks];
  chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
    Sums s;
    for (int64_t i = begin; i < end; ++i) {
      if (a.mask && !a.mask[i]) {
        if (grad_chosen) grad_chosen[i] = grad_rejected[i] = 0;
        continue;
      }
      const double w = chosen[i], l = rejected[i], gap = w - l, sum = w + l;
      const Logistic term(margin ? gap - static_cast<double>(margin[i]) : gap, a.smoothing);
      s.loss += term.loss;
      s.stat[kAccuracy] += gap > 0 ? 1 : (gap == 0 ? 0.5 : 0);
      s.stat[kMargin] += gap;
      s.stat[kChosen] += w;
      s.stat[kRejected] += l;
      s.stat[kCenter] += sum * sum;
      if (grad_chosen) {
        const double centre = 2 * a.center_coef * sum;
        grad_chosen[i] = static_cast<T>((centre + term.slope) * share);
        grad_rejected[i] = static_cast<T>((centre - term.slope) * share);
      }
    }
    partial[c] = s;
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
