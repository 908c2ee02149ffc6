// Sums in an order that depends on the number of elements alone: the array is cut into at most kMaxChunks chunks, each
// chunk is summed block by block in eight interleaved lanes, and the results are added chunk by chunk. Same bits for
// any number of threads and for any instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "common/elementary.h"
#include "eight.h"
#include "parallel.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kMaxChunks = 256;
constexpr int64_t kMinChunk = 1024;
constexpr int64_t kGrainChunks = 8;  // below this a second thread costs more than it saves
constexpr int kBlock = 256;          // tokens whose terms live on the stack at a time

struct Chunks {
  int64_t n, size, count;

  explicit Chunks(int64_t n) : n(n) {
    const int64_t even = (n + kMaxChunks - 1) / kMaxChunks;
    size = even <= kMinChunk ? kMinChunk : (even + kBlock - 1) / kBlock * kBlock;
    count = (n + size - 1) / size;
  }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * size < n ? (chunk + 1) * size : n; }

  // body(chunk, begin, end) for the chunks [from, to).
  template <class Body>
  void each(int64_t from, int64_t to, Body body) const {
    for (int64_t c = from; c < to; ++c) body(c, begin(c), end(c));
  }
  // body(phase, from, to) on chunks [from, to), on several threads.
  template <class Body>
  void in_phases(int threads, int phases, Body body) const {
    for_phases(count, kGrainChunks, threads, phases, body);
  }
  // body(chunk, begin, end) for every chunk, on several threads.
  template <class Body>
  void each(int threads, Body body) const {
    in_phases(threads, 1, [&](int, int64_t from, int64_t to) { each(from, to, body); });
  }
};

// Sum of x[0..kBlock).
template <class T>
inline double total_of(const T* x) {
  Eight sum = Eight::splat(0);
  for (int i = 0; i < kBlock; i += kEight) sum = sum + Eight::load(x + i);
  return total(sum);
}

// Sum of x[i] y[i].
template <class T, class U>
inline double dot_of(const T* x, const U* y) {
  Eight sum = Eight::splat(0);
  for (int i = 0; i < kBlock; i += kEight) sum = sum + Eight::load(x + i) * Eight::load(y + i);
  return total(sum);
}

inline bool all_real(const uint8_t* mask, int64_t n) { return !mask || !memchr(mask, 0, n); }

template <class T>
using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T, so that loops with both vectorise

// x where `on` has all bits, 0 where it has none. Never a branch, whatever x holds.
template <class T>
inline T kept(T x, Int<T> on) {
  return bits_as<T>(bits_as<Int<T>>(x) & on);
}

// x where `on` has all bits, y where it has none.
template <class T>
inline T chosen(T x, T y, Int<T> on) {
  return bits_as<T>((bits_as<Int<T>>(x) & on) | (bits_as<Int<T>>(y) & ~on));
}

// on[i] = all bits for the real ones among tokens [at, at + size), none for the others and for the rest of the block.
template <class I>
inline void load_mask(I* on, const uint8_t* mask, int64_t at, int size) {
  if (mask) {
    mask += at;
    for (int i = 0; i < size; ++i) on[i] = -static_cast<I>(mask[i]);
  } else {
    for (int i = 0; i < size; ++i) on[i] = -1;
  }
  for (int i = size; i < kBlock; ++i) on[i] = 0;
}

// Tokens [at, at + size) of `from`; `fill` where masked and in the rest of the block.
template <class T>
inline void load_block(T* __restrict to, const T* __restrict from, const Int<T>* __restrict on, int64_t at, int size,
                       T fill = 0) {
  from += at;
  const Int<T> other = bits_as<Int<T>>(fill);
  for (int i = 0; i < size; ++i) to[i] = bits_as<T>((bits_as<Int<T>>(from[i]) & on[i]) | (other & ~on[i]));
  for (int i = size; i < kBlock; ++i) to[i] = fill;
}

// Tokens [at, at + size) of `from` as a whole block: the array itself, or `copy` where tokens are masked or missing,
// with `fill` in their place. whole: none is.
template <class T>
inline const T* block_of(const T* from, T* copy, const Int<T>* on, bool whole, int64_t at, int size, T fill = 0) {
  if (whole) return from + at;
  load_block(copy, from, on, at, size, fill);
  return copy;
}

// body(at, size) for the blocks of [begin, end).
template <class Body>
inline void each_block(int64_t begin, int64_t end, Body body) {
  for (int64_t at = begin; at < end; at += kBlock) body(at, static_cast<int>(end - at < kBlock ? end - at : kBlock));
}

// Sum over [0, n), in chunks; term(at, size) is the sum of a block.
template <class Term>
inline double sum_chunks(const Chunks& chunks, int threads, Term term) {
  double partial[kMaxChunks];
  chunks.each(threads, [&](int64_t c, int64_t begin, int64_t end) {
    double sum = 0;
    each_block(begin, end, [&](int64_t at, int size) { sum += term(at, size); });
    partial[c] = sum;
  });
  double total = 0;
  for (int64_t c = 0; c < chunks.count; ++c) total += partial[c];
  return total;
}

// Real tokens among mask[0..n); all of them without a mask. Eight bytes are added up at a time, in the eight bytes of
// an integer, as often as they can hold.
inline int64_t count_real(const uint8_t* mask, int64_t n) {
  if (!mask) return n;
  int64_t all = 0, i = 0;
  while (n - i >= 8) {
    const int64_t stop = n - i < 8 * 255 ? n - (n - i) % 8 : i + 8 * 255;
    uint64_t bytes = 0;
    for (; i < stop; i += 8) {
      uint64_t eight;
      memcpy(&eight, mask + i, sizeof(eight));
      bytes += eight;
    }
    const uint64_t even = 0x00ff00ff00ff00ff;
    all += static_cast<int64_t>((((bytes & even) + (bytes >> 8 & even)) * 0x0001000100010001) >> 48);
  }
  for (; i < n; ++i) all += mask[i];
  return all;
}

}  // namespace
}  // namespace rlhf_fast
