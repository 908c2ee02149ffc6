// The scan of generalised advantage estimation (arXiv 1506.02438, eq. 16) over one row, from its last token to its
// first:
//
//   delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + c A_{t+1},   c = gamma lambda.
//
// Taken step by step every token waits for the one after it. Here windows of 2, 4 and 8 deltas are summed first, each
// from two windows of half the length,
//
//   G_t = sum_{k<8} c^k delta_{t+k},   A_t = G_t + c^8 A_{t+8},
//
// so that eight tokens go through together. Only tokens that count take part, so a row has the same bits with any
// padding. Everything is in double: lambda = gamma = 1 sums thousands of terms.
#pragma once

#include "eight.h"
#include "moments.h"
#include "output.h"
#include "rows.h"

namespace rlhf_fast {
namespace {

struct GaeRules {
  double gamma, lam;
  bool decay_gaps;  // a masked slot between real tokens is a step of zero reward and value; otherwise it is skipped
};

template <class T>
struct GaeArrays {
  const T* values;
  const uint8_t* mask;  // or null: all real
  T *advantages, *returns;
  bool past_advantages = false, past_returns = false;  // written past the caches
};

// Eight tokens at a time, and what they need of the eight after them.
struct GaeWindow {
  Eight gamma, c, c2, c4, c8;
  Eight values, one, two, four, advantages;  // one, two, four: sums of as many deltas

  explicit GaeWindow(const GaeRules& rules) {
    const double x = rules.gamma * rules.lam, x2 = x * x, x4 = x2 * x2;
    gamma = Eight::splat(rules.gamma);
    c = Eight::splat(x);
    c2 = Eight::splat(x2);
    c4 = Eight::splat(x4);
    c8 = Eight::splat(x4 * x4);
  }
  // After the last token comes a value and nothing else.
  void start(double value) {
    values = Eight::splat(value);
    one = two = four = advantages = Eight::splat(0);
  }
  // Advantages of the eight tokens before.
  RLHF_FAST_INLINE Eight step(const Eight& r, const Eight& v) {
    const Eight w1 = (r + gamma * shifted<1>(v, values)) - v;
    const Eight w2 = w1 + c * shifted<1>(w1, one);
    const Eight w4 = w2 + c2 * shifted<2>(w2, two);
    advantages = (w4 + c4 * shifted<4>(w4, four)) + c8 * advantages;
    values = v;
    one = w1;
    two = w2;
    four = w4;
    return advantages;
  }
  // After a step whose last `count` lanes alone were tokens; `before` is the window before it.
  void keep(int count, const GaeWindow& before) {
    Eight GaeWindow::* const all[] = {&GaeWindow::values, &GaeWindow::one, &GaeWindow::two, &GaeWindow::four,
                                      &GaeWindow::advantages};
    for (Eight GaeWindow::* x : all) {
      double lanes[2 * kEight];
      (this->*x).store(lanes);
      (before.*x).store(lanes + kEight);
      this->*x = Eight::load(lanes + kEight - count);
    }
  }
};

template <class T>
class GaeRowScan {
 public:
  GaeRowScan(const GaeRules& rules, const GaeArrays<T>& x) : rules_(rules), x_(x), window_(rules) {}

  // Scans a row that ends with its last token that counts. extra: a masked slot that counts, but for its advantage; -1:
  // none. prepare(begin, end) gives the rewards of [begin, end), block by block from the last. The advantages of real
  // tokens join `sums`, if any.
  template <class Prepare>
  void run(Row row, double bootstrap, int64_t extra, MomentSums<T>* sums, const Prepare& prepare) {
    window_.start(bootstrap);
    // Blocks counted from the first token begin a line wherever the row does. Whether the results go past the caches,
    // which the size of the batch decides, must not change the order of the sums.
    const bool from_first = sums || x_.past_returns;
    for (int64_t end = row.end, begin; end > row.begin; end = begin) {
      begin = end - row.begin <= kBlock ? row.begin
              : from_first              ? row.begin + (end - row.begin - 1) / kBlock * kBlock
                                        : end - kBlock;
      const T* rewards = prepare(begin, end);
      const int n = static_cast<int>(end - begin);
      T* advantages = x_.past_advantages ? staged_[0] : x_.advantages + begin;
      T* returns = x_.past_returns ? staged_[1] : x_.returns + begin;
      const uint8_t* mask = x_.mask ? x_.mask + begin : nullptr;
      if (all_real(mask, n))
        scan(rewards, x_.values + begin, advantages, returns, n, begin > row.begin);
      else
        gather(begin, n, extra, rewards, advantages, returns, begin > row.begin);
      if (sums) sums->take(advantages, mask, n);
      if (x_.past_advantages) stream_copy(x_.advantages + begin, advantages, n);
      if (x_.past_returns) stream_copy(x_.returns + begin, returns, n);
    }
  }

