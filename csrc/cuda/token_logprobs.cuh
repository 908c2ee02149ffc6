// Log-probability of a token, entropy, log-sum-exp and exact KL of its distribution, in one read of the logits.
//
// A block sums a row, or a slice of one. Each thread takes 16 logits at a time relative to a point of reference of its
// own, the largest of its first 16, which moves only when a sum says that it is far too low: one exp2 and four other
// instructions a logit. Warps are joined in double. Which logits a thread takes depends on V alone, not on the
// address of the row nor on the number of blocks, so a row has the same bits in any batch.
#pragma once

#include "cuda/block.cuh"
#include "cuda/logits.cuh"

namespace rlhf_fast::cuda {

namespace {

constexpr int kBatch = 16, kRefBatch = 8;             // logits of a thread at a time
constexpr float kLargestSum = 8192;                   // of a batch: 2^13
constexpr float kLargestWeighted = 13 * kLargestSum;  // the same of sum e d, which is NaN where a logit is -inf

// What a row by itself is summed to, relative to `base`, one of its logits: sum e and sum e d with e = 2^d, d as
// Exponent says.
template <bool kRef>
struct RowSums {
  float base = -INFINITY, sum = 0, weighted = 0;

  // Moves the point of reference up to `to`. Before the first logit every term is 0 (or NaN).
  __device__ __forceinline__ void raise(float to, const Exponent& exp) {
    if (!(to > base)) return;
    if (base != -INFINITY) {
      // 2^-256 is 0, and times a sum no NaN.
      const float shift = fmaxf(fmaf(base - to, exp.high, exp.rest(to) - exp.rest(base)), -256.0f);
      const float factor = exp2_of(shift);
      weighted = factor * fmaf(shift, sum, weighted);
      sum *= factor;
    }
    base = to;
  }
  __device__ __forceinline__ void join(RowSums other, const Exponent& exp) {
    const float to = fmaxf(base, other.base);
    raise(to, exp);
    other.raise(to, exp);
    sum += other.sum;
    weighted += other.weighted;
  }
  // Fields in the scratch memory lie a block's threads apart.
  __device__ __forceinline__ void save(float* to) const {
    to[0] = base, to[kThreads] = sum, to[2 * kThreads] = weighted;
  }
  __device__ __forceinline__ void load(const float* from) {
    base = from[0], sum = from[kThreads], weighted = from[2 * kThreads];
  }
};

// Of two rows that are compared: sum e and sum e u with u = y - base and e = 2^(scale u).
struct Sums {
  float base = -INFINITY, sum = 0, weighted = 0;
  float lost = 0;  // what roundings took off the sum

  // What to subtract from a logit: 0 while only -inf was seen (-inf - -inf would be NaN).
  __device__ __forceinline__ float origin() const { return base == -INFINITY ? 0 : base; }
  // Moves the point of reference up to `to`; returns by how much (<= 0) every u has changed.
  __device__ __forceinline__ float raise(float to, const Exponent& exp) {
    if (!(to > base)) return 0;
    const float shift = base == -INFINITY ? 0 : base - to;
    base = to;
    if (shift == 0) return 0;
    const float factor = exp.exactly_or_0(shift);
    weighted = factor * fmaf(shift, sum, weighted);
    sum *= factor;
    lost *= factor;
    return shift;
  }
  // With the rounding kept (Knuth's two-sum): KL is a small difference of the logarithms of two sums.
  __device__ __forceinline__ void add_exactly(float x) {
    const float s = sum + x, part = s - sum;
    lost += (sum - (s - part)) + (x - part);
    sum = s;
  }
  __device__ __forceinline__ void add_exactly(const Sums& batch) {
    add_exactly(batch.sum);
    lost += batch.lost;
  }
  // For terms that are rarely the larger ones (Dekker's fast two-sum).
  __device__ __forceinline__ void add_term(float x) {
    const float s = sum + x;
    lost += x - (s - sum);
    sum = s;
  }
};

template <>
struct RowSums<true> {
  Sums policy, reference;
  float gap = 0;  // sum e (u - v) with v the reference's u

