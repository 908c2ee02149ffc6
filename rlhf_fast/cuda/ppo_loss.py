"""The PPO loss with every gradient and every statistic: csrc/cuda/ppo_loss.cuh."""

from __future__ import annotations

import torch

from rlhf_fast._counters import counters_for
from rlhf_fast.cuda.common import run
from rlhf_fast.cuda.whiten import MAX_PARTS
from rlhf_fast.ops.kl_estimate import ALL_KINDS, KINDS
from rlhf_fast.reference._reduce import REDUCTIONS
from rlhf_fast.reference.ppo_loss import STATS

NUMBERS = 23
"""The constant of csrc/cuda/ops.h."""


def forward(
    logprobs, old_logprobs, advantages, mask, entropy, ref_logprobs, values, old_values, returns, importance_weights,
    normalizer, cu_seqlens, low, high, dual, clamp, bonus, kl_coef, kl_kind, kl_in, kl_out, value_clip, value_coef,
    reduction, divisor, level, surrogate, gradients,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """(loss (), stats (16,), gradients of logprobs, entropy and values stacked, or None)."""
    loss, stats = logprobs.new_empty(()), logprobs.new_empty(len(STATS))
    grads = d_logprobs = d_entropy = d_values = None
    if gradients:
        given = [x is not None for x in (logprobs, entropy, values)]
        grads = logprobs.new_empty((sum(given), *logprobs.shape))
        each = iter(grads.unbind())
        d_logprobs, d_entropy, d_values = (next(each) if wanted else None for wanted in given)
    if cu_seqlens is None:
        length = logprobs.shape[-1]
        rows = logprobs.numel() // length if length else 0
    else:
        rows, length = cu_seqlens.shape[0] - 1, 0
    lengths = logprobs.new_empty(rows, dtype=torch.int64) if reduction == "seq-mean-token-mean" else None
    scratch = logprobs.new_empty(NUMBERS * MAX_PARTS, dtype=torch.float64)
    run(
        "ppo_loss", logprobs, logprobs, old_logprobs, advantages, mask, entropy, ref_logprobs, values, old_values, returns,
        importance_weights, normalizer, cu_seqlens, loss, stats, d_logprobs, d_entropy, d_values, lengths,
        counters_for(logprobs), scratch, rows, length, logprobs.numel(), surrogate == "cispo", low, high, dual, clamp, bonus, kl_coef,
        ALL_KINDS.index(kl_kind) % len(KINDS), kl_kind[-1] == "+", kl_in, kl_out, value_clip, value_coef, REDUCTIONS.index(reduction), divisor,
    )  # fmt: skip
    return loss, stats, grads