 private:
  // scan of those among n slots that count; the others get 0.
  void gather(int64_t begin, int n, int64_t extra, const T* from_rewards, T* to_advantages, T* to_returns, bool more) {
    const uint8_t* mask = x_.mask + begin;
    const T* from_values = x_.values + begin;
    uint8_t counted[kBlock];
    memcpy(counted, mask, n);
    const bool has_extra = extra >= begin && extra < begin + n;
    if (has_extra) counted[extra - begin] = 1;
    T *rewards = block_[0], *values = block_[1], *advantages = block_[2], *returns = block_[3];
    if (rules_.decay_gaps) {
      for (int i = 0; i < n; ++i) rewards[i] = counted[i] ? from_rewards[i] : T(0);
      for (int i = 0; i < n; ++i) values[i] = counted[i] ? from_values[i] : T(0);
      scan(rewards, values, advantages, returns, n, more);
      for (int i = 0; i < n; ++i) to_advantages[i] = counted[i] ? advantages[i] : T(0);
      for (int i = 0; i < n; ++i) to_returns[i] = counted[i] ? returns[i] : T(0);
    } else {
      int slot[kBlock], count = 0;
      for (int i = 0; i < n; ++i) {
        slot[count] = i;
        count += counted[i];
      }
      for (int i = 0; i < count; ++i) rewards[i] = from_rewards[slot[i]];
      for (int i = 0; i < count; ++i) values[i] = from_values[slot[i]];
      scan(rewards, values, advantages, returns, count, more);
      memset(to_advantages, 0, sizeof(T) * n);
      memset(to_returns, 0, sizeof(T) * n);
      for (int i = 0; i < count; ++i) {
        to_advantages[slot[i]] = advantages[i];
        to_returns[slot[i]] = returns[i];
      }
    }
    if (has_extra) to_advantages[extra - begin] = 0;
  }

  // Advantages and returns of the n tokens before those of the last call; more: another call follows.
  void scan(const T* rewards, const T* values, T* advantages, T* returns, int n, bool more) {
    GaeWindow w = window_;  // in registers
    int i = n;
    while (i >= kEight) {
      i -= kEight;
      const Eight v = Eight::load(values + i), a = w.step(Eight::load(rewards + i), v);
      a.store(advantages + i);
      (a + v).store(returns + i);
    }
    window_ = w;
    if (i > 0) scan_few(rewards, values, advantages, returns, i, more);
  }

  // The same of less than eight tokens.
  __attribute__((noinline)) void scan_few(const T* rewards, const T* values, T* advantages, T* returns, int n,
                                          bool more) {
    const GaeWindow before = window_;
    const size_t size = sizeof(T) * n, skip = kEight - n;
    T x[4][kEight] = {};
    memcpy(x[0] + skip, rewards, size);
    memcpy(x[1] + skip, values, size);
    const Eight v = Eight::load(x[1]), a = window_.step(Eight::load(x[0]), v);
    a.store(x[2]);
    (a + v).store(x[3]);
    memcpy(advantages, x[2] + skip, size);
    memcpy(returns, x[3] + skip, size);
    if (more) window_.keep(n, before);
  }

  const GaeRules rules_;
  const GaeArrays<T> x_;
  GaeWindow window_;
  alignas(kLine) T block_[4][kBlock];
  T staged_[2][kBlock];
};

}  // namespace
}  // namespace rlhf_fast
