// Moments of at most kMaxParts parts, then the whitening; the adjoint has sums of its own between the two.
#include "cuda/whiten.h"

#include "cuda/launch.h"

namespace rlhf_fast::cuda {

int64_t whiten(const WhitenArgs& a) {
  const Parts parts(a.n);
  const WhitenTask task{a, false, static_cast<int>(parts.count), parts.length};
  if (const int64_t error = launch_blocks("whiten_moments", parts.count, task, a.stream)) return error;
  return launch_blocks("whiten_apply", blocks_of(a.n), task, a.stream);
}

int64_t whiten_backward(const WhitenBackwardArgs& a) {
  const Parts parts(a.n);
  const WhitenBackwardTask task{a, static_cast<int>(parts.count), parts.length};
  if (const int64_t error = launch_blocks("whiten_backward_moments", parts.count, task, a.stream)) return error;
  if (const int64_t error = launch_blocks("whiten_backward_sums", parts.count, task, a.stream)) return error;
  return launch_blocks("whiten_backward", blocks_of(a.n), task, a.stream);
}

}  // namespace rlhf_fast::cuda
