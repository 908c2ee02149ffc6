#include "cuda/launch.h"

namespace rlhf_fast::cuda {

int64_t gae(const GaeArgs& a) { return launch_blocks("gae", a.rows, a, a.stream); }

int64_t gae_backward(const GaeBackwardArgs& a) { return launch_blocks("gae_backward", a.rows, a, a.stream); }

}  // namespace rlhf_fast::cuda
