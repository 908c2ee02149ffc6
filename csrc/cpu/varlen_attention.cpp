// Causal attention within sequences that lie end to end, and its gradients.
//
// A task has the queries of one sequence under one head of keys (the forward takes kChunk of them at a time), and makes
// fp32 copies of the keys and values they see as the products want them. Scores exist for kBlock queries at a time; the
// backward computes them again. What a token gives depends on its sequence alone: it has the same bits in any batch and
// on any thread.
#include "formats.h"
#include "ops.h"
#include "parallel.h"
#include "transpose.h"
#include "vec.h"

namespace rlhf_fast {
namespace {

#if defined(RLHF_FAST_VEC512)
constexpr int kTileRows = 8, kVectors = 2;  // 16 of 32 registers hold sums: four cycles of two multiply-adds each
#elif defined(RLHF_FAST_VEC256)
constexpr int kTileRows = 6, kVectors = 1;  // 12 of 16; a vector is two registers
#else
constexpr int kTileRows = 2, kVectors = 1;
#endif
constexpr int kTileColumns = kVectors * kLanes;
constexpr int64_t kBlock = kAttentionBlock, kChunk = kAttentionChunk;
constexpr int64_t kGrainProducts = 1 << 16;  // of query and key numbers, below which a second thread does not pay
static_assert(kBlock % kTileColumns == 0);

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t down(int64_t n) { return n / kBlock * kBlock; }
inline int64_t up(int64_t n) { return down(n + kBlock - 1); }

// Numbers between rows of n of them: an odd number of cache lines, or rows would compete for few places in the caches.
inline int64_t pitch_of(int64_t n) { return up(n) + kLanes; }

// Element (i, u) of a at i line + u along; row u of b at u pitch.
template <int R>
void tile(const float* a, int64_t line, int64_t along, const float* b, int64_t b_pitch, int64_t depth, float* c,
          int64_t c_pitch, bool add) {
  Float sums[R][kVectors];
  for (auto& row : sums)
    for (Float& s : row) s = Float::splat(0);
  for (int64_t u = 0; u < depth; ++u) {
    Float column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + u * b_pitch + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Float row = Float::splat(a[i * line + u * along]);
      for (int v = 0; v < kVectors; ++v) sums[i][v] = fma(row, column[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + i * c_pitch + v * kLanes;
      store(to, add ? load(to) + sums[i][v] : sums[i][v]);
    }
}

template <int R = kTileRows>
inline void tile_of(int64_t rows, const float* a, int64_t line, int64_t along, const float* b, int64_t b_pitch,
                    int64_t depth, float* c, int64_t c_pitch, bool add) {
  if (rows >= R) return tile<R>(a, line, along, b, b_pitch, depth, c, c_pitch, add);
  if constexpr (R > 1) tile_of<R - 1>(rows, a, line, along, b, b_pitch, depth, c, c_pitch, add);
}

// c (m, n) = a (m, depth) b (depth, n), or with `add` added to it; n in whole tiles.
void product(const float* a, int64_t line, int64_t along, int64_t m, const float* b, int64_t b_pitch, int64_t n,
             int64_t depth, float* c, int64_t c_pitch, bool add) {
  for (int64_t j = 0; j < n; j += kTileColumns)
    for (int64_t i = 0; i < m; i += kTileRows)
      tile_of(m - i, a + i * line, line, along, b + j, b_pitch, depth, c + i * c_pitch + j, c_pitch, add);
}

// Rows of numbers as fp32, `pitch` apart; 0 behind the width, up to whole blocks.
template <class T>
void copy_rows(const T* from, int64_t step, int64_t rows, int64_t width, float* to, int64_t pitch) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < up(width); d += kLanes)
      store(to + i * pitch + d,
            d < width ? load_lanes(from + i * step + d, static_cast<int>(least(kLanes, width - d))) : Float::splat(0));
}

// The same with rows as columns; 0 in the columns behind them, up to whole blocks.
template <class T>
void copy_columns(const T* from, int64_t step, int64_t rows, int64_t width, float* to, int64_t pitch) {
  for (int64_t i = 0; i < up(rows); i += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      const int some = static_cast<int>(least(kLanes, width - d));
      Float block[kLanes];
      for (int64_t j = 0; j < kLanes; ++j)
        block[j] = i + j < rows ? load_lanes(from + (i + j) * step + d, some) : Float::splat(0);
      transpose(block);
      for (int j = 0; j < some; ++j) store(to + (d + j) * pitch + i, block[j]);
    }
}

template <class T>
void store_row(T* to, const float* from, int64_t width, const Float& by) {
  for (int64_t d = 0; d < width; d += kLanes)
    store_lanes(to + d, load(from + d) * by, static_cast<int>(least(kLanes, width - d)));
}

// Keys [first, last) of a row of scores; `at(j, x)` gives what stands for lanes j to j + 15, 0 where there is no key.
template <class At>
inline RLHF_FAST_INLINE void over_keys(float* row, int64_t first, int64_t last, int64_t columns, At at) {
  const int64_t begin = first / kLanes * kLanes;
  for (int64_t j = 0; j < begin; j += kLanes) store(row + j, Float::splat(0));
  int64_t j = begin;
  for (; j < last; j += kLanes) {
    Float x = at(j);
    if (j < first) x = select(first_lanes(static_cast<int>(first - j)), Float::splat(0), x);
    if (last - j < kLanes) x = where(first_lanes(static_cast<int>(last - j)), x);
    store(row + j, x);
  }
  for (; j < columns; j += kLanes) store(row + j, Float::splat(0));
}

// Scores of a row as `over_keys` finds them there; -inf where there is no key.
inline RLHF_FAST_INLINE Float scores(const float* row, int64_t j, int64_t first, int64_t last, const Float& scale) {
  Float x = load(row + j) * scale;
  if (j < first) x = select(first_lanes(static_cast<int>(first - j)), Float::splat(-INFINITY), x);
  return last - j < kLanes ? pad(x, static_cast<int>(last - j)) : x;
}

// Queries [row, row + rows) of a sequence and the keys [low, row + rows) that some of them see.
struct Queries {
  int64_t row, rows, low, columns;

