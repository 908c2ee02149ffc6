// Attention of single tokens over keys and values that lie where they were written (softmax over the keys that are
// there, without a mask and without copies for grouped heads).
//
// A token's keys are walked in blocks with a running maximum (online softmax). Blocks are counted from the first key
// the token sees, so a token has the same bits in any batch, whatever padding or other tokens lie beside it.
#include "formats.h"
#include "ops.h"
#include "parallel.h"
#include "softmax_blocks.h"
#include "transpose.h"
#include "vec.h"

namespace rlhf_fast {
namespace {

constexpr int kKeys = 64;                    // of a block
constexpr int kWide = 4;                     // vectors of values that are summed at a time
constexpr int64_t kGrainProducts = 1 << 16;  // of query and key numbers, below which a second thread does not pay

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Where the keys and values of a block lie.
template <class T>
struct Block {
  const T* keys[kKeys];
  const T* values[kKeys];
};

// One head of one token: the query in fp32, the sums over the keys so far.
struct Head {
  alignas(64) float query[kAttentionWidth];
  alignas(64) float sums[kAttentionWidth];
  float largest, total;
};

// query . key j for up to sixteen keys.
template <class T>
inline RLHF_FAST_INLINE Float products(const Head& h, const T* const* keys, int count, int64_t width) {
  Float sums[kLanes];
  for (int j = 0; j < kLanes; ++j) sums[j] = Float::splat(0);
  const int64_t whole = width / kLanes * kLanes;
  for (int j = 0; j < count; ++j) {
    const T* key = keys[j];
    Float s = Float::splat(0);
    for (int64_t d = 0; d < whole; d += kLanes) s = fma(load(h.query + d), load(key + d), s);
    if (whole < width) {
      const int n = static_cast<int>(width - whole);
      s = fma(load(h.query + whole, n), load(key + whole, n), s);
    }
    sums[j] = s;
  }
  transpose(sums);
  for (int half = kLanes / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] = sums[j] + sums[j + half];
  return sums[0];
}

template <class T>
void add_keys(const CachedAttentionArgs& a, Head* h, const Block<T>& block, int count, const SoftCap<Float>& soft,
              const ScaledExp<Float>& exp_of) {
  alignas(64) float scores[kKeys];
  const Float scale = Float::splat(static_cast<float>(a.scale));
  Float top = Float::splat(-INFINITY);
  for (int j = 0; j < count; j += kLanes) {
    const int n = static_cast<int>(least(count - j, kLanes));
    Float s = products(*h, block.keys + j, n, a.width) * scale;
    if (a.softcap > 0) s = soft.cap * soft.tanh_of(s);
    s = pad(s, n);
    top = max(top, s);
    store(scores + j, s);
  }
  const float block_top = maximum(top);
  if (block_top > h->largest) {
    if (h->largest > -INFINITY) {
      const float factor = static_cast<float>(::exp(static_cast<double>(h->largest) - block_top));
      h->total *= factor;
      for (int64_t d = 0; d < a.value_width; d += kLanes)  // the room behind the width is there
        store(h->sums + d, load(h->sums + d) * Float::splat(factor));
    }
    h->largest = block_top;
  }
  const Float base = Float::splat(h->largest);
  Float total = Float::splat(0);
  for (int j = 0; j < count; j += kLanes) {
    Mask alive;
    const Float e = exp_of(load(scores + j) - base, &alive);
    total = total + e;
    store(scores + j, e);
  }
  const Float one[1] = {total};
  h->total += static_cast<float>(sum_of(one));
  for (int64_t d = 0; d < a.value_width; d += kWide * kLanes) {
    const int64_t left = a.value_width - d;
    if (left >= kWide * kLanes) {
      Float sums[kWide];
      for (int v = 0; v < kWide; ++v) sums[v] = load(h->sums + d + v * kLanes);
      for (int j = 0; j < count; ++j) {
        const T* value = block.values[j] + d;
        const Float p = Float::splat(scores[j]);
        for (int v = 0; v < kWide; ++v) sums[v] = fma(p, load(value + v * kLanes), sums[v]);
      }
      for (int v = 0; v < kWide; ++v) store(h->sums + d + v * kLanes, sums[v]);
      continue;
    }
    for (int64_t k = 0; k < left; k += kLanes) {
      const int n = static_cast<int>(least(left - k, kLanes));
      Float sum = load(h->sums + d + k);
      for (int j = 0; j < count; ++j) sum = fma(Float::splat(scores[j]), load(block.values[j] + d + k, n), sum);
      store(h->sums + d + k, sum);
    }
  }
}

template <class T>
void attend(const CachedAttentionArgs& a, int64_t token, int64_t kv_head, const SoftCap<Float>& soft,
            const ScaledExp<Float>& exp_of, Head* h) {
  const int64_t start = a.prefix_keys ? a.prefix_start[token] : 0, stop = a.prefix_keys ? a.prefix_stop[token] : 0;
  const int64_t shared = stop > start ? stop - start : 0, own = a.keys ? a.lengths[token] : 0, seen = shared + own;
  const int64_t skipped = a.window > 0 && seen > a.window ? seen - a.window : 0, group = a.heads / a.kv_heads;
  const int64_t row = own > 0 ? a.rows[token] : 0, prefix_row = shared > 0 ? a.prefix_rows[token] : 0;
  T *const keys = static_cast<T*>(a.keys) + row * a.key_row + kv_head * a.key_head, *const values =
                                                                                        static_cast<T*>(a.values) +
                                                                                        row * a.value_row +
                                                                                        kv_head * a.value_head;
  const T *const prefix_keys = static_cast<const T*>(a.prefix_keys) + prefix_row * a.prefix_key_row +
                               kv_head * a.prefix_key_head + start * a.prefix_key_position,
                 *const prefix_values = static_cast<const T*>(a.prefix_values) + prefix_row * a.prefix_value_row +
                                        kv_head * a.prefix_value_head + start * a.prefix_value_position;
  if (a.new_keys && own > 0) {
    __builtin_memcpy(keys + (own - 1) * a.key_position,
                     static_cast<const T*>(a.new_keys) + token * a.new_key_token + kv_head * a.new_key_head,
                     a.width * sizeof(T));
    __builtin_memcpy(values + (own - 1) * a.value_position,
                     static_cast<const T*>(a.new_values) + token * a.new_value_token + kv_head * a.new_value_head,
                     a.value_width * sizeof(T));
  }
  Block<T> block;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const T* query = static_cast<const T*>(a.query) + token * a.query_token + head * a.query_head;
    for (int64_t d = 0; d < a.width; d += kLanes)
      store(h->query + d, load(query + d, static_cast<int>(least(a.width - d, kLanes))));
    for (int64_t d = 0; d < a.value_width; d += kLanes) store(h->sums + d, Float::splat(0));
    h->largest = -INFINITY;
    h->total = 0;
    for (int64_t i = skipped; i < seen; i += kKeys) {
      const int count = static_cast<int>(least(kKeys, seen - i));
      if (seen - skipped > kKeys || head == kv_head * group) {
        for (int j = 0; j < count; ++j) {
          const bool is_own = i + j >= shared;
          const int64_t at = is_own ? i + j - shared : i + j;
          block.keys[j] = is_own ? keys + at * a.key_position : prefix_keys + at * a.prefix_key_position;
          block.values[j] = is_own ? values + at * a.value_position : prefix_values + at * a.prefix_value_position;
        }
      }
      add_keys<T>(a, h, block, count, soft, exp_of);
    }
    const Float by = Float::splat(seen > 0 ? 1 / h->total : 0);
    T* out = static_cast<T*>(a.out) + (token * a.heads + head) * a.value_width;
    for (int64_t d = 0; d < a.value_width; d += kLanes)
      store(out + d, load(h->sums + d) * by, static_cast<int>(least(a.value_width - d, kLanes)));
  }
}

template <class T>
void run(Format<T>, const CachedAttentionArgs& a) {
  const SoftCap<Float> soft(a.softcap > 0 ? a.softcap : 1);
  const ScaledExp<Float> exp_of(1);
  int64_t next = 0, products = 0;
  for (int64_t i = 0; i < a.tokens; ++i)
    products += ((a.prefix_keys ? a.prefix_stop[i] - a.prefix_start[i] : 0) + (a.keys ? a.lengths[i] : 0)) * a.width;
  products *= a.heads;
  const int64_t most = products / kGrainProducts + 1, threads = least(a.threads, most), tasks = a.tokens * a.kv_heads;
  const int64_t few = least(tasks, tasks / (8 * threads) + 1);
  for_ranges(threads, 1, static_cast<int>(threads), [&](int64_t, int64_t) {
    Head h;
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, few, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      for (int64_t i = task; i < least(tasks, task + few); ++i)
        attend<T>(a, i / a.kv_heads, i % a.kv_heads, soft, exp_of, &h);
    }
  });
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t cached_attention(const CachedAttentionArgs& a) {
  with_format(a.dtype, [&](auto format) { run(format, a); });
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
