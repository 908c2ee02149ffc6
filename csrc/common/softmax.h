// The maths of one token's softmax, shared by every device: sums that stream over the vocabulary, the statistics they
// give, and the coefficients of the gradient.
//
// y is the logit after the soft cap; z = scale * y with scale = 1 / temperature; d = scale * (y - max y) <= 0. Working
// with d keeps every digit that shifting all logits by a constant would cost.
#pragma once

#include "common/dtype.h"

namespace rlhf_fast {
namespace {

// Sums over the part of the row read so far, relative to its largest logit or, to save a pass, to one that is not far
// below: d is then a little above 0 at most, and every formula below holds for any point of reference.
template <class Real>
struct SoftmaxSums {
  Real max = -static_cast<Real>(INFINITY);  // of y, or near it
  Real sum = 0;                             // sum e^d
  Real weighted = 0;                        // sum e^d d

  // What to subtract from a logit: the maximum, or 0 while only -inf was seen (-inf - -inf would be NaN).
  RLHF_FAST_HD Real base() const { return max == -static_cast<Real>(INFINITY) ? 0 : max; }

  // Moves the point of reference up to `to`. Returns the shift of every earlier d (<= 0).
  RLHF_FAST_HD Real raise(Real to, Real scale) {
    if (!(to > max)) return 0;
    const bool first = max == -static_cast<Real>(INFINITY);  // every term so far is 0 (or NaN)
    const Real shift = first ? 0 : (max - to) * scale;
    max = to;
    if (shift == 0) return 0;
    const Real factor = exp(shift);
    weighted = factor * (weighted + shift * sum);
    sum *= factor;
    return shift;
  }

  // NaN for a row that holds NaN or +inf, or nothing but -inf, like log_softmax.
  RLHF_FAST_HD Real log_sum() const { return isfinite(max) ? log(sum) : static_cast<Real>(NAN); }
  RLHF_FAST_HD Real logsumexp(Real scale) const { return max * scale + log_sum(); }
  RLHF_FAST_HD Real entropy() const { return log_sum() - weighted / sum; }
  RLHF_FAST_HD Real log_p(Real y, Real scale) const { return (y - max) * scale - log_sum(); }
};

// sum e^d (d - d_ref), which with both log sums gives the exact KL(policy || reference).
template <class Real>
struct GapSum {
  Real gap = 0;

  // Follows the two shifts that SoftmaxSums::raise returned; `sum` is the policy's, after its shift.
  RLHF_FAST_HD void shift(Real policy, Real reference, Real sum) {
    if (policy != 0) {
      const Real factor = exp(policy);
      gap = factor == 0 ? policy * sum : factor * gap + policy * sum;  // an infinite gap of weight 0 is gone
    }
    if (reference != 0) gap -= reference * sum;
  }

  // Rounding may leave a tiny negative number where the distributions agree.
  RLHF_FAST_HD Real kl(const SoftmaxSums<Real>& policy, const SoftmaxSums<Real>& reference) const {
    const Real kl = gap / policy.sum - policy.log_sum() + reference.log_sum();
    return kl < 0 ? 0 : kl;
  }
};

// What the forward keeps of a row for its backward.
template <class Real>
struct RowState {
  Real max, sum;
  Real mean;  // the entropy, or KL in the reference's state
};

// Upstream gradients of a row; 0 where nobody asks.
template <class Real>
struct Upstream {
  Real logprob, entropy, logsumexp, kl;

  RLHF_FAST_HD bool none() const { return logprob == 0 && entropy == 0 && logsumexp == 0 && kl == 0; }
  RLHF_FAST_HD bool flat() const { return entropy == 0 && kl == 0; }  // the gradient is a multiple of p
};

// With u = y - max, v = y_ref - max_ref and e = e^(scale u), away from the target
//   d/dy_j = e_j (constant + by_u u_j + by_gap (u_j - v_j)),
// which is scale p_j (g_lse - g_logprob - g_entropy (log p_j + H) + g_kl (log p_j - log q_j - KL)).
// Terms nobody asked for are left out rather than multiplied by 0: an infinite KL must not turn them into NaN.
template <class Real>
struct GradientTerms {
  Real constant, by_u, by_gap;

  RLHF_FAST_HD GradientTerms(const Upstream<Real>& g, const RowState<Real>& p, const RowState<Real>& q, Real scale) {
    constant = g.logsumexp - g.logprob;
    if (g.entropy != 0) constant -= g.entropy * (p.mean - log(p.sum));
    if (g.kl != 0) constant -= g.kl * (q.mean + log(p.sum) - log(q.sum));
    const Real norm = scale / p.sum;
    constant *= norm;
    by_u = -g.entropy * scale * norm;
    by_gap = g.kl * scale * norm;
  }
};

// The same at the target, where 1 - p is taken without cancellation: a confident policy has p within rounding of 1.
template <class Real>
RLHF_FAST_HD Real target_gradient(const Upstream<Real>& g, const RowState<Real>& p, const RowState<Real>& q, Real u,
                                  Real v, Real scale) {
  Real log_p = u * scale - log(p.sum);
  if (log_p > 0) log_p = 0;
  const Real prob = exp(log_p);
  Real d = g.logprob == 0 ? 0 : -g.logprob * expm1(log_p);
  if (prob == 0) return scale * d;
  d += prob * g.logsumexp;
  if (g.entropy != 0) d -= prob * g.entropy * (log_p + p.mean);
  if (g.kl != 0) d += prob * g.kl * (log_p - (v * scale - log(q.sum)) - q.mean);
  return scale * d;
}

}  // namespace
}  // namespace rlhf_fast
