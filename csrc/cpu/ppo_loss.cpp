// The PPO loss and its kin, their gradients and their statistics in one pass over the tokens.
//
// Tokens go through in blocks that live on the stack: a block is loaded with masked tokens replaced by 0, every term
// fills arrays in a loop that vectorises, and the arrays are summed in double (chunks.h gives the order). Gradients are
// final: the denominators depend on the mask alone and are counted first.
//
// Where a row shares one ratio, a chunk holds whole rows. Their ratios, and what these give to the gradient of every
// token, are found before the pass, from blocks that begin with the row: its bits do not depend on where it lies.
#include <math.h>
#include <string.h>

#include <type_traits>

#include "chunks.h"
#include "common/ppo_stats.h"
#include "kl.h"
#include "ops.h"
#include "output.h"
#include "rows.h"

namespace rlhf_fast {
namespace {

template <class T>
struct Partial {
  double sum[kAllSums];
  int64_t count[kCounts];
  Int<T> low, high;  // bits of the smallest and the largest ratio: of numbers >= 0 they are ordered alike
};

template <class T>
struct Problem {
  const PpoLossArgs& a;
  const T *logprobs, *old, *advantages, *entropy, *ref, *values, *old_values, *returns, *importance;
  T *grad_logprobs, *grad_entropy, *grad_values;
  PolicyRules<T> rules;
  RowRatio* ratios;  // (rows,), or null: every token has its own
  bool carried;      // the gradient goes through the ratio of the row
  bool averaged;     // over the tokens of a row first
  bool past;         // too large for the caches
  T value_bound;
  double share;         // 1 / denominator
  T value_0, return_0;  // of the first real token: variances are sums of squares around it

  explicit Problem(const PpoLossArgs& a)
      : a(a),
        logprobs(static_cast<const T*>(a.logprobs)),
        old(static_cast<const T*>(a.old_logprobs)),
        advantages(static_cast<const T*>(a.advantages)),
        entropy(static_cast<const T*>(a.entropy)),
        ref(static_cast<const T*>(a.ref_logprobs)),
        values(static_cast<const T*>(a.values)),
        old_values(static_cast<const T*>(a.old_values)),
        returns(static_cast<const T*>(a.returns)),
        importance(static_cast<const T*>(a.importance_weights)),
        grad_logprobs(static_cast<T*>(a.grad_logprobs)),
        grad_entropy(static_cast<T*>(a.grad_entropy)),
        grad_values(static_cast<T*>(a.grad_values)),
        rules{static_cast<T>(1 - a.clip_low), static_cast<T>(1 + a.clip_high), static_cast<T>(a.dual_clip),
              static_cast<T>(a.ratio_clamp)},
        ratios(static_cast<RowRatio*>(a.row_ratios)),
        carried(a.surrogate == kClip && (a.level == kSequence || a.level == kProduct)),
        averaged(a.reduction == kSeqMeanTokenMean),
        past(a.n * static_cast<int64_t>(sizeof(T) * (values ? 8 : 4)) > kStreamBytes),
        value_bound(old_values ? static_cast<T>(a.value_clip) : static_cast<T>(INFINITY)) {}
};

// The row that holds token t.
inline int64_t row_at(const PpoLossArgs& a, int64_t t) {
  if (!a.cu_seqlens) return t / a.length;
  int64_t low = 0, high = a.rows - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    a.cu_seqlens[middle] <= t ? low = middle : high = middle - 1;
  }
  return low;
}

// The first row that begins at token t or later.
inline int64_t first_row(const PpoLossArgs& a, int64_t t) {
  if (!a.cu_seqlens) return (t + a.length - 1) / a.length;
  int64_t low = 0, high = a.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    a.cu_seqlens[middle] < t ? low = middle + 1 : high = middle;
  }
  return low;
}

// body(surrogate) as a compile-time constant.
template <class Body>
inline void with_surrogate(int surrogate, Body body) {
  switch (surrogate) {
    case kClip:
      return body(std::integral_constant<int, kClip>{});
    case kCispo:
      return body(std::integral_constant<int, kCispo>{});
    default:
      return body(std::integral_constant<int, kScore>{});
  }
}

// The sums over a chunk, block by block; gradients on the way.
template <class T>
class Chunk {
 public:
  explicit Chunk(const Problem<T>& p) : p_(p) {
    for (Eight& s : sum_) s = Eight::splat(0);
    weigh_all(0, kBlock, p.share);
  }