  Queries(const VarlenAttentionArgs& a, int64_t row, int64_t stop)
      : row(row), rows(least(kBlock, stop - row)), low(down(first_key(a, row))), columns(up(row + rows - low)) {}
  static int64_t first_key(const VarlenAttentionArgs& a, int64_t i) {
    return a.window > 0 ? most(0, i - a.window + 1) : 0;
  }
  int64_t depth() const { return row + rows - low; }
  // Keys of query i, counted from low.
  int64_t first(const VarlenAttentionArgs& a, int64_t i) const { return first_key(a, row + i) - low; }
  int64_t last(int64_t i) const { return row + i + 1 - low; }
};

// How rows lie in a workspace.
struct Places {
  int64_t keys_pitch, width_pitch, value_pitch;

  explicit Places(const VarlenAttentionArgs& a)
      : keys_pitch(pitch_of(a.longest)), width_pitch(pitch_of(a.width)), value_pitch(pitch_of(a.value_width)) {}

  // Floats that one thread needs, in the order in which forward and backward take them.
  int64_t floats(const VarlenAttentionArgs& a) const {
    const int64_t keys = up(a.longest), columns = a.width * keys_pitch, block = width_pitch + keys_pitch + value_pitch;
    if (!a.grad) return columns + keys * value_pitch + kBlock * block;
    return columns + a.value_width * keys_pitch + keys * (2 * width_pitch + value_pitch) +
           kBlock * (block + keys_pitch + width_pitch);
  }
};

template <class T>
struct Sequence {
  const T *query, *key, *value;
  int64_t start, length;

