// The gradient of token_logprobs, of all upstream gradients together: one read of the logits, one write, which may go
// to the same memory or, narrowed for the matrix product to come, to other memory. A block takes a chunk of a row;
// every element is computed by itself, so chunks may be cut anywhere.
#pragma once

#include "cuda/block.cuh"
#include "cuda/logits.cuh"

namespace rlhf_fast::cuda {
namespace {

// d logits of [begin, begin + n) of a row from the terms of common/softmax.h, in the format Out. kMixed: entropy or KL
// take part.
template <class T, class Out, bool kCap, bool kRef, bool kMixed>
struct Gradient {
  static constexpr int kEach = kLanes<Out>;  // elements of a thread at a time

  const Logits<T, kCap>&z, &zr;
  float base, ref_base, scale, constant, by_u, by_gap;

  __device__ __forceinline__ float at(float x, float xr) const {
    float y = x, t = 0;
    if constexpr (kCap) {
      t = z.tanh_of(x);
      y = z.cap * t;
    }
    const float u = y - base, e = exp2_of(u * scale);
    float out;
    if constexpr (kMixed) {
      float weight = fmaf(by_u, u, constant);
      if constexpr (kRef) weight = fmaf(by_gap, u - (z.capped(xr) - ref_base), weight);
      out = e == 0 ? 0 : e * weight;  // the weight of a dead class may be infinite
    } else {
      out = e * constant;
    }
    if constexpr (kCap) out *= 1 - t * t;
    return out;
  }
  __device__ __forceinline__ void one(Out* grad, int64_t i) const {
    const float xr = kRef ? widen(zr.row[i]) : 0;
    grad[i] = narrow<Out>(static_cast<double>(at(widen(z.row[i]), xr)));
  }
  // Vectors where the gradient begins one; the logits are read by vectors too where they begin one there.
  __device__ __forceinline__ void run(Out* grad, int64_t begin, int n, int head) const {
    constexpr int kStep = kThreads * kEach;
    const auto aligned = [&](const T* row) { return phase_of(row + begin + head) == 0; };
    const bool whole = aligned(z.row), ref_whole = kRef && aligned(zr.row);
    if (static_cast<int>(threadIdx.x) < head) one(grad, begin + threadIdx.x);
    int j = head + static_cast<int>(threadIdx.x) * kEach;
#pragma unroll 2
    for (; j + kEach <= n; j += kStep) {
      float x[kEach], xr[kEach];
      load(z.row + begin + j, whole, x);
      if constexpr (kRef) load(zr.row + begin + j, ref_whole, xr);
#pragma unroll
      for (int k = 0; k < kEach; ++k) x[k] = at(x[k], kRef ? xr[k] : 0);
      store_vector(grad + begin + j, x);
    }
    const int tail = head + (n - head) / kEach * kEach + static_cast<int>(threadIdx.x);
    if (tail < n) one(grad, begin + tail);
  }
  __device__ __forceinline__ static void load(const T* from, bool whole, float (&x)[kEach]) {
    if (whole) {  // not past the coherent caches: the gradient may overwrite the logits
#pragma unroll
      for (int k = 0; k < kEach; k += kLanes<T>) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + k);
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
        unpack<T>(words, x + k);
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) x[k] = widen(from[k]);
  }
};

__device__ __forceinline__ double upstream(const float* grad, int64_t i) {
  return grad ? static_cast<double>(grad[i]) : 0;
}

template <class T>
__device__ __forceinline__ void fill(T* grad, int64_t begin, int n, int head, float value) {
  constexpr int kStep = kThreads * kLanes<T>;
  float x[kLanes<T>];
#pragma unroll
  for (int k = 0; k < kLanes<T>; ++k) x[k] = value;
  const T one = narrow<T>(static_cast<double>(value));
  if (static_cast<int>(threadIdx.x) < head) grad[begin + threadIdx.x] = one;
  for (int j = head + static_cast<int>(threadIdx.x) * kLanes<T>; j + kLanes<T> <= n; j += kStep)
    store_vector(grad + begin + j, x);
  const int tail = head + (n - head) / kLanes<T> * kLanes<T> + static_cast<int>(threadIdx.x);
  if (tail < n) grad[begin + tail] = one;
}

// One chunk of a row. The thread that writes the target's gradient also replaces it by the one without cancellation:
// it reads the logit before its loop, which may overwrite it, and no other thread does.
template <class T, class Out, bool kCap, bool kRef>
__device__ __forceinline__ void token_logprobs_backward_chunk(const TokenLogprobsBackwardTask& a) {
  SIMT_SHARED(float, shared_terms, [3]);
  const int64_t i = blockIdx.x / a.chunks, begin = blockIdx.x % a.chunks * a.chunk_length, left = a.vocab - begin;
  const int n = static_cast<int>(left < a.chunk_length ? left : a.chunk_length);
  Out* grad = static_cast<Out*>(a.grad_logits) + i * a.grad_stride;
  const int off = phase_of(grad + begin), until = off ? kLanes<Out> - off : 0, head = until < n ? until : n;
  if (a.mask && !a.mask[i]) return fill(grad, begin, n, head, 0.0f);
  const Upstream<double> g = {upstream(a.grad_logprobs, i), upstream(a.grad_entropy, i), upstream(a.grad_logsumexp, i),
                              upstream(a.grad_kl, i)};
  if (g.none()) return fill(grad, begin, n, head, 0.0f);
  const double scale = scale_of(a, i);
  if (isnan(scale)) return fill(grad, begin, n, head, static_cast<float>(NAN));
  const float* state = a.state + i * a.state_width;
  const auto row_state = [state](int k) {
    return RowState<double>{static_cast<double>(state[k]), static_cast<double>(state[k + 1]),
                            static_cast<double>(state[k + 2])};
  };
  const RowState<double> p = row_state(0);
  const RowState<double> q = kRef ? row_state(3) : RowState<double>{0, 1, 0};
  const auto z = logits_of<kCap, T>(a, a.logits, a.outer_stride, a.inner_stride, i);
  const auto zr = kRef ? logits_of<kCap, T>(a, a.ref_logits, a.ref_outer_stride, a.ref_inner_stride, i) : z;

  const int64_t target = id_of(a, i) - begin;
  const int in_vectors = head + (n - head) / kLanes<Out> * kLanes<Out>;
  const int64_t owner = target < 0 || target >= n ? -1
                        : target < head           ? target
                        : target < in_vectors     ? (target - head) / kLanes<Out> % kThreads
                                                  : target - in_vectors;
  double at_target = 0;
  if (owner == static_cast<int64_t>(threadIdx.x)) {
    const int64_t id = target + begin;
    const double u = static_cast<double>(z.one(id)) - p.max, v = kRef ? static_cast<double>(zr.one(id)) - q.max : 0;
    at_target = static_cast<double>(z.slope(id)) * target_gradient(g, p, q, u, v, scale);
  }
  if (threadIdx.x == 0) {
    const GradientTerms<double> terms(g, p, q, scale);
    shared_terms[0] = static_cast<float>(terms.constant);
    shared_terms[1] = static_cast<float>(terms.by_u);
    shared_terms[2] = static_cast<float>(terms.by_gap);
  }
  __syncthreads();
  const float constant = shared_terms[0], by_u = shared_terms[1], by_gap = shared_terms[2];
  // NaN or +inf in the row, or a NaN from upstream.
  if (isnan(constant)) return fill(grad, begin, n, head, static_cast<float>(NAN));
  const float base = state[0], ref_base = kRef ? state[3] : 0, binary_scale = Exponent(scale).high;
  if (g.flat())
    Gradient<T, Out, kCap, false, false>{z, zr, base, ref_base, binary_scale, constant, by_u, by_gap}.run(grad, begin,
                                                                                                          n, head);
  else if (kRef && g.kl != 0)
    Gradient<T, Out, kCap, kRef, true>{z, zr, base, ref_base, binary_scale, constant, by_u, by_gap}.run(grad, begin, n,
                                                                                                        head);
  else
    Gradient<T, Out, kCap, false, true>{z, zr, base, ref_base, binary_scale, constant, by_u, by_gap}.run(grad, begin, n,
                                                                                                         head);
  if (owner == static_cast<int64_t>(threadIdx.x)) grad[target + begin] = narrow<Out>(at_target);
}

}  // namespace
}  // namespace rlhf_fast::cuda
