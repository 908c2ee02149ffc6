// Rows of padded (rows, length) and packed (cu_seqlens) per-token arrays.
#pragma once

#include <stdint.h>
#include <string.h>

namespace rlhf_fast {
namespace {

constexpr int64_t kGrainTokens = 16384;  // below this a second thread costs more than it saves

struct Row {
  int64_t begin, end;
};

template <class Args>
inline Row row_of(const Args& a, int64_t i) {
  if (a.cu_seqlens) return {a.cu_seqlens[i], a.cu_seqlens[i + 1]};
  return {i * a.length, (i + 1) * a.length};
}

// The slot after the last real token of a row.
inline int64_t real_end(const uint8_t* mask, Row row) {
  int64_t end = row.end;
  if (!mask) return end;
  for (uint64_t eight; end - row.begin >= 8; end -= 8) {
    memcpy(&eight, mask + end - 8, 8);
    if (eight) break;
  }
  while (end > row.begin && !mask[end - 1]) --end;
  return end;
}

template <class Args>
inline int64_t row_grain(const Args& a) {
  const int64_t tokens = a.cu_seqlens ? (a.rows ? a.cu_seqlens[a.rows] / a.rows : 0) : a.length;
  return tokens >= kGrainTokens ? 1 : kGrainTokens / (tokens + 1) + 1;
}

}  // namespace
}  // namespace rlhf_fast
