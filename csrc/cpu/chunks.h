// Sums in an order that depends on the number of elements alone: the array is cut into at most kMaxChunks chunks, each
// chunk is summed block by block in eight interleaved lanes, and the results are added chunk by chunk. Same bits for
// any number of threads and for any instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

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
    size = even <= kMinChunk ? kMinChunk : (even + kEight - 1) / kEight * kEight;
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

// real[i] = 1 for the real ones among tokens [at, at + size), 0 for the others and for the rest of the block. Numbers
// as wide as the data let the loops that select with them vectorise; bytes do not.
template <class T>
inline void load_mask(T* real, const uint8_t* mask, int64_t at, int size) {
  if (mask) {
    mask += at;
    for (int i = 0; i < size; ++i) real[i] = mask[i];
  } else {
    for (int i = 0; i < size; ++i) real[i] = 1;
  }
  for (int i = size; i < kBlock; ++i) real[i] = 0;
}

// Tokens [at, at + size) of `from`, 0 where masked and in the rest of the block.
template <class T>
inline void load_block(T* to, const T* from, const T* real, int64_t at, int size) {
  from += at;
  for (int i = 0; i < size; ++i) to[i] = real[i] != 0 ? from[i] : T(0);
  for (int i = size; i < kBlock; ++i) to[i] = 0;
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

// Real tokens among mask[0..n); all of them without a mask.
inline int64_t count_real(const uint8_t* mask, int64_t n) {
  if (!mask) return n;
  int64_t total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t stop = i + (1 << 20) < n ? i + (1 << 20) : n;
    int32_t part = 0;
    for (; i < stop; ++i) part += mask[i];
    total += part;
  }
  return total;
}

}  // namespace
}  // namespace rlhf_fast