  void run(int64_t begin, int64_t end) {
    const bool by_row = p_.averaged || p_.ratios;
    int64_t row = by_row ? row_at(p_.a, begin) : 0;
    blocks(begin, end, [&] {
      if (by_row) row = enter(row);
      if (p_.past && at_ + 3 * kBlock <= p_.a.n)
        fetch<T>({p_.logprobs, p_.old, p_.advantages, p_.values, p_.old_values, p_.returns}, at_ + 2 * kBlock, kBlock);
      policy();
      if (p_.ref) kl();
      if (p_.grad_logprobs) store(p_.grad_logprobs);
      if (p_.entropy) bonus();
      if (p_.values) value();
    });
  }

  // The same for the rows [from, to).
  void run_rows(int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) p_.ratios[row] = ratio_of(row);
    if (from < to) run(row_of(p_.a, from).begin, row_of(p_.a, to - 1).end);
  }

  Partial<T> sums() const {
    Partial<T> all;
    for (int k = 0; k < kAllSums; ++k) all.sum[k] = total(sum_[k]);
    memcpy(all.count, count_, sizeof(count_));
    all.low = low_;
    all.high = high_;
    return all;
  }

 private:
  // body() on every block of tokens [begin, end).
  template <class Body>
  void blocks(int64_t begin, int64_t end, Body body) {
    for (at_ = begin; at_ < end; at_ += kBlock) {
      size_ = static_cast<int>(end - at_ < kBlock ? end - at_ : kBlock);
      load_mask(on_, p_.a.mask, at_, size_);
      body();
    }
  }

  RowRatio ratio_of(int64_t row) {
    const Row span = row_of(p_.a, row);
    const PolicyRules<T> rules = p_.rules;
    Eight sum = Eight::splat(0);
    blocks(span.begin, span.end, [&] {
      const T* __restrict logprobs = block_of(p_.logprobs, 0), * __restrict old = block_of(p_.old, 1);
      for (int i = 0; i < kBlock; ++i)
        log_ratio_[i] = log_ratio_of(kept(logprobs[i], on_[i]), kept(old[i], on_[i]), rules);
      for (int i = 0; i < kBlock; i += kEight) sum = sum + Eight::load(log_ratio_ + i);
    });
    RowRatio found = row_ratio(p_.a.level, total(sum), static_cast<double>(length_of(row)));
    if (!p_.carried) return found;
    const T ratio = static_cast<T>(found.ratio);
    sum = Eight::splat(0);
    blocks(span.begin, span.end, [&] {
      const T* __restrict advantages = block_of(p_.advantages, 2);
      for (int i = 0; i < kBlock; ++i) slope_[i] = policy_token(ratio, T(0), kept(advantages[i], on_[i]), rules).slope;
      if (p_.importance) {
        const T* __restrict importance = block_of(p_.importance, 3);
        for (int i = 0; i < kBlock; ++i) slope_[i] *= kept(importance[i], on_[i]);
      }
      for (int i = 0; i < kBlock; i += kEight) sum = sum + Eight::load(slope_ + i);
    });
    found.slope = weight_of(row) * found.moves * total(sum);
    return found;
  }

  int64_t length_of(int64_t row) const { return p_.a.lengths[row] > 0 ? p_.a.lengths[row] : 1; }
  double weight_of(int64_t row) const {
    return p_.averaged ? p_.share / static_cast<double>(length_of(row)) : p_.share;
  }
  void weigh_all(int from, int to, double weight) {
    for (int i = from; i < to; ++i) weight_[i] = weight;
    for (int i = from; i < to; ++i) share_[i] = static_cast<T>(weight);
  }
  // What `row` and the rows after it, to which the block belongs, tell their tokens; returns the row of the next one.
  int64_t enter(int64_t row) {
    for (int i = 0;; ++row) {
      const int64_t left = row_of(p_.a, row).end - at_;
      const int stop = left < size_ ? static_cast<int>(left) : size_;
      if (p_.averaged) weigh_all(i, stop, weight_of(row));
      if (p_.ratios) share_ratio(i, stop, p_.ratios[row]);
      i = stop;
      if (i == size_) return row;
    }
  }
  void share_ratio(int from, int to, const RowRatio& row) {
    for (int i = from; i < to; ++i) row_ratio_[i] = static_cast<T>(row.ratio);
    for (int i = from; i < to; ++i) row_slope_[i] = static_cast<T>(row.slope);
    for (int i = from; i < to; ++i) row_stopped_[i] = row.moves == 0 ? T(1) : T(0);
  }

  // The block of an array, or a copy of it where the block is cut short. Masked tokens hold anything.
  const T* block_of(const T* from, int copy) {
    if (size_ == kBlock) return from + at_;
    memcpy(copies_[copy], from + at_, sizeof(T) * size_);
    memset(copies_[copy] + size_, 0, sizeof(T) * (kBlock - size_));
    return copies_[copy];
  }
  void store(T* to) const {
    p_.past ? stream_copy(to + at_, grad_, size_) : static_cast<void>(memcpy(to + at_, grad_, sizeof(T) * size_));
  }
  // sum_[k] += weight x, for the sum k of a term and its plain sum.
  void add(Sum weighted, Sum plain, const T* x) {
    Eight w = sum_[weighted], s = sum_[plain];
    for (int i = 0; i < kBlock; i += kEight) {
      const Eight v = Eight::load(x + i);
      w = w + Eight::load(weight_ + i) * v;
      s = s + v;
    }
    sum_[weighted] = w;
    sum_[plain] = s;
  }

  void policy() {
    const T* __restrict logprobs = block_of(p_.logprobs, 0), * __restrict old = block_of(p_.old, 1);
    const T* __restrict advantages = block_of(p_.advantages, 2);
    const PolicyRules<T> rules = p_.rules;
    Int<T> low = low_, high = high_, events = 0;
    // Two loops: in one the chain from log-prob to loss is so long that too few tokens are under way at a time.
    for (int i = 0; i < kBlock; ++i) {
      const RatioToken<T> t = ratio_token(kept(logprobs[i], on_[i]), kept(old[i], on_[i]), rules);
      log_ratio_[i] = t.log_ratio;
      ratio_[i] = t.ratio;
      k3_[i] = k3_of(t.log_ratio);
      clamped_[i] = t.clamped;
    }
    const T* __restrict stopped = clamped_;
    if (p_.ratios) {
      for (int i = 0; i < kBlock; ++i) {
        ratio_[i] = chosen(row_ratio_[i], T(1), on_[i]);
        stopped_[i] = row_stopped_[i] > clamped_[i] ? row_stopped_[i] : clamped_[i];
      }
      stopped = stopped_;
    }
    with_surrogate(p_.a.surrogate, [&](auto surrogate) {
      for (int i = 0; i < kBlock; ++i) {
        const PolicyToken<T> t = surrogate_token<surrogate>(kept(logprobs[i], on_[i]), ratio_[i], stopped[i],
                                                            kept(advantages[i], on_[i]), rules);
        loss_[i] = t.loss;
        slope_[i] = t.slope;
        event_[i] = static_cast<Int<T>>(t.clipped + t.capped * 1024 + clamped_[i] * 1048576);
        // Without a branch, which the compiler would not turn into vectors.
        const Int<T> bits = bits_as<Int<T>>(ratio_[i]), least = bits | (~on_[i] & kMost), most = bits & on_[i];
        low = least < low ? least : low;
        high = most > high ? most : high;
      }
    });
    low_ = low;
    high_ = high;
    for (int i = 0; i < kBlock; ++i) events += event_[i];
    count_[kClipped] += events & 1023;
    count_[kCapped] += events >> 10 & 1023;
    count_[kClamped] += events >> 20;
    if (p_.importance) {
      const T* __restrict importance = block_of(p_.importance, 3);
      for (int i = 0; i < kBlock; ++i) {
        loss_[i] *= kept(importance[i], on_[i]);
        slope_[i] *= kept(importance[i], on_[i]);
      }
    }
    Eight policy = sum_[kPolicy], square = sum_[kSquare], k3 = sum_[kK3Sum];
    Eight ratio = sum_[kRatio], ratio_square = sum_[kRatioSquare];
    for (int i = 0; i < kBlock; i += kEight) {
      const Eight d = Eight::load(log_ratio_ + i), r = Eight::load(ratio_ + i) - Eight::splat(1);  // 0 where masked
      policy = policy + Eight::load(weight_ + i) * Eight::load(loss_ + i);
      square = square + d * d;
      k3 = k3 + Eight::load(k3_ + i);
      ratio = ratio + r;
      ratio_square = ratio_square + r * r;
    }
    sum_[kPolicy] = policy;
    sum_[kSquare] = square;
    sum_[kK3Sum] = k3;
    sum_[kRatio] = ratio;
    sum_[kRatioSquare] = ratio_square;
    if (p_.carried)
      for (int i = 0; i < kBlock; ++i) grad_[i] = kept(clamped_[i] > 0 ? T(0) : row_slope_[i], on_[i]);
    else
      for (int i = 0; i < kBlock; ++i) grad_[i] = share_[i] * slope_[i];
  }

  void kl() {
    const T* __restrict logprobs = block_of(p_.logprobs, 0), * __restrict ref = block_of(p_.ref, 1);
    const T clamp_in = static_cast<T>(p_.a.kl_clamp_in), clamp_out = static_cast<T>(p_.a.kl_clamp_out);
    const T coef = static_cast<T>(p_.a.kl_coef);
    with_kl_kind(p_.a.kl_kind, p_.a.kl_straight_through, [&](auto kind, auto through) {
      for (int i = 0; i < kBlock; ++i) {
        const ValueSlope<T> t =
            kl_token<kind, through>(kept(logprobs[i], on_[i]), kept(ref[i], on_[i]), clamp_in, clamp_out);
        loss_[i] = t.value;
        grad_[i] += kept(share_[i] * coef * t.slope, on_[i]);  // the slope of k1 at 0 is 1
      }
    });
    add(kPenalty, kKlSum, loss_);
  }

  void bonus() {
    load_block(loss_, p_.entropy, on_, at_, size_);
    add(kBonus, kEntropySum, loss_);
    if (!p_.grad_entropy) return;
    const T coef = -static_cast<T>(p_.a.entropy_coef);
    for (int i = 0; i < kBlock; ++i) grad_[i] = kept(share_[i] * coef, on_[i]);
    store(p_.grad_entropy);
  }

  void value() {
    const T value_0 = p_.value_0, return_0 = p_.return_0, bound = p_.value_bound;
    const T* __restrict values = block_of(p_.values, 0), * __restrict returns = block_of(p_.returns, 1);
    const T* __restrict old = p_.old_values ? block_of(p_.old_values, 2) : values;
    Int<T> clipped = 0;
    for (int i = 0; i < kBlock; ++i) {
      const T v = chosen(values[i], value_0, on_[i]), r = chosen(returns[i], return_0, on_[i]);
      const ValueToken<T> t = value_token(v, chosen(old[i], value_0, on_[i]), r, bound);
      value_[i] = v;
      return_[i] = r;
      loss_[i] = kept(t.loss, on_[i]);
      slope_[i] = kept(t.slope, on_[i]);
      event_[i] = static_cast<Int<T>>(t.clipped) & on_[i];
    }
    for (int i = 0; i < kBlock; ++i) clipped += event_[i];
    count_[kValueClipped] += clipped;
    const Eight first = Eight::splat(static_cast<double>(return_0));
    const Eight first_error = Eight::splat(static_cast<double>(return_0) - static_cast<double>(value_0));
    Eight loss = sum_[kValue], sum = sum_[kReturn], square = sum_[kReturnSquare];
    Eight error = sum_[kError], error_square = sum_[kErrorSquare];
    for (int i = 0; i < kBlock; i += kEight) {
      const Eight r = Eight::load(return_ + i), d = r - first, e = (r - Eight::load(value_ + i)) - first_error;
      loss = loss + Eight::load(weight_ + i) * Eight::load(loss_ + i);
      sum = sum + d;
      square = square + d * d;
      error = error + e;
      error_square = error_square + e * e;
    }
    sum_[kValue] = loss;
    sum_[kReturn] = sum;
    sum_[kReturnSquare] = square;
    sum_[kError] = error;
    sum_[kErrorSquare] = error_square;
    if (!p_.grad_values) return;
    const T coef = static_cast<T>(p_.a.value_coef);
    for (int i = 0; i < kBlock; ++i) grad_[i] = share_[i] * coef * slope_[i];
    store(p_.grad_values);
  }

  static constexpr Int<T> kMost = sizeof(T) == 4 ? INT32_MAX : static_cast<Int<T>>(INT64_MAX);

  const Problem<T>& p_;
  int64_t at_ = 0;
  int size_ = 0;
  alignas(64) Int<T> on_[kBlock];  // a vector of an array across two lines would cost twice as much
  double weight_[kBlock];          // in the loss; in double, so that the mean of a constant is that constant
  T share_[kBlock];                // the same in T
  T loss_[kBlock], slope_[kBlock], grad_[kBlock], log_ratio_[kBlock], ratio_[kBlock], k3_[kBlock], clamped_[kBlock],
      value_[kBlock], return_[kBlock], row_ratio_[kBlock], row_slope_[kBlock], row_stopped_[kBlock], stopped_[kBlock];
  Int<T> event_[kBlock];
  T copies_[4][kBlock];
  Eight sum_[kAllSums];
  int64_t count_[kCounts] = {};  // but for kReal
  Int<T> low_ = kMost, high_ = 0;
};