  __device__ __forceinline__ void raise(float to, float ref_to, const Exponent& exp) {
    const float shift = policy.raise(to, exp);
    const float gap_shift = shift - reference.raise(ref_to, exp);  // 0 when the two are equal
    if (shift != 0) {
      const float factor = exp.exactly_or_0(shift);
      gap = factor == 0 ? 0 : factor * gap;  // an infinite gap of weight 0 is gone
    }
    if (gap_shift != 0) gap = fmaf(gap_shift, policy.sum, gap);
  }
  __device__ __forceinline__ void join(RowSums other, const Exponent& exp) {
    const float to = fmaxf(policy.base, other.policy.base), ref_to = fmaxf(reference.base, other.reference.base);
    raise(to, ref_to, exp);
    other.raise(to, ref_to, exp);
    policy.weighted += other.policy.weighted;
    policy.add_exactly(other.policy);
    reference.add_exactly(other.reference);
    gap += other.gap;
  }
  __device__ __forceinline__ void save(float* to) const {
    const float values[] = {policy.base, policy.sum,     policy.weighted, policy.lost,
                            gap,         reference.base, reference.sum,   reference.lost};
#pragma unroll
    for (int k = 0; k < kRefSliceFloats; ++k) to[k * kThreads] = values[k];
  }
  __device__ __forceinline__ void load(const float* from) {
    policy.base = from[0];
    policy.sum = from[kThreads];
    policy.weighted = from[2 * kThreads];
    policy.lost = from[3 * kThreads];
    gap = from[4 * kThreads];
    reference.base = from[5 * kThreads];
    reference.sum = from[6 * kThreads];
    reference.lost = from[7 * kThreads];
  }
};

// Adds a batch: one exp2 a logit, nothing else to look at. False, having added nothing, where the terms are too large
// or not numbers (-inf - -inf, 0 * -inf, no offset): add_carefully takes those.
__device__ __forceinline__ bool add_batch(const float (&y)[kBatch], float high, float offset, RowSums<false>* row) {
  const float first = fmaf(y[0], high, -offset);
  float sum = exp2_of(first), weighted = sum * first;
#pragma unroll
  for (int k = 1; k < kBatch; ++k) {
    const float d = fmaf(y[k], high, -offset), e = exp2_of(d);
    sum += e;
    weighted = fmaf(e, d, weighted);
  }
  if (!(fabsf(weighted) < kLargestWeighted)) return false;
  row->sum += sum;
  row->weighted += weighted;
  return true;
}

__device__ __forceinline__ bool add_batch(const float (&y)[kRefBatch], const float (&yr)[kRefBatch],
                                          const Exponent& exp, RowSums<true>* row) {
  Sums sums, ref_sums;
  float weighted = 0, gap = 0;
#pragma unroll
  for (int k = 0; k < kRefBatch; ++k) {
    const float u = y[k] - row->policy.base, v = yr[k] - row->reference.base, e = exp.exactly(u);
    sums.add_term(e);
    ref_sums.add_term(exp.exactly(v));
    weighted = fmaf(e, u, weighted);
    gap = fmaf(e, u - v, gap);
  }
  if (!(fmaf(weighted + gap, 0.0f, sums.sum + ref_sums.sum) < kLargestSum)) return false;
  row->policy.add_exactly(sums);
  row->reference.add_exactly(ref_sums);
  row->policy.weighted += weighted;
  row->gap += gap;
  return true;
}

template <int kCount>
__device__ __forceinline__ float largest_of(const float (&y)[kCount]) {
  float m = y[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) m = fmaxf(m, y[k]);
  return m;
}

__device__ __forceinline__ void add_carefully(const float (&y)[kBatch], const Exponent& exp, RowSums<false>* row) {
  row->raise(largest_of(y), exp);
  const float origin = row->base == -INFINITY ? 0 : row->base, rest = exp.rest(row->base);
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kBatch; ++k) {
    const float d = fmaf(y[k] - origin, exp.high, rest), e = exp2_of(d);
    sum += e;
    row->weighted = e == 0 ? row->weighted : fmaf(e, d, row->weighted);
  }
  row->sum += sum;
}

__device__ __forceinline__ void add_carefully(const float (&y)[kRefBatch], const float (&yr)[kRefBatch],
                                              const Exponent& exp, RowSums<true>* row) {
  row->raise(largest_of(y), largest_of(yr), exp);
  const float origin = row->policy.origin(), ref_origin = row->reference.origin();
  Sums sums, ref_sums;
#pragma unroll
  for (int k = 0; k < kRefBatch; ++k) {
    const float u = y[k] - origin, v = yr[k] - ref_origin, e = exp.exactly_or_0(u);
    sums.add_term(e);
    ref_sums.add_term(exp.exactly_or_0(v));
    if (e == 0) continue;
    row->policy.weighted = fmaf(e, u, row->policy.weighted);
    row->gap = fmaf(e, u - v, row->gap);
  }
  row->policy.add_exactly(sums);
  row->reference.add_exactly(ref_sums);
}

// A slice [begin, begin + n) of a row, and the batches of it that vectors may read: those whose first logit is
// j in [first, first + count).
template <class T, int kShift, int kSize>
struct Slice {
  static constexpr int kRun = kSize < 2 * kLanes<T> ? kSize : 2 * kLanes<T>;  // adjacent logits of a thread
  static constexpr int kStride = kThreads * kRun;
  const T* row;  // from `begin` on
  Runs<T, kShift, kRun> runs;
  int n, first;
  unsigned count;

