#include "cuda/ppo_loss.h"

#include "cuda/launch.h"

namespace rlhf_fast::cuda {
namespace {

// What a loss needs before its pass: the denominator, unless it is given, and the lengths of rows that are averaged.
Parts to_count(const PpoLossArgs& a) {
  const bool given = a.normalizer || a.divisor > 0;
  if (is_by_rows(a.reduction)) return rows_to_count(given && a.reduction != kSeqMeanTokenMean ? 0 : a.rows);
  return slots_to_count(given || a.reduction == kTokenSum ? 0 : a.n);
}

}  // namespace

int64_t ppo_loss(const PpoLossArgs& a) {
  const Parts tokens(a.n), counts = to_count(a);
  const int64_t blocks = tokens.count ? tokens.count : 1;  // without a token one block writes the zeros
  const PpoLossTask task{a, static_cast<int>(counts.count), counts.length, static_cast<int>(blocks), tokens.length};
  return launch_blocks("ppo_loss", counts.count + blocks, task, a.stream);
}

}  // namespace rlhf_fast::cuda