  Sequence(const VarlenAttentionArgs& a, int64_t s, int64_t kv_head) {
    start = most(0, least(a.cu_seqlens[s], a.tokens));
    length = most(0, least(least(a.cu_seqlens[s + 1], a.tokens) - start, a.longest));
    query = static_cast<const T*>(a.query) + start * a.query_token;
    key = static_cast<const T*>(a.key) + start * a.key_token + kv_head * a.key_head;
    value = static_cast<const T*>(a.value) + start * a.value_token + kv_head * a.value_head;
  }
};

template <class T>
void forward(const VarlenAttentionArgs& a, int64_t s, int64_t kv_head, int64_t chunk, float* at) {
  const Sequence<T> x(a, s, kv_head);
  const int64_t begin = chunk * kChunk, stop = least(x.length, begin + kChunk), group = a.heads / a.kv_heads;
  if (begin >= stop) return;
  const Places p(a);
  const int64_t base = down(Queries::first_key(a, begin)), keys = stop - base;
  float* const columns = at;                               // of the keys (width, keys)
  float* const values = columns + a.width * p.keys_pitch;  // (keys, value_width)
  float* const query = values + up(a.longest) * p.value_pitch;
  float* const weights = query + kBlock * p.width_pitch;
  float* const sums = weights + kBlock * p.keys_pitch;
  copy_columns(x.key + base * a.key_token, a.key_token, keys, a.width, columns, p.keys_pitch);
  copy_rows(x.value + base * a.value_token, a.value_token, keys, a.value_width, values, p.value_pitch);
  const Float scale = Float::splat(static_cast<float>(a.scale));
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t i = begin; i < stop; i += kBlock) {
      const Queries q(a, i, stop);
      copy_rows(x.query + q.row * a.query_token + head * a.query_head, a.query_token, q.rows, a.width, query,
                p.width_pitch);
      product(query, p.width_pitch, 1, q.rows, columns + (q.low - base), p.keys_pitch, q.columns, a.width, weights,
              p.keys_pitch, false);
      float shares[kBlock];
      for (int64_t r = 0; r < q.rows; ++r) {
        float* const row = weights + r * p.keys_pitch;
        const int64_t first = q.first(a, r), last = q.last(r);
        Float top = Float::splat(-INFINITY);
        for (int64_t j = first / kLanes * kLanes; j < last; j += kLanes)
          top = max(top, scores(row, j, first, last, scale));
        const float largest = maximum(top);
        Float total[1] = {Float::splat(0)};
        over_keys(row, first, last, q.columns, [&](int64_t j) RLHF_FAST_INLINE {
          const Float e = exp(scores(row, j, first, last, scale) - Float::splat(largest));
          total[0] = total[0] + e;
          return e;
        });
        const double sum = sum_of(total);
        shares[r] = static_cast<float>(1 / sum);
        float* const state = a.state + 2 * ((x.start + q.row + r) * a.heads + head);
        state[0] = largest;
        state[1] = shares[r];
      }
      product(weights, p.keys_pitch, 1, q.rows, values + (q.low - base) * p.value_pitch, p.value_pitch,
              up(a.value_width), q.depth(), sums, p.value_pitch, false);
      T* const out = static_cast<T*>(a.out) + ((x.start + q.row) * a.heads + head) * a.value_width;
      for (int64_t r = 0; r < q.rows; ++r)
        store_row(out + r * a.heads * a.value_width, sums + r * p.value_pitch, a.value_width, Float::splat(shares[r]));
    }
}

template <class T>
void backward(const VarlenAttentionArgs& a, int64_t s, int64_t kv_head, int64_t, float* at) {
  const Sequence<T> x(a, s, kv_head);
  const int64_t group = a.heads / a.kv_heads, padded = up(x.length);
  if (!x.length) return;
  const Places p(a);
  float* const columns = at;                                   // of the keys (width, keys)
  float* const rows = columns + a.width * p.keys_pitch;        // of the keys (keys, width)
  float* const values = rows + up(a.longest) * p.width_pitch;  // their columns (value_width, keys)
  float* const grad_keys = values + a.value_width * p.keys_pitch;
  float* const grad_values = grad_keys + up(a.longest) * p.width_pitch;
  float* const query = grad_values + up(a.longest) * p.value_pitch;
  float* const grad = query + kBlock * p.width_pitch;
  float* const weights = grad + kBlock * p.value_pitch;
  float* const slopes = weights + kBlock * p.keys_pitch;
  float* const grad_query = slopes + kBlock * p.keys_pitch;
  copy_columns(x.key, a.key_token, x.length, a.width, columns, p.keys_pitch);
  copy_rows(x.key, a.key_token, x.length, a.width, rows, p.width_pitch);
  copy_columns(x.value, a.value_token, x.length, a.value_width, values, p.keys_pitch);
  for (int64_t i = 0; i < padded * p.width_pitch; i += kLanes) store(grad_keys + i, Float::splat(0));
  for (int64_t i = 0; i < padded * p.value_pitch; i += kLanes) store(grad_values + i, Float::splat(0));
  const Float scale = Float::splat(static_cast<float>(a.scale)), one = Float::splat(1);
  const T* const upstream = static_cast<const T*>(a.grad) + x.start * a.grad_token;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t i = 0; i < x.length; i += kBlock) {
      const Queries q(a, i, x.length);
      copy_rows(x.query + q.row * a.query_token + head * a.query_head, a.query_token, q.rows, a.width, query,
                p.width_pitch);
      copy_rows(upstream + q.row * a.grad_token + head * a.grad_head, a.grad_token, q.rows, a.value_width, grad,
                p.value_pitch);
      product(query, p.width_pitch, 1, q.rows, columns + q.low, p.keys_pitch, q.columns, a.width, weights, p.keys_pitch,
              false);
      product(grad, p.value_pitch, 1, q.rows, values + q.low, p.keys_pitch, q.columns, a.value_width, slopes,
              p.keys_pitch, false);
      for (int64_t r = 0; r < q.rows; ++r) {
        float *const row = weights + r * p.keys_pitch, *const slope = slopes + r * p.keys_pitch;
        const int64_t first = q.first(a, r), last = q.last(r);
        const float* const state = a.state + 2 * ((x.start + q.row + r) * a.heads + head);
        const Float largest = Float::splat(state[0]), share = Float::splat(state[1]);
        Float total[1] = {Float::splat(0)};
        over_keys(row, first, last, q.columns, [&](int64_t j) RLHF_FAST_INLINE {
          const Float w = exp(scores(row, j, first, last, scale) - largest) * share;
          total[0] = fma(w, load(slope + j), total[0]);
          return w;
        });
        const Float mean = Float::splat(static_cast<float>(sum_of(total)));
        over_keys(slope, first, last, q.columns,
                  [&](int64_t j) RLHF_FAST_INLINE { return load(row + j) * (load(slope + j) - mean) * scale; });
      }
      product(slopes, p.keys_pitch, 1, q.rows, rows + q.low * p.width_pitch, p.width_pitch, up(a.width), q.depth(),
              grad_query, p.width_pitch, false);
      T* const out = static_cast<T*>(a.grad_query) + ((x.start + q.row) * a.heads + head) * a.width;
      for (int64_t r = 0; r < q.rows; ++r)
        store_row(out + r * a.heads * a.width, grad_query + r * p.width_pitch, a.width, one);
      product(slopes, 1, p.keys_pitch, q.depth(), query, p.width_pitch, up(a.width), q.rows,
              grad_keys + q.low * p.width_pitch, p.width_pitch, true);
      product(weights, 1, p.keys_pitch, q.depth(), grad, p.value_pitch, up(a.value_width), q.rows,
              grad_values + q.low * p.value_pitch, p.value_pitch, true);
    }
  for (int64_t i = 0; i < x.length; ++i) {
    const int64_t place = (x.start + i) * a.kv_heads + kv_head;
    store_row(static_cast<T*>(a.grad_key) + place * a.width, grad_keys + i * p.width_pitch, a.width, one);
    store_row(static_cast<T*>(a.grad_value) + place * a.value_width, grad_values + i * p.value_pitch, a.value_width,
              one);
  }
}

