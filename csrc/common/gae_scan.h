// The recurrence of generalised advantage estimation (arXiv 1506.02438, eq. 16), from the last token to the first.
//
// The carry is kept in double: it costs nothing on a chain that is bound by latency, and lambda = gamma = 1 sums
// thousands of terms.
#pragma once

#include "common/elementary.h"

namespace rlhf_fast {
namespace {

struct GaeScan {
  double gamma, lam;
  double next;  // value of the state after this token
  double running = 0;

  RLHF_FAST_HD double step(double reward, double value) {
    running = (reward + gamma * next - value) + gamma * lam * running;
    next = value;
    return running;
  }

  // A masked slot between real tokens, counted as a step of zero reward and zero value.
  RLHF_FAST_HD void decay() {
    running = gamma * next + gamma * lam * running;
    next = 0;
  }
};

}  // namespace
}  // namespace rlhf_fast
