// Chooses the variant and the grid of token_logprobs.cuh.
#include "cuda/token_logprobs.h"

#include <stdio.h>

#include "cuda/launch.h"

namespace rlhf_fast::cuda {
namespace {

constexpr int64_t kBlocks = 4;        // that a multiprocessor runs side by side
constexpr int64_t kMinChunk = 8192;   // of a gradient: below it setting out costs more than it writes
constexpr int64_t kMaxChunk = 65536;  // a row's end leaves few threads idle

constexpr const char* kDtypes[] = {"f32", "bf16", "f16"};  // order of Dtype

// narrow: ends the name where the gradient has a format of its own, else empty.
template <class Args>
const char* name_of(const char* kernel, const Args& a, const char* narrow, char (&to)[64]) {
  snprintf(to, sizeof(to), "%s_%s%s%s%s", kernel, kDtypes[a.dtype], narrow, a.softcap > 0 ? "_cap" : "",
           a.ref_logits ? "_ref" : "");
  return to;
}

int64_t rounded_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace

int64_t token_logprobs(const TokenLogprobsArgs& a) {
  char name[64];
  TokenLogprobsTask task{a, (a.vocab + kSlice - 1) / kSlice, 0, kWhole};
  task.slice_length = rounded_up((a.vocab + task.slices - 1) / task.slices, 16);
  name_of("token_logprobs", a, "", name);
  const bool split = a.scratch && task.slices > 1 && a.rows < multiprocessors() * kBlocks / 2;
  if (!split) return launch_blocks(name, a.rows, task, a.stream);
  task.stage = kPart;
  if (const int64_t error = launch_blocks(name, a.rows * task.slices, task, a.stream)) return error;
  task.stage = kJoin;
  return launch_blocks(name, a.rows, task, a.stream);
}

int64_t token_logprobs_backward(const TokenLogprobsBackwardArgs& a) {
  if (a.rows == 0) return 0;
  char name[64], narrow[16] = "";
  if (a.grad_dtype != a.dtype) snprintf(narrow, sizeof(narrow), "_to_%s", kDtypes[a.grad_dtype]);
  // The gradient of a logit does not depend on its chunk: as many as keep the device busy.
  const int64_t wanted = (multiprocessors() * kBlocks * 2 + a.rows - 1) / a.rows;
  int64_t length = rounded_up((a.vocab + wanted - 1) / wanted, kMinChunk);
  if (length > kMaxChunk) length = kMaxChunk;
  const TokenLogprobsBackwardTask task{a, (a.vocab + length - 1) / length, length};
  return launch_blocks(name_of("token_logprobs_backward", a, narrow, name), a.rows * task.chunks, task, a.stream);
}

}  // namespace rlhf_fast::cuda
