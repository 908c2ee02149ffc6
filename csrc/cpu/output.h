// Arrays too large for the caches. A plain store reads the line it will overwrite from memory first: gae then moves 25
// bytes a token where 17 would do. A streaming store does not, but only of whole lines, and it leaves nothing in the
// caches for whoever reads next.
#pragma once

#include <string.h>

#include "vec.h"

namespace rlhf_fast {
namespace {

constexpr int64_t kLine = 64;
// Of all arrays of a call together. From about a third of a last-level cache of 32 MiB on streaming gains a seventh to
// a quarter where the arrays come from memory, and loses at most a twentieth where they lie in the caches still.
constexpr int64_t kStreamBytes = 12 << 20;

// Asks for `count` numbers from `at` on of every array that there is. Where the work on a block takes longer than the
// processor looks ahead, memory would wait meanwhile. A call of its own: unrolled into one burst it takes half the gain
// away.
template <class T, int kArrays>
__attribute__((noinline)) void fetch(const T* const (&arrays)[kArrays], int64_t at, int count) {
  for (const T* from : arrays)
    if (from)
      for (int i = 0; i < count; i += kLine / static_cast<int>(sizeof(T))) prefetch(from + at + i);
}

// Whole lines for streaming stores in `bytes` bytes at `to`: they begin at the offset `head`.
struct Lines {
  int64_t head, count;

  Lines(const void* to, int64_t bytes)
      : head(static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & (kLine - 1))),
        count(bytes > head ? (bytes - head) / kLine : 0) {
    if (count == 0) head = 0;
  }
  float* at(void* p, int64_t i) const { return reinterpret_cast<float*>(static_cast<char*>(p) + head + i * kLine); }
  const float* at(const void* p, int64_t i) const {
    return reinterpret_cast<const float*>(static_cast<const char*>(p) + head + i * kLine);
  }
};

// to[0..n) = from[0..n), past the caches; fence() has to follow before other threads look.
template <class T>
inline void stream_copy(T* to, const T* from, int64_t n) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  const Lines lines(to, bytes);
  const int64_t tail = lines.head + lines.count * kLine;
  memcpy(to, from, lines.head);
  for (int64_t i = 0; i < lines.count; ++i) stream(lines.at(to, i), load(lines.at(from, i)));
  memcpy(reinterpret_cast<char*>(to) + tail, reinterpret_cast<const char*>(from) + tail, bytes - tail);
}

// to[0..n) = 0, past the caches if `past`.
template <class T>
inline void zero(T* to, int64_t n, bool past) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  const Lines lines(to, past ? bytes : 0);
  const int64_t tail = lines.head + lines.count * kLine;
  memset(to, 0, lines.head);
  for (int64_t i = 0; i < lines.count; ++i) stream(lines.at(to, i), Float::splat(0));
  memset(reinterpret_cast<char*>(to) + tail, 0, bytes - tail);
}

}  // namespace
}  // namespace rlhf_fast
