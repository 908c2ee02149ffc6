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

#include "moments.h"
#include "rows.h"

namespace rlhf_fast {
namespace {

struct GaeRules {
  double gamma, lam;
  bool decay_gaps;  // a masked slot between real tokens is a step of zero reward and value; otherwise it is skipped
};

template <class T>
struct GaeArrays {
  const T *rewards, *values;
  const uint8_t* mask;  // or null: all real
  T *advantages, *returns;
};

inline bool all_real(const uint8_t* mask, int64_t n) { return !mask || !memchr(mask, 0, n); }

template <class T>
class GaeRowScan {
 public:
  GaeRowScan(const GaeRules& rules, const GaeArrays<T>& x) : rules_(rules), x_(x) {
    c_ = rules.gamma * rules.lam;
    c2_ = c_ * c_;
    c4_ = c2_ * c2_;
    c8_ = c4_ * c4_;
  }

  // extra: a masked slot that counts, but for its advantage; -1: none. The advantages of real tokens join `moments`, if
  // any.
  void run(Row row, double bootstrap, int64_t extra, RunningMoments* moments = nullptr) {
    memset(window_ + kBlock, 0, sizeof(double) * kAhead);
    memset(advantage_ + kBlock, 0, sizeof(double) * kAhead);
    next_ = bootstrap;
    bool seen = false;
    for (int64_t end = skip(row.begin, row.end, extra); end > row.begin;) {
      const int64_t begin = end - row.begin > kBlock ? end - kBlock : row.begin;
      const int n = static_cast<int>(end - begin);
      if (all_real(x_.mask ? x_.mask + begin : nullptr, n)) {
        seen = true;
        scan(x_.rewards + begin, x_.values + begin, n);
        const double* a = advantage_ + (kBlock - n);
        for (int i = 0; i < n; ++i) x_.advantages[begin + i] = static_cast<T>(a[i]);
        for (int i = 0; i < n; ++i)
          x_.returns[begin + i] = static_cast<T>(a[i] + static_cast<double>(x_.values[begin + i]));
        if (moments) moments->take(x_.advantages + begin, n);
        end = begin;
        continue;
      }
      end = gather(row.begin, end, extra, &seen, moments);
    }
  }

 private:
  static constexpr int kAhead = 8;

  // Padding at the end of a row: the slots in [result, end) are masked, and done.
  int64_t skip(int64_t begin, int64_t end, int64_t extra) {
    if (!x_.mask) return end;
    int64_t t = end;
    while (t > begin && !x_.mask[t - 1] && t - 1 != extra) --t;
    memset(x_.advantages + t, 0, sizeof(T) * (end - t));
    memset(x_.returns + t, 0, sizeof(T) * (end - t));
    return t;
  }

  // Takes the slots before `end` until a block is full of those that count; returns where it stopped.
  int64_t gather(int64_t begin, int64_t end, int64_t extra, bool* seen, RunningMoments* moments) {
    int64_t slot[kBlock];
    T rewards[kBlock], values[kBlock];
    int first = kBlock;
    int64_t t = end;
    while (t > begin && first > 0) {
      --t;
      const bool counted = x_.mask[t] || t == extra;
      x_.advantages[t] = x_.returns[t] = 0;
      if (!counted && !(rules_.decay_gaps && *seen)) continue;
      *seen = *seen || counted;
      --first;
      slot[first] = counted ? t : -1;
      rewards[first] = counted ? x_.rewards[t] : T(0);
      values[first] = counted ? x_.values[t] : T(0);
    }
    scan(rewards + first, values + first, kBlock - first);
    T real[kBlock];
    int count = 0;
    for (int i = first; i < kBlock; ++i) {
      if (slot[i] < 0) continue;
      if (x_.mask[slot[i]]) {
        real[count++] = x_.advantages[slot[i]] = static_cast<T>(advantage_[i]);
      }
      x_.returns[slot[i]] = static_cast<T>(advantage_[i] + static_cast<double>(values[i]));
    }
    if (moments && count > 0) moments->take(real, count);
    return t;
  }

  // Advantages of n more tokens, into the last n places of the block.
  void scan(const T* rewards, const T* values, int n) {
    if (n == 0) return;
    double* __restrict w = window_ + (kBlock - n);
    double* __restrict a = advantage_ + (kBlock - n);
    const double gamma = rules_.gamma, c = c_, c2 = c2_, c4 = c4_, c8 = c8_;
    for (int i = 0; i + 1 < n; ++i)
      w[i] = (static_cast<double>(rewards[i]) + gamma * static_cast<double>(values[i + 1])) -
             static_cast<double>(values[i]);
    w[n - 1] = (static_cast<double>(rewards[n - 1]) + gamma * next_) - static_cast<double>(values[n - 1]);
    next_ = values[0];
    double deltas[kAhead];  // of the tokens that the block before this one looks ahead to
    for (int i = 0; i < kAhead; ++i) deltas[i] = w[i];
    for (int i = 0; i < n + 6; ++i) w[i] += c * w[i + 1];
    for (int i = 0; i < n + 4; ++i) w[i] += c2 * w[i + 2];
    for (int i = 0; i < n; ++i) w[i] += c4 * w[i + 4];
    double carry[kAhead];  // in registers: a chain through memory would be twice as long
    memcpy(carry, a + n, sizeof(carry));
    int i = n - kAhead;
    for (; i >= 0; i -= kAhead) {
      for (int k = 0; k < kAhead; ++k) carry[k] = w[i + k] + c8 * carry[k];
      memcpy(a + i, carry, sizeof(carry));
    }
    for (i += kAhead - 1; i >= 0; --i) a[i] = w[i] + c8 * a[i + kAhead];
    memcpy(window_ + kBlock, deltas, sizeof(deltas));
    memmove(advantage_ + kBlock, a, sizeof(double) * kAhead);  // they overlap when n is small
  }

  const GaeRules rules_;
  const GaeArrays<T> x_;
  double c_, c2_, c4_, c8_, next_ = 0;
  double window_[kBlock + kAhead], advantage_[kBlock + kAhead];
};

}  // namespace
}  // namespace rlhf_fast
