"""Log-probs of whole answers from those of their tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast.reference._reduce import segments, sums


class SequenceLogprobs(NamedTuple):
    """One entry per sequence."""

    logprobs: Tensor
    """(B,) in nats, fp32 (fp64 for fp64), differentiable."""
    lengths: Tensor
    """(B,) int64, real tokens."""


def sequence_logprobs(
    logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    common_lengths: Tensor | None = None,
    tail_weight: float = 1.0,
) -> SequenceLogprobs:
    """Sum (or mean) over the real tokens of each answer, the input of `preference_loss` and `kto_loss`.

    The token log-probs may come from `token_logprobs` or, without logits, from `linear_token_logprobs`. With common_lengths, the
    tokens of an answer past that count are weighted: LD-DPO (Liu et al. 2024, arXiv 2409.06411) takes the shorter length of
    the pair for both of its answers, under the policy and under the reference.

    Args:
        logprobs: (B, T), or (N,) packed with cu_seqlens.
        mask: like logprobs, True = token of the answer; None = all. Masked tokens are never read; gradient 0.
        cu_seqlens: (S+1,) boundaries of S packed sequences.
        average: divide by the number of real tokens (0 stays 0).
        common_lengths: (B,) or (S,) integer, how many real tokens of each answer count fully.
        tail_weight: in [0, 1], factor of the others.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    op = "sequence_logprobs"
    _check.floating(op, "logprobs", logprobs)
    mask = _check.mask_like(op, mask, logprobs, "logprobs")
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    if cu_seqlens is None:
        if logprobs.dim() != 2:
            raise _check.error(ValueError, op, "logprobs", f"shape {tuple(logprobs.shape)}", "(B, T), or cu_seqlens")
    else:
        if logprobs.dim() != 1:
            raise _check.error(ValueError, op, "logprobs", f"shape {tuple(logprobs.shape)}", "(N,) with cu_seqlens")
        cu_seqlens = _check.cu_seqlens(op, cu_seqlens, logprobs.shape[0], logprobs)
    tail_weight = _check.number(op, "tail_weight", tail_weight, 0.0, 1.0)
    if common_lengths is None and tail_weight != 1:
        raise _check.error(ValueError, op, "common_lengths", None, f"a tensor with tail_weight={tail_weight}")
    values = _check.wide(logprobs).where(mask, 0.0)
    lengths = sums(mask.long(), cu_seqlens)
    if common_lengths is not None:
        _check.integer(op, "common_lengths", common_lengths)
        _check.shape(op, "common_lengths", common_lengths, lengths.shape, "one per sequence")
        _check.device(op, "common_lengths", common_lengths, logprobs, "logprobs")
        index, _ = segments(logprobs, cu_seqlens)
        rank = mask.long().cumsum(-1)  # of the token among the real ones of its sequence, from 1
        if cu_seqlens is not None:
            rank = rank - (lengths.cumsum(0) - lengths)[index]
        values = torch.where(rank > common_lengths.long()[index], values * tail_weight, values)
    total = sums(values.double(), cu_seqlens)  # fp64: thousands of nats, of which a loss sees the difference
    if average:
        total = total / lengths.clamp(min=1)
    return SequenceLogprobs(total.to(values.dtype), lengths)
