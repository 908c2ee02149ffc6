// The storage format of a call, known when it runs, as a type: the switch that the kernels share.
#pragma once

#include "common/dtype.h"

namespace rlhf_fast {
namespace {

// A format to deduce by.
template <class T>
struct Format {};

// body(Format<T>{}) of fp32, bf16 or fp16.
template <class Body>
inline auto with_format(int dtype, Body body) {
  switch (dtype) {
    case kBFloat16:
      return body(Format<BFloat16>{});
    case kFloat16:
      return body(Format<Float16>{});
    default:
      return body(Format<float>{});
  }
}

// The same, of fp64 as well.
template <class Body>
inline auto with_any_format(int dtype, Body body) {
  return dtype == kFloat64 ? body(Format<double>{}) : with_format(dtype, body);
}

}  // namespace
}  // namespace rlhf_fast
