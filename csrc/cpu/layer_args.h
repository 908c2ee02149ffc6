// Arguments of the layers of a model: products, norms, gates, rotations and attention. See ops.h for what holds for
// all.
#pragma once

#include <stdint.h>

namespace rlhf_fast {

// A product with a weight in panels of PackLinearArgs, and with a second one of low rank:
// out = scale (x W^T + low B^T) + bias. Every element is summed over k in an order that depends on k alone.
struct PackedLinearArgs {
  const void* x;            // (m, k), rows x_row apart, `dtype`; bf16 rows are read in pairs
  const float* weight;      // packed (n, k)
  const void* low;          // (m, r) contiguous, `dtype`, or null
  const float* low_weight;  // packed (n, r), or null
  const float* bias;        // (n,) or null
  void* out;                // (m, n), rows out_row apart, `out_dtype`
  void* workspace;  // (m, k + 32) `dtype`: room for rows that would compete for few places in the caches, or null
  int64_t m, n, k, r, x_row, out_row;
  double scale;
  int dtype, out_dtype;  // kFloat32 or kBFloat16
  int threads;
};

// A weight (n, k) as panels of columns, in the order in which a product reads them. bf16 needs AVX512-BF16.
struct PackLinearArgs {
  const void* weight;  // `dtype`, strides n_stride and k_stride, one of which is 1
  float* packed;       // (n rounded up to kPackedColumns, k in units of 32 bits)
  int64_t n, k, n_stride, k_stride;
  int dtype;
  int threads;
};

constexpr int64_t kPackedColumns = 32;

constexpr int64_t kMatmulFloats = 1 << 19;  // of MatmulArgs::workspace

// C = A B + low low_b + bias, or C += A B + low low_b. Of the two strides of A, of B and of low_b one is 1.
struct MatmulArgs {
  const void* a;       // (m, k), a_dtype
  const void* b;       // (k, n), b_dtype
  const float* low;    // (m, rank), rows low_row apart, or null; not with narrow
  const float* low_b;  // (rank, n), or null
  const float* bias;   // (n,) or null; added with accumulate too
  void* c;             // (m, n) float, rows c_row apart
  void* workspace;     // (kMatmulFloats,) float
  int64_t m, n, k, rank;
  int64_t a_row, a_column, b_row, b_column, low_row, low_b_row, low_b_column, c_row;
  int a_dtype, b_dtype;  // Dtype, not kFloat64
  bool accumulate;
  bool narrow;  // fp32 operands may be rounded to bf16 on processors that multiply it
  int threads;
};

struct LoraLinearArgs {
  const void* x;    // (rows, in), rows x_row apart, dtype
  const float* a;   // (in, rank)
  const float* b;   // (rank, out)
  void* low;        // (rows, rank) float
  void* y;          // (rows, out), rows y_row apart, dtype; or null: low alone
  void* workspace;  // (kMatmulFloats,) float
  int64_t rows, in, out, rank;
  int64_t x_row, a_row, a_column, b_row, b_column, y_row;
  double scale;
  int dtype;  // Dtype, not kFloat64
  int threads;
};

// y = x rstd (weight + offset) of rows; everything of `dtype` but rstd.
struct RmsNormArgs {
  const void* x;       // (rows, width), rows x_row apart
  const void* weight;  // (width,)
  void* y;             // (rows, width)
  float* rstd;         // (rows,), or null
  int64_t rows, width, x_row;
  double eps, offset;
  int dtype;  // Dtype, not kFloat64
  int threads;
};

struct RmsNormBackwardArgs {
  const void* grad;    // (rows, width), rows grad_row apart
  const void* x;       // as in the forward
  const void* weight;  // as in the forward
  const float* rstd;   // as the forward left it
  void* grad_x;        // (rows, width)
  int64_t rows, width, grad_row, x_row;
  double offset;
  int dtype;
  int threads;
};

struct SiluMulArgs {
  const void* gate;  // (rows, width), rows gate_row apart, dtype
  const void* up;    // the same with up_row
  void* out;         // (rows, width), dtype
  int64_t rows, width, gate_row, up_row;
  int dtype;  // Dtype, not kFloat64
  int threads;
};

struct SiluMulBackwardArgs {
  const void* grad;  // (rows, width), rows grad_row apart, dtype
  const void* gate;  // as in the forward
  const void* up;    // as in the forward
  void* grad_gate;   // (rows, width), dtype
  void* grad_up;     // the same
  int64_t rows, width, grad_row, gate_row, up_row;
  int dtype;
  int threads;
};

// Queries (and likewise keys): element (row, head, position, d) at row * query_row + head * query_head + position *
// query_position + d. The results are (batch, length, heads, width) without gaps.
struct RotaryArgs {
  const void* query;   // `dtype`, heads of them
  const void* key;     // `dtype`, kv_heads of them; may be none
  const void* cosine;  // (row, position, width), `dtype`, strides cosine_row and cosine_position
  const void* sine;    // the same with its own strides
  void* query_out;
  void* key_out;
  int64_t batch, length, heads, kv_heads, width;  // width: even
  int64_t query_row, query_head, query_position, key_row, key_head, key_position;
  int64_t cosine_row, cosine_position, sine_row, sine_position;
  bool transposed;  // turn back: the backward
  int dtype;        // Dtype, not kFloat64
  int threads;
};

// Attention of single tokens over keys that lie where they were written: those of a prompt, which many rows may share,
// then those of a row's own slot. Token i sees positions [prefix_start, prefix_stop) of its prompt and [0, length) of
// its slot, of those the last `window`. Keys (and likewise values): element (row, head, position, d) of the prompts at
// row * prefix_row + head * prefix_head + position * prefix_position + d; of the slots alike.
struct CachedAttentionArgs {
  const void* query;        // (tokens, heads, width), `dtype`, strides query_token and query_head
  void* keys;               // (slots, kv_heads, room, width), or null: no slots
  void* values;             // (slots, kv_heads, room, value_width), or null
  const void* new_keys;     // (tokens, kv_heads, width), written to [length - 1] of the token's slot first; or null
  const void* new_values;   // (tokens, kv_heads, value_width), or null
  const void* prefix_keys;  // (prompts, kv_heads, length, width), or null: no prompts
  const void* prefix_values;
  const int64_t* rows;          // (tokens,) slot, or null
  const int64_t* lengths;       // (tokens,), or null
  const int64_t* prefix_rows;   // (tokens,) prompt, or null
  const int64_t* prefix_start;  // (tokens,), or null
  const int64_t* prefix_stop;   // (tokens,), or null
  void* out;                    // (tokens, heads, value_width), `dtype`
  int64_t tokens, heads, kv_heads, width, value_width, query_token, query_head;
  int64_t key_row, key_head, key_position, value_row, value_head, value_position;
  int64_t new_key_token, new_key_head, new_value_token, new_value_head;
  int64_t prefix_key_row, prefix_key_head, prefix_key_position;
  int64_t prefix_value_row, prefix_value_head, prefix_value_position;
  int64_t window;         // 0: all
  double scale, softcap;  // softcap 0: none
  int dtype;              // not kFloat64
  int threads;
};

// Sequences end to end: token (t, head, d) of queries, and likewise of keys, values and upstream gradients, at t *
// query_token + head * query_head + d. Results have no gaps.
struct VarlenAttentionArgs {
  const void* query;          // (tokens, heads, width), `dtype`
  const void* key;            // (tokens, kv_heads, width)
  const void* value;          // (tokens, kv_heads, value_width)
  const void* grad;           // (tokens, heads, value_width) of the results: the backward; or null
  const int64_t* cu_seqlens;  // (sequences + 1,); clamped to the tokens
  float* state;  // (tokens, heads, 2) largest scaled score and 1 / sum e: written by the forward, read by the backward
  void* out;     // (tokens, heads, value_width), or null in the backward
  void* grad_query;  // (tokens, heads, width), or null in the forward, as the next two
  void* grad_key;    // (tokens, kv_heads, width)
  void* grad_value;  // (tokens, kv_heads, value_width)
  float* workspace;  // `threads` times the floats that a call without one returns
  int64_t tokens, sequences, longest, heads, kv_heads, width, value_width;
  int64_t query_token, query_head, key_token, key_head, value_token, value_head, grad_token, grad_head;
  int64_t window;  // 0: all keys up to the query's own
  double scale;
  int dtype;  // not kFloat64
  int threads;
};

constexpr int64_t kAttentionBlock = 32;   // queries whose scores exist at a time
constexpr int64_t kAttentionChunk = 512;  // queries of a task of the forward

constexpr int64_t kAttentionWidth = 1024;  // largest width and value_width

}  // namespace rlhf_fast
