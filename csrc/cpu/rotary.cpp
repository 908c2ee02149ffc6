// Rotary positions of queries and keys, by halves: (a, b) to (a cos - b sin, b cos' + a sin'), rounded once, where cos
// and cos' are the two halves of a table's row. The transpose, which the backward needs, is the same with the tables
// changed places.
#include "formats.h"
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kGrain = 16384;  // numbers; below this a second thread costs more than it saves

template <class T, bool kTransposed>
inline void rotate(const T* x, const T* cosine, const T* sine, T* out, int64_t half) {
  for (int64_t j = 0; j < half; j += kLanes) {
    const int lanes = static_cast<int>(half - j < kLanes ? half - j : kLanes);
    const Float a = load_lanes(x + j, lanes), b = load_lanes(x + half + j, lanes);
    const Float low = load_lanes(sine + j, lanes), high = load_lanes(sine + half + j, lanes);
    const Float of_a = a * load_lanes(cosine + j, lanes), of_b = b * load_lanes(cosine + half + j, lanes);
    store_lanes(out + j, kTransposed ? fma(b, high, of_a) : of_a - b * low, lanes);
    store_lanes(out + half + j, kTransposed ? of_b - a * low : fma(a, high, of_b), lanes);
  }
}

template <class T, bool kTransposed>
void all(const RotaryArgs& a) {
  const T *query = static_cast<const T*>(a.query), *key = static_cast<const T*>(a.key);
  T *query_out = static_cast<T*>(a.query_out), *key_out = static_cast<T*>(a.key_out);
  const int64_t half = a.width / 2, numbers = (a.heads + a.kv_heads) * a.width;
  for_ranges(a.batch * a.length, kGrain / (numbers + 1) + 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / a.length, position = i % a.length;
      const T* cosine = static_cast<const T*>(a.cosine) + row * a.cosine_row + position * a.cosine_position;
      const T* sine = static_cast<const T*>(a.sine) + row * a.sine_row + position * a.sine_position;
      const T* from = query + row * a.query_row + position * a.query_position;
      for (int64_t h = 0; h < a.heads; ++h)
        rotate<T, kTransposed>(from + h * a.query_head, cosine, sine, query_out + (i * a.heads + h) * a.width, half);
      from = key + row * a.key_row + position * a.key_position;
      for (int64_t h = 0; h < a.kv_heads; ++h)
        rotate<T, kTransposed>(from + h * a.key_head, cosine, sine, key_out + (i * a.kv_heads + h) * a.width, half);
    }
  });
}

template <class T>
void either(Format<T>, const RotaryArgs& a) {
  a.transposed ? all<T, true>(a) : all<T, false>(a);
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t rotary(const RotaryArgs& a) {
  with_format(a.dtype, [&](auto format) { either(format, a); });
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
