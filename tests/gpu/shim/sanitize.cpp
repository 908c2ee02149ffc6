// Every launcher on small seeded inputs, to be built with a sanitizer. Arrays are blocks of the heap of their own, rows
// of logits have poisoned gaps between them, and lie at all distances from 16 bytes. What the mask hides is poisoned.
// -DCASE_<op> compiles the cases of an op in.
#include "cuda/driver.h"
#include "cuda/ops.h"
#include "simt.hpp"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes) static_cast<void>(from)
#define ASAN_UNPOISON_MEMORY_REGION(from, bytes) static_cast<void>(from)
#endif

namespace rlhf_fast::cuda {

int launch(const char* name, Dim grid, unsigned threads, unsigned, void*, void** arguments) {
  const auto found = simt::kernels().find(name);
  if (found == simt::kernels().end()) return 500;
  simt::launch({grid.x, grid.y, grid.z}, {threads, 1, 1}, [run = found->second.run, arguments] { run(arguments); });
  return 0;
}

int multiprocessors() { return 2; }

}  // namespace rlhf_fast::cuda

namespace {

using namespace rlhf_fast;
using namespace rlhf_fast::cuda;

std::mt19937 random_bits(1);

double normal() { return std::normal_distribution<double>()(random_bits); }

std::vector<float> floats(int64_t n) {
  std::vector<float> x(n);
  for (float& v : x) v = static_cast<float>(normal());
  return x;
}

// Two neighbours are real or not together, as AddressSanitizer marks 8 bytes together.
std::vector<uint8_t> mask_of(int64_t n) {
  std::vector<uint8_t> x(n);
  for (int64_t i = 0; i < n; ++i) x[i] = i % 2 ? x[i - 1] : random_bits() % 5 != 0;
  return x;
}

// From here on it is an error to read what the mask hides of the arrays.
template <class... T>
void hide(const std::vector<uint8_t>& mask, const std::vector<T>&... arrays) {
  const int64_t n = mask.size();
  for (int64_t i = 0; i < n; i += 2)
    if (!mask[i]) (ASAN_POISON_MEMORY_REGION(&arrays[i], sizeof(T) * (i + 1 < n ? 2 : 1)), ...);
}

void expect(int64_t error, const char* what) {
  if (error == 0) return;
  fprintf(stderr, "%s: error %ld\n", what, static_cast<long>(error));
  exit(1);
}

// Rows with a gap after each, at `offset` elements past a multiple of 16 bytes.
template <class T>
struct Rows {
  int64_t stride;
  char* memory;
  T* first;

  Rows(int64_t rows, int64_t n, int offset) : stride(n + 9) {
    const size_t bytes = sizeof(T) * (rows * stride + offset) + 16;
    memory = static_cast<char*>(aligned_alloc(16, (bytes + 15) / 16 * 16));
    first = reinterpret_cast<T*>(memory) + offset;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < n; ++j) first[i * stride + j] = narrow<T>(3 * normal());
    ASAN_POISON_MEMORY_REGION(memory, sizeof(T) * offset);
    for (int64_t i = 0; i < rows; ++i) ASAN_POISON_MEMORY_REGION(first + i * stride + n, sizeof(T) * (stride - n));
    ASAN_POISON_MEMORY_REGION(first + rows * stride, memory + bytes - reinterpret_cast<char*>(first + rows * stride));
  }
  ~Rows() { free(memory); }
};

