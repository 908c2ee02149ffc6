// Bradley-Terry loss of a reward model: loss, statistics and both gradients in one pass over the pairs.
#include <math.h>

#include "chunks.h"
#include "common/elementary.h"
#include "ops.h"
#include "output.h"

namespace rlhf_fast {
namespace {

enum Stat { kAccuracy, kMargin, kChosen, kRejected, kCenter, kPairs, kStats };
enum Sum { kLoss, kChosenSum, kRejectedSum, kCenterSum, kSums };

struct Partial {
  double sum[kSums];
  int64_t right;  // twice the pairs in the right order; ties are half right
};

// The sums over a chunk, block by block; gradients on the way.
template <class T>
class Chunk {
 public:
  Chunk(const RewardLossArgs& a, double share) : a_(a), share_(static_cast<T>(share)) {
    for (Eight& s : sum_) s = Eight::splat(0);
    memset(margin_, 0, sizeof(margin_));
  }

  void run(int64_t at, int size) {
    load_mask(on_, a_.mask, at, size);
    const bool whole = size == kBlock && all_real(a_.mask ? a_.mask + at : nullptr, kBlock);
    const auto block = [&](const void* from, T* copy) {
      return block_of(static_cast<const T*>(from), copy, on_, whole, at, size);
    };
    pairs(block(a_.chosen, chosen_), block(a_.rejected, rejected_), a_.margin ? block(a_.margin, margin_) : margin_);
    T* out = static_cast<T*>(a_.grads);
    if (!out) return;
    const T centre = static_cast<T>(2 * a_.center_coef), share = share_;
    for (int i = 0; i < kBlock; ++i) grad_[i] = (centre * both_[i] + slope_[i]) * share;
    memcpy(out + at, grad_, sizeof(T) * size);
    for (int i = 0; i < kBlock; ++i) grad_[i] = (centre * both_[i] - slope_[i]) * share;
    memcpy(out + a_.n + at, grad_, sizeof(T) * size);
  }

  Partial sums() const {
    Partial all;
    for (int k = 0; k < kSums; ++k) all.sum[k] = total(sum_[k]);
    all.right = right_;
    return all;
  }

 private:
  void pairs(const T* __restrict chosen, const T* __restrict rejected, const T* __restrict margin) {
    const T smoothing = static_cast<T>(a_.smoothing);
    for (int i = 0; i < kBlock; ++i) {
      const T gap = chosen[i] - rejected[i], x = gap - margin[i];
      // (1 - e) softplus(-x) + e softplus(x) and its derivative, without overflow.
      const T tail = exp_of(x < 0 ? x : -x);                  // e^-|x|
      const T smoothed = smoothing != 0 ? smoothing * x : 0;  // 0 * inf would be NaN
      loss_[i] = kept((x < 0 ? -x : T(0)) + log1p_of(tail) + smoothed, on_[i]);
      slope_[i] = kept(smoothing - (x < 0 ? T(1) : tail) / (1 + tail), on_[i]);
      both_[i] = chosen[i] + rejected[i];
      right_of_[i] = static_cast<Int<T>>((gap > 0 ? T(1) : T(0)) + (gap >= 0 ? T(1) : T(0))) & on_[i];
    }
    Int<T> right = 0;
    for (int i = 0; i < kBlock; ++i) right += right_of_[i];
    right_ += right;
    Eight loss = sum_[kLoss], up = sum_[kChosenSum], down = sum_[kRejectedSum], centre = sum_[kCenterSum];
    for (int i = 0; i < kBlock; i += kEight) {
      const Eight both = Eight::load(both_ + i);
      loss = loss + Eight::load(loss_ + i);
      up = up + Eight::load(chosen + i);
      down = down + Eight::load(rejected + i);
      centre = centre + both * both;
    }
    sum_[kLoss] = loss;
    sum_[kChosenSum] = up;
    sum_[kRejectedSum] = down;
    sum_[kCenterSum] = centre;
  }

  const RewardLossArgs& a_;
  const T share_;
  alignas(kLine) Int<T> on_[kBlock];
  Int<T> right_of_[kBlock];
  T chosen_[kBlock], rejected_[kBlock], margin_[kBlock], loss_[kBlock], slope_[kBlock], both_[kBlock], grad_[kBlock];
  Eight sum_[kSums];
  int64_t right_ = 0;
};

template <class T>
void run(const RewardLossArgs& a) {
  const int64_t pairs = count_real(a.mask, a.n);
  const double share = 1.0 / static_cast<double>(pairs > 0 ? pairs : 1);
  const Chunks chunks(a.n);
  Partial partial[kMaxChunks];
  chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
    Chunk<T> chunk(a, share);
    each_block(begin, end, [&](int64_t at, int size) { chunk.run(at, size); });
    partial[c] = chunk.sums();
  });
  Partial total = {};
  for (int64_t c = 0; c < chunks.count; ++c) {
    for (int k = 0; k < kSums; ++k) total.sum[k] += partial[c].sum[k];
    total.right += partial[c].right;
  }
  double stat[kStats];
  stat[kAccuracy] = static_cast<double>(total.right) / 2 * share;
  stat[kMargin] = (total.sum[kChosenSum] - total.sum[kRejectedSum]) * share;
  stat[kChosen] = total.sum[kChosenSum] * share;
  stat[kRejected] = total.sum[kRejectedSum] * share;
  stat[kCenter] = total.sum[kCenterSum] * share;
  stat[kPairs] = static_cast<double>(pairs);
  const double centred = a.center_coef != 0 ? a.center_coef * stat[kCenter] : 0;
  *static_cast<T*>(a.loss) = static_cast<T>(total.sum[kLoss] * share + centred);
  for (int k = 0; k < kStats; ++k) static_cast<T*>(a.stats)[k] = static_cast<T>(stat[k]);
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t reward_loss(const RewardLossArgs& a) {
  a.f64 ? run<double>(a) : run<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
