// Log-probability of a token, entropy, log-sum-exp and exact KL of its distribution, in one read of the logits; and the
// gradient of all four in one read and one write.
//
// The vocabulary is walked in blocks (softmax_blocks.h), with one exp per logit whose sums live in fp32 lanes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("schedule-insns", "sched-pressure")  // exponentials side by side: a tenth faster
#endif
#include "formats.h"
#include "memory.h"
#include "ops.h"
#include "softmax_blocks.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kLargeBytes = 32 << 20;  // a gradient that does not stay in cache

template <class Args>
inline int64_t id_of(const Args& a, int64_t i) {
  return a.ids32 ? static_cast<const int32_t*>(a.token_ids)[i] : static_cast<const int64_t*>(a.token_ids)[i];
}

// The first unmasked row whose token id or temperature is out of range, or -1.
template <class S, class Args>
int64_t first_refused(const Args& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    if (a.mask && !a.mask[i]) continue;
    const int64_t id = id_of(a, i);
    const double temperature = temperature_of<S>(a, i);
    if (id < 0 || id >= a.vocab || !(temperature > 0) || !isfinite(temperature)) return i;
  }
  return -1;
}

template <class V, class T, bool kCap, bool kRef>
void forward_row(const TokenLogprobsArgs& a, int64_t i, const SoftCap<V>& soft) {
  using S = typename V::Scalar;
  S *logprobs = static_cast<S*>(a.logprobs) + i, *entropy = static_cast<S*>(a.entropy) + i;
  S *logsumexp = static_cast<S*>(a.logsumexp) + i, *kl = kRef ? static_cast<S*>(a.kl) + i : nullptr;
  S* state = a.state ? static_cast<S*>(a.state) + i * (kRef ? 6 : 3) : nullptr;
  if (a.mask && !a.mask[i]) {
    *logprobs = *entropy = *logsumexp = 0;
    if (kRef) *kl = 0;
    for (int k = 0; state && k < (kRef ? 6 : 3); ++k) state[k] = 0;
    return;
  }
  const double scale = scale_of<S>(a, i);
  const Logits<V, T, kCap> z{row_of<T>(a, a.logits, a.outer_stride, a.inner_stride, i), soft};
  const Logits<V, T, kCap> zr{kRef ? row_of<T>(a, a.ref_logits, a.ref_outer_stride, a.ref_inner_stride, i) : nullptr,
                              soft};
  const ScaledExp<V> exp_of(scale);
  RowSums row;
  for (int64_t j = 0; j < a.vocab; j += kBlock<T>) {
    const int64_t n = a.vocab - j < kBlock<T> ? a.vocab - j : kBlock<T>;
    if constexpr (!kRef) {
      if (!row.careful && add_block<V, T, kCap, false, false>(z, zr, exp_of, j, n, scale, &row)) continue;
    }
    const double before = row.policy.max;
    add_block<V, T, kCap, kRef, true>(z, zr, exp_of, j, n, scale, &row);
    if (row.policy.max > before) row.careful = false;  // terms that were too large may come out as NaN as well
  }
  *logprobs = static_cast<S>(row.policy.log_p(z.one(id_of(a, i)), scale));
  *entropy = static_cast<S>(row.policy.entropy());
  *logsumexp = static_cast<S>(row.policy.logsumexp(scale));
  if (kRef) *kl = static_cast<S>(row.gap.kl(row.policy, row.reference));
  if (!state) return;
  const auto keep = [](const SoftmaxSums<double>& from, S mean, S* to) {
    to[0] = static_cast<S>(from.max);
    to[1] = isfinite(from.max) ? static_cast<S>(from.sum) : static_cast<S>(NAN);
    to[2] = mean;
  };
  keep(row.policy, *entropy, state);
  if (kRef) keep(row.reference, *kl, state + 3);
}

template <class S>
inline S upstream(const void* grad, int64_t i) {
  return grad ? static_cast<const S*>(grad)[i] : 0;
}

