"""The loss of a reward model: csrc/cuda/reward_loss.cuh."""

from __future__ import annotations

import torch

from rlhf_fast._counters import counters_for
from rlhf_fast.cuda.common import run
from rlhf_fast.cuda.whiten import MAX_PARTS
from rlhf_fast.reference.reward_loss import STATS

NUMBERS = 5
"""The constant of csrc/cuda/ops.h."""


def forward(chosen, rejected, margin, mask, center_coef, label_smoothing, gradients):  # type: ignore[no-untyped-def]
    """(loss (), stats (6,), gradients of chosen and rejected stacked, or None)."""
    loss, stats = chosen.new_empty(()), chosen.new_empty(len(STATS))
    grads = chosen.new_empty((2, *chosen.shape)) if gradients else None
    scratch = chosen.new_empty(NUMBERS * MAX_PARTS, dtype=torch.float64)
    run(
        "reward_loss", chosen, chosen, rejected, margin, mask, loss, stats, grads, counters_for(chosen), scratch, chosen.numel(),
        center_coef, label_smoothing,
    )  # fmt: skip
    return loss, stats, grads
