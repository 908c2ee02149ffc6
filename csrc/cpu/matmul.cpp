// The products of the heads and of the adapted layers, by the formats of their operands.
#include "matmul.h"

namespace rlhf_fast {
namespace {

template <class A>
void multiply_by(const MatmulArgs& x) {
  switch (x.b_dtype) {
    case kFloat32:
      return multiply<false, A, float>(x);
    case kBFloat16:
      return multiply<false, A, BFloat16>(x);
    default:
      return multiply<false, A, Float16>(x);
  }
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t matmul(const MatmulArgs& x) {
  if (x.m <= 0 || x.n <= 0) return -1;
#if defined(RLHF_FAST_ISA_AVX512BF16)
  if (x.narrow && x.a_dtype != kFloat16 && x.b_dtype != kFloat16) {
    const bool wide_a = x.a_dtype == kFloat32, wide_b = x.b_dtype == kFloat32;
    if (wide_a)
      wide_b ? multiply<true, float, float>(x) : multiply<true, float, BFloat16>(x);
    else
      wide_b ? multiply<true, BFloat16, float>(x) : multiply<true, BFloat16, BFloat16>(x);
    return -1;
  }
#endif
  switch (x.a_dtype) {
    case kFloat32:
      multiply_by<float>(x);
      break;
    case kBFloat16:
      multiply_by<BFloat16>(x);
      break;
    default:
      multiply_by<Float16>(x);
  }
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
