// Loops over the KL estimators of common/token_losses.h, one instance per kind so that they vectorise.
#pragma once

#include <type_traits>

#include "chunks.h"
#include "common/token_losses.h"
#include "output.h"

namespace rlhf_fast {
namespace {

// body(kind, straight_through) with both as compile-time constants.
template <class Body>
inline void with_kl_kind(int kind, bool straight_through, Body body) {
  const auto with = [&](auto constant) {
    straight_through ? body(constant, std::true_type{}) : body(constant, std::false_type{});
  };
  switch (kind) {
    case kK1:
      return with(std::integral_constant<int, kK1>{});
    case kK2:
      return with(std::integral_constant<int, kK2>{});
    case kK3:
      return with(std::integral_constant<int, kK3>{});
    default:
      return with(std::integral_constant<int, kAbs>{});
  }
}

// Tokens [at, at + size) of both log-probs, 0 where masked.
template <class T>
struct KlBlock {
  alignas(kLine) Int<T> on[kBlock];
  T x[kBlock], y[kBlock], out[kBlock];

  void load(const T* logprobs, const T* ref, const uint8_t* mask, int64_t at, int size) {
    load_mask(on, mask, at, size);
    load_block(x, logprobs, on, at, size);
    load_block(y, ref, on, at, size);
  }
  // out = derivatives towards logprobs
  void slopes(int kind, bool straight_through, T clamp_in, T clamp_out) {
    with_kl_kind(kind, straight_through, [&](auto kind_constant, auto through) {
      for (int i = 0; i < kBlock; ++i) out[i] = kl_token<kind_constant, through>(x[i], y[i], clamp_in, clamp_out).slope;
    });
    for (int i = 0; i < kBlock; ++i) out[i] = kept(out[i], on[i]);  // the slope of k1 at 0 is 1
  }
};

// out = estimates of the tokens [begin, end), 0 where masked; past the caches if `past`.
template <class T>
void estimate(const T* logprobs, const T* ref, const uint8_t* mask, T* out, int64_t begin, int64_t end, int kind,
              T clamp_in, T clamp_out, bool past) {
  with_kl_kind(kind, false, [&](auto kind_constant, auto through) {
    const auto all_of = [=](const T* __restrict x, const T* __restrict y, T* __restrict to, int n) {
      for (int i = 0; i < n; ++i) to[i] = kl_token<kind_constant, through>(x[i], y[i], clamp_in, clamp_out).value;
    };
    each_block(begin, end, [&](int64_t at, int size) {
      const bool whole = all_real(mask ? mask + at : nullptr, size);
      if (whole && !past) return all_of(logprobs + at, ref + at, out + at, size);
      KlBlock<T> block;
      if (whole) {
        all_of(logprobs + at, ref + at, block.out, size);
      } else {
        block.load(logprobs, ref, mask, at, size);
        all_of(block.x, block.y, block.out, kBlock);
      }
      past ? stream_copy(out + at, block.out, size) : static_cast<void>(memcpy(out + at, block.out, sizeof(T) * size));
    });
  });
}

}  // namespace
}  // namespace rlhf_fast
