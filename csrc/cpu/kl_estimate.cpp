// Per-token KL estimators and their derivative, element by element.
#include "kl.h"
#include "ops.h"
#include "parallel.h"
#include "rows.h"

namespace rlhf_fast {
namespace {

template <class T>
void forward(const KlEstimateArgs& a) {
  const T* logprobs = static_cast<const T*>(a.logprobs);
  const T* ref = static_cast<const T*>(a.ref_logprobs);
  T* out = static_cast<T*>(a.out);
  const bool past = a.n * static_cast<int64_t>(3 * sizeof(T)) > kStreamBytes;
  for_ranges(a.n, kGrainTokens, a.threads, [&](int64_t begin, int64_t end) {
    estimate(logprobs, ref, a.mask, out, begin, end, a.kind, static_cast<T>(a.clamp_in), static_cast<T>(a.clamp_out),
             past);
    if (past) fence();
  });
}

template <class T>
void backward(const KlEstimateBackwardArgs& a) {
  const T* logprobs = static_cast<const T*>(a.logprobs);
  const T* ref = static_cast<const T*>(a.ref_logprobs);
  const T* grad = static_cast<const T*>(a.grad);
  T* grad_logprobs = static_cast<T*>(a.grad_logprobs);
  for_ranges(a.n, kGrainTokens, a.threads, [&](int64_t begin, int64_t end) {
    KlBlock<T> block;
    each_block(begin, end, [&](int64_t at, int size) {
      block.load(logprobs, ref, a.mask, at, size);
      block.slopes(a.kind, a.straight_through, static_cast<T>(a.clamp_in), static_cast<T>(a.clamp_out));
      load_block(block.x, grad, block.on, at, size);  // an upstream NaN of a masked token stops here
      for (int i = 0; i < size; ++i) grad_logprobs[at + i] = block.x[i] * block.out[i];
    });
  });
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t kl_estimate(const KlEstimateArgs& a) {
  a.f64 ? forward<double>(a) : forward<float>(a);
  return -1;
}

int64_t kl_estimate_backward(const KlEstimateBackwardArgs& a) {
  a.f64 ? backward<double>(a) : backward<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