#if defined(CASE_token_logprobs)
template <class T>
void token_logprobs_case(int dtype, int64_t vocab, bool ref, double softcap, bool split, int offset) {
  const int64_t rows = 3, width = ref ? 6 : 3, slices = (vocab + kSlice - 1) / kSlice;
  Rows<T> logits(rows, vocab, offset), ref_logits(rows, vocab, ref ? offset + 1 : 0), grad(rows, vocab, offset % 3);
  std::vector<int64_t> ids = {0, vocab - 1, vocab / 2};
  std::vector<uint8_t> mask = {1, 1, static_cast<uint8_t>(offset % 2)};
  std::vector<float> out[4], state(rows * width), upstream[4];
  for (auto& x : out) x.resize(rows);
  for (auto& x : upstream) x = floats(rows);
  std::vector<float> scratch(split ? rows * slices * kRefSliceFloats * kThreads : 0);
  const void* second = ref ? ref_logits.first : nullptr;
  if (!mask[2]) {
    for (const auto* x : {&logits, &ref_logits}) ASAN_POISON_MEMORY_REGION(x->first + 2 * x->stride, sizeof(T) * vocab);
    for (auto& x : upstream) ASAN_POISON_MEMORY_REGION(&x[2], sizeof(float));
    ASAN_POISON_MEMORY_REGION(&ids[2], sizeof(int64_t));
  }
  expect(token_logprobs({logits.first,
                         second,
                         ids.data(),
                         mask.data(),
                         nullptr,
                         out[0].data(),
                         out[1].data(),
                         out[2].data(),
                         ref ? out[3].data() : nullptr,
                         state.data(),
                         split ? scratch.data() : nullptr,
                         rows,
                         vocab,
                         rows,
                         0,
                         logits.stride,
                         0,
                         ref_logits.stride,
                         0.8,
                         softcap,
                         dtype,
                         false,
                         nullptr}),
         "token_logprobs");
  const auto backward = [&](void* to, int64_t stride, int grad_dtype) {
    expect(token_logprobs_backward({logits.first,
                                    second,
                                    ids.data(),
                                    mask.data(),
                                    nullptr,
                                    state.data(),
                                    upstream[0].data(),
                                    upstream[1].data(),
                                    nullptr,
                                    ref ? upstream[3].data() : nullptr,
                                    to,
                                    rows,
                                    vocab,
                                    rows,
                                    0,
                                    logits.stride,
                                    0,
                                    ref_logits.stride,
                                    width,
                                    stride,
                                    0.8,
                                    softcap,
                                    dtype,
                                    grad_dtype,
                                    false,
                                    nullptr}),
           "token_logprobs_backward");
  };
  backward(grad.first, grad.stride, dtype);
  if (dtype == kFloat32) {
    Rows<BFloat16> narrow(rows, vocab, offset);
    backward(narrow.first, narrow.stride, kBFloat16);
  }
  ASAN_UNPOISON_MEMORY_REGION(logits.first + 2 * logits.stride, sizeof(T) * vocab);  // zeros are written there
  backward(logits.first, logits.stride, dtype);
}

// The variants of some_variants.cu.
void token_logprobs_cases() {
  for (const int64_t vocab : {1, 7, 1000, 4096, 9001})
    for (int offset = 0; offset < 8; offset += vocab == 1000 || vocab == 4096 ? 1 : 3) {
      token_logprobs_case<BFloat16>(kBFloat16, vocab, false, 0, false, offset);
#if !defined(ONE_VARIANT)
      token_logprobs_case<Float16>(kFloat16, vocab, true, 0, false, offset);
      if (offset < 4) token_logprobs_case<float>(kFloat32, vocab, false, 5, false, offset);
#endif
    }
  token_logprobs_case<BFloat16>(kBFloat16, 33001, false, 0, true, 5);
#if !defined(ONE_VARIANT)
  token_logprobs_case<Float16>(kFloat16, 33001, true, 0, true, 2);
#endif
}
#endif

#if defined(CASE_kl_estimate)
void kl_estimate_cases() {
  for (const int64_t n : {1, 5, 2049}) {
    const auto a = floats(n), b = floats(n), grad = floats(n);
    const auto mask = mask_of(n);
    hide(mask, a, b, grad);
    std::vector<float> out(n);
    for (int kind = 0; kind < 4; ++kind) {
      expect(kl_estimate({a.data(), b.data(), mask.data(), out.data(), n, kind, 9, 9, nullptr}), "kl_estimate");
      expect(kl_estimate_backward(
                 {grad.data(), a.data(), b.data(), mask.data(), out.data(), n, kind, kind == 2, 9, 9, nullptr}),
             "kl_estimate_backward");
    }
  }
}
#endif

