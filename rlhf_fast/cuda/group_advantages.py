"""Advantages relative to a group: csrc/cuda/group_advantages.cuh."""

from __future__ import annotations

import torch

from rlhf_fast.cuda.common import run
from rlhf_fast.cuda.token_logprobs import THREADS
from rlhf_fast.reference.group_advantages import KINDS

SAMPLE_DOUBLES, PART_DOUBLES = 4, 2
"""The constants of csrc/cuda/group_advantages.cuh."""


def _run(grad, scores, group_ids, mask, lengths, greedy_scores, kind, unbiased, eps):  # type: ignore[no-untyped-def]
    """The kernel serves both directions: advantages without `grad`, the gradient of the scores with it."""
    out, n = torch.empty_like(scores), scores.shape[0]
    doubles = n * SAMPLE_DOUBLES + -(-n // THREADS) * PART_DOUBLES if kind == "reinforce++" else 0
    scratch = out.new_empty(doubles, dtype=torch.float64)
    run(
        "group_advantages", out, grad, scores, group_ids, mask, lengths, greedy_scores, out, scratch, n, KINDS.index(kind),
        unbiased, eps,
    )  # fmt: skip
    return out


def forward(*args):  # type: ignore[no-untyped-def]
    """scores (N,), group_ids (N,), mask, lengths, greedy_scores, kind, unbiased, eps. (N,)."""
    return _run(None, *args)


def backward(grad, scores, group_ids, mask, lengths, kind, unbiased, eps):  # type: ignore[no-untyped-def]
    """d scores (N,)."""
    return _run(grad.contiguous(), scores, group_ids, mask, lengths, None, kind, unbiased, eps)
