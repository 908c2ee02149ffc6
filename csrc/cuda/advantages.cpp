#include "cuda/advantages.h"

#include "cuda/launch.h"
#include "cuda/whiten.h"

namespace rlhf_fast::cuda {

int64_t advantages(const AdvantagesArgs& a) {
  // The moments are those of at most kMaxParts parts; without them every row has a block.
  const int64_t each = a.whiten ? (a.rows + kMaxParts - 1) / kMaxParts : 1;
  const int64_t parts = each ? (a.rows + each - 1) / each : 0;
  const AdvantagesTask task{a, each};
  if (const int64_t error = launch_blocks("advantages", parts, task, a.stream)) return error;
  if (!a.whiten) return 0;
  const WhitenTask whiten{{a.advantages, a.mask, a.advantages, a.scratch, a.n, true, a.unbiased, a.eps, a.stream},
                          a.floor_variance,
                          static_cast<int>(parts),
                          0};
  return launch_blocks("whiten_apply", blocks_of(a.n), whiten, a.stream);
}

}  // namespace rlhf_fast::cuda