#if defined(CASE_gae)
void gae_cases() {
  for (const int64_t length : {1, 6, 1025, 2500})
    for (const bool decay : {false, true}) {
      const int64_t rows = 3, n = rows * length;
      const auto a = floats(n), b = floats(n), bootstrap = floats(rows);
      const auto mask = mask_of(n);
      hide(mask, a, b);
      const std::vector<int64_t> cu_seqlens = {0, length / 2, length / 2, n}, outside = {n + 9, -9, n + 9, 5};
      std::vector<float> x(n), y(n), z(rows);
      for (const int64_t* packed : {static_cast<const int64_t*>(nullptr), cu_seqlens.data(), outside.data()}) {
        expect(gae({a.data(), b.data(), mask.data(), bootstrap.data(), packed, x.data(), y.data(), rows, length, n, 0.9,
                    0.95, decay, nullptr}),
               "gae");
        expect(gae_backward({a.data(), b.data(), mask.data(), packed, x.data(), y.data(), z.data(), rows, length, n,
                             0.9, 0.95, decay, nullptr}),
               "gae_backward");
      }
    }
}
#endif

#if defined(CASE_whiten)
void whiten_cases() {
  for (const int64_t n : {1, 6, 3001}) {
    const auto x = floats(n), grad = floats(n);
    const auto mask = mask_of(n);
    hide(mask, x, grad);
    std::vector<float> out(n);
    std::vector<double> scratch(kMaxParts * (kMomentDoubles + kSumDoubles));
    expect(whiten({x.data(), mask.data(), out.data(), scratch.data(), n, true, true, 1e-8, nullptr}), "whiten");
    expect(whiten_backward(
               {grad.data(), x.data(), mask.data(), out.data(), scratch.data(), n, true, true, false, 1e-8, nullptr}),
           "whiten_backward");
  }
}
#endif

#if defined(CASE_advantages)
void advantages_cases() {
  for (const int64_t length : {1, 6, 1500})
    for (const bool after_last : {false, true}) {
      const int64_t rows = 3, n = rows * length;
      const auto scores = floats(after_last ? n : rows), values = floats(n), a = floats(n), b = floats(n);
      const auto mask = mask_of(n);
      hide(mask, a, b);
      if (!after_last) hide(mask, values);  // else some slots after the last one count
      std::vector<float> out[4];
      for (auto& x : out) x.resize(n);
      std::vector<double> scratch(kMaxParts * kMomentDoubles);
      const std::vector<int64_t> outside = {-9, length, length, n + 9};
      for (const int64_t* packed : {static_cast<const int64_t*>(nullptr), outside.data()})
        expect(advantages({scores.data(),
                           values.data(),
                           mask.data(),
                           a.data(),
                           b.data(),
                           nullptr,
                           packed,
                           out[0].data(),
                           out[1].data(),
                           out[2].data(),
                           out[3].data(),
                           scratch.data(),
                           rows,
                           length,
                           n,
                           after_last,
                           0.1,
                           2,
                           10,
                           10,
                           5,
                           after_last,
                           1,
                           0.95,
                           after_last,
                           true,
                           true,
                           false,
                           1e-8,
                           nullptr}),
               "advantages");
    }
}
#endif