  __device__ __forceinline__ Slice(const T* whole_row, int64_t begin, int n, int64_t vocab)
      : row(whole_row + begin), runs(row), n(n) {
    const int before = kShift == kAligned ? 0 : phase_of(row);  // read before the logits at hand
    const int after = kShift == kAligned ? 0 : kLanes<T> - before;
    first = begin < before ? before - static_cast<int>(begin) : 0;
    const int64_t left = vocab - begin - n;  // of the row, past the slice
    const int short_of = left < after ? after - static_cast<int>(left) : 0;
    const int last = n - short_of - kRun - (kSize / kRun - 1) * kStride;
    count = last < first ? 0 : static_cast<unsigned>(last - first) + 1;
  }
  __device__ __forceinline__ bool inside(int j) const { return static_cast<unsigned>(j - first) < count; }
  // Those outside of the slice count as -inf.
  template <bool kCap>
  __device__ __forceinline__ void load(const Logits<T, kCap>& z, int j, bool inside, float (&y)[kSize]) const {
#pragma unroll
    for (int r = 0; r < kSize / kRun; ++r) {
      const int at = j + r * kStride;
      float* to = y + r * kRun;
      if (inside) {
        runs.load(at, to);
#pragma unroll
        for (int k = 0; k < kRun; ++k) to[k] = z.capped(to[k]);
      } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k) to[k] = at + k < n ? z.capped(widen(row[at + k])) : -INFINITY;
      }
    }
  }
};

template <int kShift, class T, bool kCap>
__device__ __forceinline__ void add_slice(const Logits<T, kCap>& z, int64_t begin, int n, int64_t vocab,
                                          const Exponent& exp, RowSums<false>* row) {
  const Slice<T, kShift, kBatch> slice(z.row, begin, n, vocab);
  RowSums<false> sums;
  float offset = 0;
  for (int j = static_cast<int>(threadIdx.x) * slice.kRun; j < n; j += kThreads * kBatch) {
    float y[kBatch];
    slice.load(z, j, slice.inside(j), y);
    if (sums.base == -INFINITY) {
      sums.base = largest_of(y);
      offset = exp.offset(sums.base);
    }
    if (add_batch(y, exp.high, offset, &sums)) continue;
    add_carefully(y, exp, &sums);
    offset = exp.offset(sums.base);
  }
  *row = sums;
}

template <int kShift, class T, bool kCap>
__device__ __forceinline__ void add_slice(const Logits<T, kCap>& z, const Logits<T, kCap>& zr, int64_t begin, int n,
                                          int64_t vocab, const Exponent& exp, RowSums<true>* row) {
  const Slice<T, kShift, kRefBatch> slice(z.row, begin, n, vocab), ref(zr.row, begin, n, vocab);
  for (int j = static_cast<int>(threadIdx.x) * slice.kRun; j < n; j += kThreads * kRefBatch) {
    float y[kRefBatch], yr[kRefBatch];
    const bool inside = slice.inside(j) && ref.inside(j);
    slice.load(z, j, inside, y);
    ref.load(zr, j, inside, yr);
    if (row->policy.base == -INFINITY || !add_batch(y, yr, exp, row)) add_carefully(y, yr, exp, row);
  }
}

// The sums of one thread over a slice.
template <class T, bool kCap, bool kRef>
__device__ __forceinline__ RowSums<kRef> sum_slice(const Logits<T, kCap>& z, const Logits<T, kCap>& zr, int64_t begin,
                                                   int n, int64_t vocab, const Exponent& exp) {
  RowSums<kRef> row;
  const unsigned offset = reinterpret_cast<uintptr_t>(z.row + begin) & 15;
  if constexpr (kRef) {
    if (offset == 0 && (reinterpret_cast<uintptr_t>(zr.row + begin) & 15) == 0)
      add_slice<kAligned>(z, zr, begin, n, vocab, exp, &row);
    else
      add_slice<kAnyShift>(z, zr, begin, n, vocab, exp, &row);
  } else if (offset == 0) {
    add_slice<kAligned>(z, begin, n, vocab, exp, &row);
  } else if (kCap) {  // tanh costs more than shifting, and five copies of its loop long to compile
    add_slice<kAnyShift>(z, begin, n, vocab, exp, &row);
  } else if (offset < 4) {
    add_slice<0>(z, begin, n, vocab, exp, &row);
  } else if (offset < 8) {
    add_slice<1>(z, begin, n, vocab, exp, &row);
  } else if (offset < 12) {
    add_slice<2>(z, begin, n, vocab, exp, &row);
  } else {
    add_slice<3>(z, begin, n, vocab, exp, &row);
  }
  return row;
}

