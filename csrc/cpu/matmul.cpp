// The products of the heads and of the adapted layers, by the formats of their operands.
#include "matmul.h"

#include "formats.h"

namespace rlhf_fast {
namespace {

template <bool kNarrow, class A, class B>
void by_formats(Format<A>, Format<B>, const MatmulArgs& x) {
  multiply<kNarrow, A, B>(x);
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
  with_format(x.a_dtype, [&](auto a) { with_format(x.b_dtype, [&](auto b) { by_formats<false>(a, b, x); }); });
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