#if defined(CASE_ppo_loss)
void ppo_loss_cases() {
  for (const int64_t length : {1, 6, 700})
    for (int reduction = 0; reduction < 4; ++reduction) {
      const int64_t rows = 5, n = rows * length;
      std::vector<float> in[9], out[3], loss(1), stats(16);
      for (auto& x : in) x = floats(n);
      for (auto& x : out) x.resize(n);
      const auto mask = mask_of(n);
      for (const auto& x : in) hide(mask, x);
      std::vector<int64_t> lengths(rows);
      std::vector<Counter> counters(4);
      std::vector<double> scratch(kMaxParts * kPpoNumbers);
      const std::vector<int64_t> cu_seqlens = {0, length / 2, length / 2, length, 2 * length, n};
      const std::vector<int64_t> outside = {-9, length, length, 2 * length, 3 * length, n - 1}, beyond(6, n + 9);
      for (const int64_t* packed :
           {static_cast<const int64_t*>(nullptr), cu_seqlens.data(), outside.data(), beyond.data()})
        expect(ppo_loss({in[0].data(),
                         in[1].data(),
                         in[2].data(),
                         mask.data(),
                         in[3].data(),
                         in[4].data(),
                         in[5].data(),
                         in[6].data(),
                         in[7].data(),
                         in[8].data(),
                         nullptr,
                         packed,
                         loss.data(),
                         stats.data(),
                         out[0].data(),
                         out[1].data(),
                         out[2].data(),
                         lengths.data(),
                         counters.data(),
                         scratch.data(),
                         rows,
                         length,
                         n,
                         reduction == 1,
                         0.2,
                         0.2,
                         3,
                         20,
                         0.01,
                         0.1,
                         2,
                         false,
                         20,
                         10,
                         0.2,
                         0.1,
                         reduction,
                         0,
                         nullptr}),
               "ppo_loss");
    }
}
#endif

#if defined(CASE_reward_loss)
void reward_loss_cases() {
  for (const int64_t n : {1, 6, 3001}) {
    const auto a = floats(n), b = floats(n), margin = floats(n);
    const auto mask = mask_of(n);
    hide(mask, a, b, margin);
    std::vector<float> loss(1), stats(6), grads(2 * n);
    std::vector<Counter> counters(4);
    std::vector<double> scratch(kMaxParts * kRewardNumbers);
    expect(reward_loss({a.data(), b.data(), margin.data(), mask.data(), loss.data(), stats.data(), grads.data(),
                        counters.data(), scratch.data(), n, 0.01, 0.1, nullptr}),
           "reward_loss");
  }
}
#endif

#if defined(CASE_group_advantages)
void group_advantages_cases() {
  for (const int64_t n : {1, 6, 300})
    for (int kind = 0; kind < 7; ++kind) {
      const auto scores = floats(n), greedy = floats(n), grad = floats(n);
      const auto mask = mask_of(n);
      std::vector<int64_t> ids(n), lengths(n, 7);
      for (int64_t& id : ids) id = random_bits() % 5;
      hide(mask, scores, greedy, grad, ids, lengths);
      std::vector<float> out(n);
      std::vector<double> scratch(n * 4 + 4);
      for (const float* upstream : {static_cast<const float*>(nullptr), grad.data()})
        expect(group_advantages({upstream, scores.data(), ids.data(), mask.data(), lengths.data(), greedy.data(),
                                 out.data(), scratch.data(), n, kind, true, 1e-6, nullptr}),
               "group_advantages");
    }
}
#endif

}  // namespace

int main() {
#if defined(CASE_token_logprobs)
  token_logprobs_cases();
#endif
#if defined(CASE_kl_estimate)
  kl_estimate_cases();
#endif
#if defined(CASE_gae)
  gae_cases();
#endif
#if defined(CASE_whiten)
  whiten_cases();
#endif
#if defined(CASE_advantages)
  advantages_cases();
#endif
#if defined(CASE_ppo_loss)
  ppo_loss_cases();
#endif
#if defined(CASE_reward_loss)
  reward_loss_cases();
#endif
#if defined(CASE_group_advantages)
  group_advantages_cases();
#endif
  puts("done");
}
