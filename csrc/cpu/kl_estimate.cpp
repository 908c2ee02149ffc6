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
  const T clamp_in = static_cast<T>(a.clamp_in), clamp_out = static_cast<T>(a.clamp_out);
  const uint8_t* mask = a.mask;
  with_kl_kind(a.kind, false, [&](auto kind, auto through) {
    for_ranges(a.n, kGrainTokens, a.threads, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T value = kl_token<kind, through>(logprobs[i], ref[i], clamp_in, clamp_out).value;
        out[i] = !mask || mask[i] ? value : T(0);
      }
    });
  });
}

template <class T>
void backward(const KlEstimateBackwardArgs& a) {
  const T* grad = static_cast<const T*>(a.grad);
  const T* logprobs = static_cast<const T*>(a.logprobs);
  const T* ref = static_cast<const T*>(a.ref_logprobs);
  T* grad_logprobs = static_cast<T*>(a.grad_logprobs);
  const T clamp_in = static_cast<T>(a.clamp_in), clamp_out = static_cast<T>(a.clamp_out);
  const uint8_t* mask = a.mask;
  with_kl_kind(a.kind, a.straight_through, [&](auto kind, auto through) {
    for_ranges(a.n, kGrainTokens, a.threads, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T slope = kl_token<kind, through>(logprobs[i], ref[i], clamp_in, clamp_out).slope;
        grad_logprobs[i] = !mask || mask[i] ? grad[i] * slope : T(0);
      }
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