// task(sequence, head of keys, chunk, workspace)
template <class Task>
void run(const VarlenAttentionArgs& a, int64_t chunks, Task task) {
  const int64_t floats = Places(a).floats(a);
  int64_t next = 0, products = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t length = a.cu_seqlens[s + 1] - a.cu_seqlens[s];
    products += length * length * a.heads * a.width / 2;
  }
  const int64_t tasks = a.sequences * a.kv_heads * chunks,
                threads = most(1, least(least(a.threads, tasks), products / kGrainProducts + 1));
  for_ranges(threads, 1, static_cast<int>(threads), [&](int64_t thread, int64_t) {
    const unsigned before = flush_denormals();
    for (;;) {
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= tasks) break;
      task(i / chunks / a.kv_heads, i / chunks % a.kv_heads, i % chunks, a.workspace + thread * floats);
    }
    restore_denormals(before);
  });
}

template <class T>
void either(Format<T>, const VarlenAttentionArgs& a) {
  if (a.grad)
    run(a, 1, [&](int64_t s, int64_t head, int64_t chunk, float* at) { backward<T>(a, s, head, chunk, at); });
  else
    run(a, (a.longest + kChunk - 1) / kChunk,
        [&](int64_t s, int64_t head, int64_t chunk, float* at) { forward<T>(a, s, head, chunk, at); });
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t varlen_attention(const VarlenAttentionArgs& a) {
  if (!a.workspace) return Places(a).floats(a);
  with_format(a.dtype, [&](auto format) { either(format, a); });
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
