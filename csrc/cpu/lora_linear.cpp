// One segment of a linear layer with adapters: low = scale x A, then y += low B; A (in, r) and B (r, out) of rank r.
//
// low stays fp32 and is kept: the backward multiplies it, and runs the same kernel with the factors changed places.
// Where x is bf16 and the processor multiplies bf16, operands are rounded to it, as PyTorch's product would round them.
#include "matmul.h"

namespace rlhf_fast {
namespace {

template <bool kNarrow, class T>
void segment(const LoraLinearArgs& x) {
  // a, b, bias, c, workspace; m, n, k; rows and columns of a and b, rows of c; formats, which the template has.
  multiply<kNarrow, T, float>(MatmulArgs{x.x, x.a, nullptr, x.low, x.workspace, x.rows, x.rank, x.in, x.x_row, 1,
                                         x.a_row, x.a_column, x.rank, kFloat32, kFloat32, false, kNarrow, x.threads});
  const Float scale = Float::splat(static_cast<float>(x.scale));
  float* const low = static_cast<float*>(x.low);
  const int64_t count = x.rows * x.rank;
  for_ranges(count, 65536, x.threads, [&](int64_t i, int64_t end) {
    for (; i + kLanes <= end; i += kLanes) store(low + i, load(low + i) * scale);
    if (i < end) store(low + i, load(low + i, static_cast<int>(end - i)) * scale, static_cast<int>(end - i));
  });
  if (!x.y) return;
  multiply<kNarrow, float, float, T>(MatmulArgs{x.low, x.b, nullptr, x.y, x.workspace, x.rows, x.out, x.rank, x.rank, 1,
                                                x.b_row, x.b_column, x.y_row, kFloat32, kFloat32, true, kNarrow,
                                                x.threads});
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t lora_linear(const LoraLinearArgs& x) {
  if (x.rows <= 0 || x.rank <= 0) return -1;
  switch (x.dtype) {
    case kFloat32:
      segment<false, float>(x);
      break;
    case kBFloat16:
#if defined(RLHF_FAST_ISA_AVX512BF16)
      segment<true, BFloat16>(x);
#else
      segment<false, BFloat16>(x);
#endif
      break;
    default:
      segment<false, Float16>(x);
  }
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
