// One segment of a linear layer with adapters: low = scale x A, then y += low B; A (in, r) and B (r, out) of rank r.
//
// low stays fp32 and is kept: the backward multiplies it, and runs the same kernel with the factors changed places.
// Where x is bf16 and the processor multiplies bf16, operands are rounded to it, as PyTorch's product would round them.
#include "matmul.h"

namespace rlhf_fast {
namespace {

inline MatmulArgs product(const LoraLinearArgs& x, bool accumulate) {
  MatmulArgs p{};
  p.workspace = x.workspace;
  p.m = x.rows;
  p.accumulate = accumulate;
  p.threads = x.threads;
  return p;
}

template <bool kNarrow, class T>
void segment(const LoraLinearArgs& x) {
  MatmulArgs down = product(x, false);
  down.a = x.x;
  down.a_row = x.x_row;
  down.a_column = 1;
  down.b = x.a;
  down.b_row = x.a_row;
  down.b_column = x.a_column;
  down.k = x.in;
  down.n = x.rank;
  down.c = x.low;
  down.c_row = x.rank;
  multiply<kNarrow, T, float>(down);
  const Float scale = Float::splat(static_cast<float>(x.scale));
  float* const low = static_cast<float*>(x.low);
  const int64_t count = x.rows * x.rank;
  for_ranges(count, 65536, x.threads, [&](int64_t i, int64_t end) {
    for (; i + kLanes <= end; i += kLanes) store(low + i, load(low + i) * scale);
    if (i < end) store(low + i, load(low + i, static_cast<int>(end - i)) * scale, static_cast<int>(end - i));
  });
  if (!x.y) return;
  MatmulArgs up = product(x, true);
  up.a = x.low;
  up.a_row = x.rank;
  up.a_column = 1;
  up.b = x.b;
  up.b_row = x.b_row;
  up.b_column = x.b_column;
  up.k = x.rank;
  up.n = x.out;
  up.c = x.y;
  up.c_row = x.y_row;
  multiply<kNarrow, float, float, T>(up);
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