__device__ __forceinline__ void write_row(const TokenLogprobsArgs& a, int64_t i, const float (&x)[4],
                                          const float (&state)[6]) {
  const bool ref = a.ref_logits != nullptr;
  a.logprobs[i] = x[0];
  a.entropy[i] = x[1];
  a.logsumexp[i] = x[2];
  if (ref) a.kl[i] = x[3];
  if (!a.state) return;
  float* to = a.state + i * (ref ? 6 : 3);
#pragma unroll
  for (int k = 0; k < 6; ++k)
    if (k < 3 || ref) to[k] = state[k];
}

// Joins the threads of the block; the first one writes the results.
template <class T, bool kCap, bool kRef>
__device__ __forceinline__ void finish_row(const TokenLogprobsArgs& a, int64_t i, const Logits<T, kCap>& z,
                                           RowSums<kRef> row, double scale, const Exponent& exp) {
  float max, ref_max = 0, kl = 0;
  SoftmaxSums<double> p, q;
  if constexpr (kRef) {
    max = block_max(row.policy.base), ref_max = block_max(row.reference.base);
    row.raise(max, ref_max, exp);
    double x[4], mine[] = {static_cast<double>(row.policy.sum) + static_cast<double>(row.policy.lost),
                           static_cast<double>(row.policy.weighted),
                           static_cast<double>(row.reference.sum) + static_cast<double>(row.reference.lost),
                           static_cast<double>(row.gap)};
    block_sum_of_first(mine, x);
    if (threadIdx.x != 0) return;
    p.sum = x[0], p.weighted = scale * x[1];
    q.sum = x[2];
    p.max = static_cast<double>(max), q.max = static_cast<double>(ref_max);
    const GapSum<double> gap = {scale * x[3]};
    kl = static_cast<float>(gap.kl(p, q));
  } else {
    max = block_max(row.base);
    row.raise(max, exp);
    double x[2];
    float mine[] = {row.sum, row.weighted};
    block_sum_of_first(mine, x);
    if (threadIdx.x != 0) return;
    // The largest term is taken out as it came in: a certain row has a log-probability and an entropy of 0.
    const float rest = exp.rest(max), of_max = exp2_of(rest);
    const double norm = 1 / static_cast<double>(of_max);
    const double others = x[0] - static_cast<double>(of_max), moved = x[1] - static_cast<double>(of_max * rest);
    p.max = static_cast<double>(max);
    p.sum = 1 + others * norm;
    p.weighted = 0.6931471805599453 * norm * (moved - static_cast<double>(rest) * others);
  }
  const float nan = static_cast<float>(NAN);
  const double y = static_cast<double>(z.one(id_of(a, i)));
  const float entropy = static_cast<float>(p.entropy());
  write_row(a, i, {static_cast<float>(p.log_p(y, scale)), entropy, static_cast<float>(p.logsumexp(scale)), kl},
            {max, isfinite(max) ? static_cast<float>(p.sum) : nan, entropy, ref_max,
             isfinite(ref_max) ? static_cast<float>(q.sum) : nan, kl});
}

template <class T, bool kCap, bool kRef>
__device__ __forceinline__ void token_logprobs_row(const TokenLogprobsTask& a) {
  int64_t i = blockIdx.x, from = 0, to = a.slices;
  if (a.stage == kPart) {
    from = i % a.slices;
    to = from + 1;
    i /= a.slices;
  }
  const bool real = !a.mask || a.mask[i];
  const double scale = real ? scale_of(a, i) : 0;
  if (!real || isnan(scale)) {
    const float x = real ? static_cast<float>(NAN) : 0;
    if (threadIdx.x == 0 && a.stage != kPart) write_row(a, i, {x, x, x, x}, {x, x, x, x, x, x});
    return;
  }
  const Exponent exp(scale);
  const auto z = logits_of<kCap, T>(a, a.logits, a.outer_stride, a.inner_stride, i);
  const auto zr = kRef ? logits_of<kCap, T>(a, a.ref_logits, a.ref_outer_stride, a.ref_inner_stride, i) : z;
  RowSums<kRef> row;
  for (int64_t s = from; s < to; ++s) {
    float* kept = a.scratch + (i * a.slices + s) * (kRef ? kRefSliceFloats : kSliceFloats) * kThreads + threadIdx.x;
    const int64_t begin = s * a.slice_length, left = a.vocab - begin;
    const int n = static_cast<int>(left < a.slice_length ? left : a.slice_length);
    RowSums<kRef> part;
    if (a.stage == kJoin)
      part.load(kept);
    else
      part = sum_slice<T, kCap, kRef>(z, zr, begin, n, a.vocab, exp);
    if (a.stage == kPart) return part.save(kept);
    s == from ? static_cast<void>(row = part) : row.join(part, exp);
  }
  finish_row<T, kCap, kRef>(a, i, z, row, scale, exp);
}

}  // namespace
}  // namespace rlhf_fast::cuda