// Gradient of one row: body(y, i, alive) of the vectors, then the target by itself. kMixed: entropy or KL take part.
template <class V, class T, bool kCap, bool kRef, bool kMixed>
void backward_row(const TokenLogprobsBackwardArgs& a, int64_t i, const SoftCap<V>& soft, const Upstream<double>& g,
                  bool far) {
  using S = typename V::Scalar;
  const int64_t id = id_of(a, i);
  const double scale = scale_of<S>(a, i);
  const S* state = static_cast<const S*>(a.state) + i * a.state_width;
  const RowState<double> p = {state[0], state[1], state[2]};
  const RowState<double> q = kRef ? RowState<double>{state[3], state[4], state[5]} : RowState<double>{0, 1, 0};
  const Logits<V, T, kCap> z{row_of<T>(a, a.logits, a.outer_stride, a.inner_stride, i), soft};
  const Logits<V, T, kCap> zr{kRef ? row_of<T>(a, a.ref_logits, a.ref_outer_stride, a.ref_inner_stride, i) : nullptr,
                              soft};
  T* grad = static_cast<T*>(a.grad_logits) + i * a.grad_stride;
  const double at_target =  // before the loop, which may overwrite the logits
      z.slope(id) * target_gradient(g, p, q, z.one(id) - p.max, kRef ? zr.one(id) - q.max : 0, scale);

  const GradientTerms<double> terms(g, p, q, scale);
  if (isnan(terms.constant)) {  // NaN or +inf in the row, or a NaN from upstream
    for (int64_t j = 0; j < a.vocab; ++j) grad[j] = narrow<T>(NAN);
    return;
  }
  const V constant = V::splat(static_cast<S>(terms.constant)), by_u = V::splat(static_cast<S>(terms.by_u));
  const V by_gap = V::splat(static_cast<S>(terms.by_gap));
  const V base = V::splat(state[0]), ref_base = V::splat(kRef ? state[3] : 0);
  const ScaledExp<V> exp_of(scale);
  const auto gradient = [&](const V& x, const V& xr) RLHF_FAST_INLINE {
    V y = x, t = x, out;
    if constexpr (kCap) {
      t = soft.tanh_of(x);
      y = soft.cap * t;
    }
    const V u = y - base;
    typename V::Mask alive;
    const V e = exp_of(u, &alive);
    if constexpr (!kMixed) {
      out = e * constant;
    } else {
      V weight = fma(by_u, u, constant);
      if constexpr (kRef) weight = fma(by_gap, u - (z.cap(xr) - ref_base), weight);
      out = fma_where(alive, e, weight, V::splat(0));  // the weight of a dead class may be infinite
    }
    if constexpr (kCap) out = out * soft.slope(t);
    return out;
  };
  const auto parts = [&](int64_t j, int64_t end) {
    for (; j < end; j += V::width) {
      const int n = static_cast<int>(end - j < V::width ? end - j : V::width);
      store(grad + j, gradient(load(z.row + j, n), kRef ? load(zr.row + j, n) : base), n);
    }
  };
  const auto pair = [&](int64_t j) RLHF_FAST_INLINE -> Pair<V> {
    prefetch_next_block<V>(z.row, j);
    if constexpr (kRef) prefetch_next_block<V>(zr.row, j);
    const Pair<V> x = load_pair(z.row + j);
    if constexpr (kRef) {
      const Pair<V> xr = load_pair(zr.row + j);
      return {gradient(x.a, xr.a), gradient(x.b, xr.b)};
    } else {
      return {gradient(x.a, base), gradient(x.b, base)};
    }
  };

  constexpr int64_t step = 2 * V::width;
  int64_t j = 0;
  if (far) {  // streaming stores want their alignment; the gradient of a logit does not depend on its lane
    constexpr uintptr_t align = step * sizeof(T) < 64 ? step * sizeof(T) : 64;
    const int64_t off =
        static_cast<int64_t>(-reinterpret_cast<uintptr_t>(grad) & (align - 1)) / static_cast<int64_t>(sizeof(T));
    j = off < a.vocab ? off : a.vocab;
    parts(0, j);
  }
  for (; j + step <= a.vocab; j += step) {
    const Pair<V> both = pair(j);
    far ? stream_pair(grad + j, both) : store_pair(grad + j, both);
  }
  parts(j, a.vocab);
  grad[id] = narrow<T>(at_target);
}

template <class V, class T, bool kCap, bool kRef>
int64_t forward_rows(const TokenLogprobsArgs& a) {
  const SoftCap<V> soft(kCap ? a.softcap : 1);
  for_rows(a.rows, a.vocab, a.threads, [&](int64_t i) { forward_row<V, T, kCap, kRef>(a, i, soft); });
  return -1;
}

template <class V, class T, bool kCap, bool kRef>
int64_t backward_rows(const TokenLogprobsBackwardArgs& a) {
  using S = typename V::Scalar;
  const SoftCap<V> soft(kCap ? a.softcap : 1);
  const int64_t bytes = a.rows * a.vocab * static_cast<int64_t>(sizeof(T));
  const bool far = bytes >= kLargeBytes && a.grad_logits != a.logits;
  if (far) advise_huge_pages(a.grad_logits, bytes);
  for_rows(a.rows, a.vocab, a.threads, [&](int64_t i) {
    const Upstream<double> g = {upstream<S>(a.grad_logprobs, i), upstream<S>(a.grad_entropy, i),
                                upstream<S>(a.grad_logsumexp, i), upstream<S>(a.grad_kl, i)};
    if ((a.mask && !a.mask[i]) || g.none())
      __builtin_memset(static_cast<T*>(a.grad_logits) + i * a.grad_stride, 0, a.vocab * sizeof(T));
    else if (g.flat())
      backward_row<V, T, kCap, false, false>(a, i, soft, g, far);
    else if (kRef && g.kl != 0)
      backward_row<V, T, kCap, kRef, true>(a, i, soft, g, far);
    else
      backward_row<V, T, kCap, false, true>(a, i, soft, g, far);
  });
  return -1;
}

template <class T>
int64_t run(Format<T>, const TokenLogprobsArgs& a) {
  using V = VectorOf<T>;
  if (const int64_t row = first_refused<typename V::Scalar>(a); row >= 0) return row;
  if (a.softcap > 0) return a.ref_logits ? forward_rows<V, T, true, true>(a) : forward_rows<V, T, true, false>(a);
  return a.ref_logits ? forward_rows<V, T, false, true>(a) : forward_rows<V, T, false, false>(a);
}

template <class T>
int64_t run(Format<T>, const TokenLogprobsBackwardArgs& a) {
  using V = VectorOf<T>;
  if (const int64_t row = first_refused<typename V::Scalar>(a); row >= 0) return row;
  if (a.softcap > 0) return a.ref_logits ? backward_rows<V, T, true, true>(a) : backward_rows<V, T, true, false>(a);
  return a.ref_logits ? backward_rows<V, T, false, true>(a) : backward_rows<V, T, false, false>(a);
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t token_logprobs(const TokenLogprobsArgs& a) {
  return with_any_format(a.dtype, [&](auto format) { return run(format, a); });
}

int64_t token_logprobs_backward(const TokenLogprobsBackwardArgs& a) {
  return with_any_format(a.dtype, [&](auto format) { return run(format, a); });
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