// Counts what the denominators need: real tokens of every row, and of all; returns the default denominator.
inline double count(const PpoLossArgs& a, int64_t* tokens) {
  *tokens = count_real(a.mask, a.n);
  int64_t sequences = 0;
  for (int64_t i = 0; i < a.rows && (a.lengths || is_by_rows(a.reduction)); ++i) {
    const Row row = row_of(a, i);
    const int64_t length = count_real(a.mask + row.begin, row.end - row.begin);
    if (a.lengths) a.lengths[i] = length;
    sequences += length > 0;
  }
  if (is_by_rows(a.reduction)) return static_cast<double>(sequences);
  return a.reduction == kTokenMean ? static_cast<double>(*tokens) : 1;
}

template <class T>
void write(const PpoLossArgs& a, const Partial<T>& t, int64_t tokens) {
  const double n = tokens > 0 ? static_cast<double>(tokens) : 1;
  PpoTotals all;
  for (int k = 0; k < kSums; ++k) all.sum[k] = t.sum[k];
  for (int k = 0; k < kCounts; ++k) all.count[k] = static_cast<double>(t.count[k]);
  all.count[kReal] = static_cast<double>(tokens);
  all.low = static_cast<double>(bits_as<T>(t.low));
  all.high = static_cast<double>(bits_as<T>(t.high));
  all.returns = t.sum[kReturnSquare] - t.sum[kReturn] * t.sum[kReturn] / n;
  all.errors = t.sum[kErrorSquare] - t.sum[kError] * t.sum[kError] / n;
  write_ppo_loss(a, all, static_cast<T*>(a.loss), static_cast<T*>(a.stats));
}

