#include "cuda/launch.h"

namespace rlhf_fast::cuda {

int64_t kl_estimate(const KlEstimateArgs& a) { return launch_blocks("kl_estimate", blocks_of(a.n), a, a.stream); }

int64_t kl_estimate_backward(const KlEstimateBackwardArgs& a) {
  return launch_blocks("kl_estimate_backward", blocks_of(a.n), a, a.stream);
}

}  // namespace rlhf_fast::cuda
