// What the launchers of token_logprobs tell their kernels.
#pragma once

#include "cuda/ops.h"

namespace rlhf_fast::cuda {

// What a launch does with a row: all of it, one slice per block into the scratch memory, or the rest from there.
enum Stage { kWhole, kPart, kJoin };

struct TokenLogprobsTask : TokenLogprobsArgs {
  int64_t slices, slice_length;
  int stage;
};

struct TokenLogprobsBackwardTask : TokenLogprobsBackwardArgs {
  int64_t chunks, chunk_length;
};

}  // namespace rlhf_fast::cuda
