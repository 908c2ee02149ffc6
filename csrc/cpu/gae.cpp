// Generalised advantage estimation (arXiv 1506.02438, eq. 16) and its adjoint, one pass.
#include "gae_rows.h"
#include "ops.h"
#include "parallel.h"

namespace rlhf_fast {
namespace {

// With s_t the adjoint of delta_t: s_t = gA_t + gR_t + gamma lam s_{t-1}, dr_t = s_t, dV_t = gR_t - s_t + gamma
// s_{t-1}.
template <class T>
void scan_backward(const GaeBackwardArgs& a, Row row, T* grad_bootstrap) {
  const T* grad_advantages = static_cast<const T*>(a.grad_advantages);
  const T* grad_returns = static_cast<const T*>(a.grad_returns);
  T* grad_rewards = static_cast<T*>(a.grad_rewards);
  T* grad_values = static_cast<T*>(a.grad_values);
  int64_t last = row.end;
  while (last > row.begin && a.mask && !a.mask[last - 1]) --last;
  double s = 0;
  for (int64_t t = row.begin; t < last; ++t) {
    if (a.mask && !a.mask[t]) {
      if (a.decay_gaps) s *= a.gamma * a.lam;
      grad_rewards[t] = grad_values[t] = 0;
      continue;
    }
    const double from_previous = a.gamma * s;
    s = static_cast<double>(grad_advantages[t]) + static_cast<double>(grad_returns[t]) + a.gamma * a.lam * s;
    grad_rewards[t] = static_cast<T>(s);
    grad_values[t] = static_cast<T>(static_cast<double>(grad_returns[t]) - s + from_previous);
  }
  for (int64_t t = last; t < row.end; ++t) grad_rewards[t] = grad_values[t] = 0;
  *grad_bootstrap = static_cast<T>(a.gamma * s);
}

template <class T>
void forward_rows(const GaeArgs& a) {
  const GaeRules rules{a.gamma, a.lam, a.decay_gaps};
  const int64_t tokens = a.cu_seqlens ? a.cu_seqlens[a.rows] : a.rows * a.length;
  const bool past = tokens * static_cast<int64_t>(4 * sizeof(T)) > kStreamBytes;
  const T* rewards = static_cast<const T*>(a.rewards);
  const GaeArrays<T> x{static_cast<const T*>(a.values), a.mask, static_cast<T*>(a.advantages),
                       static_cast<T*>(a.returns),      past,   past};
  const T* bootstrap = static_cast<const T*>(a.bootstrap);
  for_ranges(a.rows, row_grain(a), a.threads, [&](int64_t begin, int64_t end) {
    GaeRowScan<T> scan(rules, x);
    for (int64_t i = begin; i < end; ++i) {
      Row row = row_of(a, i);
      const int64_t last = real_end(a.mask, row);
      zero(x.advantages + last, row.end - last, past);
      zero(x.returns + last, row.end - last, past);
      row.end = last;
      scan.run(row, bootstrap ? static_cast<double>(bootstrap[i]) : 0.0, -1, nullptr,
               [rewards](int64_t from, int64_t) { return rewards + from; });
    }
    if (past) fence();
  });
}

template <class T>
void backward_rows(const GaeBackwardArgs& a) {
  T* grad_bootstrap = static_cast<T*>(a.grad_bootstrap);
  for_ranges(a.rows, row_grain(a), a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) scan_backward<T>(a, row_of(a, i), grad_bootstrap + i);
  });
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t gae(const GaeArgs& a) {
  a.f64 ? forward_rows<double>(a) : forward_rows<float>(a);
  return -1;
}

int64_t gae_backward(const GaeBackwardArgs& a) {
  a.f64 ? backward_rows<double>(a) : backward_rows<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