template <class T>
void run(const PpoLossArgs& a) {
  Problem<T> p(a);
  int64_t tokens;
  double denominator = count(a, &tokens);
  if (a.normalizer)
    denominator = static_cast<double>(*static_cast<const T*>(a.normalizer));
  else if (a.divisor > 0)
    denominator = a.divisor;
  p.share = denominator > 0 ? 1 / denominator : 0;
  const void* first = tokens > 0 ? memchr(a.mask, 1, a.n) : nullptr;
  const int64_t at = first ? static_cast<const uint8_t*>(first) - a.mask : 0;
  p.value_0 = p.values && first ? p.values[at] : T(0);
  p.return_0 = p.values && first ? p.returns[at] : T(0);

  const Chunks chunks(a.n);
  Partial<T> partial[kMaxChunks];
  chunks.each(a.threads, [&](int64_t c, int64_t begin, int64_t end) {
    Chunk<T> chunk(p);
    if (p.ratios)
      chunk.run_rows(first_row(a, begin), end < a.n ? first_row(a, end) : a.rows);
    else
      chunk.run(begin, end);
    if (p.past) fence();
    partial[c] = chunk.sums();
  });
  Partial<T> total = {};
  for (int64_t c = 0; c < chunks.count; ++c) {
    for (int k = 0; k < kAllSums; ++k) total.sum[k] += partial[c].sum[k];
    for (int k = 0; k < kCounts; ++k) total.count[k] += partial[c].count[k];
    total.low = c == 0 || partial[c].low < total.low ? partial[c].low : total.low;
    total.high = partial[c].high > total.high ? partial[c].high : total.high;
  }
  write(a, total, tokens);
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t ppo_loss(const PpoLossArgs& a) {
  a.f64 ? run<double>(a) : run<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
