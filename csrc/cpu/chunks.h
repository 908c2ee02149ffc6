// Sums in an order that depends on the number of elements alone: the array is cut into at most kMaxChunks chunks, each
// chunk is summed block by block in eight interleaved lanes, and the results are added chunk by chunk. Same bits for
// any number of threads and for any instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

#include "parallel.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kMaxChunks = 256;
constexpr int64_t kMinChunk = 1024;
constexpr int64_t kGrainChunks = 8;  // below this a second thread costs more than it saves
constexpr int kLaneCount = 8;
constexpr int kBlock = 256;  // tokens whose terms live on the stack at a time

struct Chunks {
  int64_t n, size, count;

  explicit Chunks(int64_t n) : n(n) {
    const int64_t even = (n + kMaxChunks - 1) / kMaxChunks;
    size = even <= kMinChunk ? kMinChunk : (even + kLaneCount - 1) / kLaneCount * kLaneCount;
    count = (n + size - 1) / size;
  }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return (chunk + 1) * size < n ? (chunk + 1) * size : n; }

  // body(chunk, begin, end) for every chunk, on several threads.
  template <class Body>
  void each(int threads, Body body) const {
    for_ranges(count, kGrainChunks, threads, [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) body(c, begin(c), end(c));
    });
  }
};

template <class T>
using Lanes __attribute__((vector_size(kLaneCount * sizeof(T)))) = T;  // one register or several, by instruction set

inline double add_lanes(const Lanes<double>& x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

template <class T>
inline void load_lanes(Lanes<double>* to, const T* from) {
  Lanes<T> x;
  memcpy(&x, from, sizeof(x));
  *to = __builtin_convertvector(x, Lanes<double>);
}

// Sum of x[0..kBlock).
template <class T>
inline double total_of(const T* x) {
  Lanes<double> sum = {}, term;
  for (int i = 0; i < kBlock; i += kLaneCount) {
    load_lanes(&term, x + i);
    sum += term;
  }
  return add_lanes(sum);
}

// Sum of x[i] y[i].
template <class T, class U>
inline double dot_of(const T* x, const U* y) {
  Lanes<double> sum = {}, a, b;
  for (int i = 0; i < kBlock; i += kLaneCount) {
    load_lanes(&a, x + i);
    load_lanes(&b, y + i);
    sum += a * b;
  }
  return add_lanes(sum);
}

// Sum of f(i) over [0, n), in chunks. f is called in a loop of its own, so that it vectorises.
template <class F>
inline double sum_chunks(const Chunks& chunks, int threads, F f) {
  double partial[kMaxChunks];
  chunks.each(threads, [&](int64_t c, int64_t begin, int64_t end) {
    double sum = 0, block[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t size = end - at < kBlock ? end - at : kBlock;
      for (int64_t i = 0; i < size; ++i) block[i] = f(at + i);
      for (int64_t i = size; i < kBlock; ++i) block[i] = 0;
      sum += total_of(block);
    }
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
