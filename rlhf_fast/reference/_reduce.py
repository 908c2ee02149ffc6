"""Token weights of the loss reductions: every one is loss = sum of weight x token loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum")
"""Those of the kernels; what divides each of them is counted by `tokens` and `sequences`."""


def segments(like: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """(number of the sequence of every token, how many sequences): rows of (..., T), or packed (N,)."""
    if cu_seqlens is not None:
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        numbers = torch.arange(len(lengths), device=like.device)
        return torch.repeat_interleave(numbers, lengths, output_size=like.numel()), len(lengths)
    rows = math.prod(like.shape[:-1])
    return torch.arange(rows, device=like.device)[:, None].expand(rows, like.shape[-1]).reshape(like.shape), rows


# On a CPU index_add and index_select's gradient run through the terms in order, so a row has the same bits in any batch (a sum over
# a dimension is split between threads when it has one row), and index_put is atomic; on a GPU it is the other way round.


def sums(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sum over the tokens of every sequence, (S,). The order of the terms is fixed: no float atomics."""
    if cu_seqlens is None and not x.is_cpu:
        return x.sum(-1).reshape(-1)
    index, count = segments(x, cu_seqlens)
    total = torch.zeros(count, dtype=x.dtype, device=x.device)
    index, x = index.reshape(-1), x.reshape(-1)
    return total.index_add(0, index, x) if x.is_cpu else total.index_put((index,), x, accumulate=True)


def spread(total: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """One number per sequence (S,) at every one of its tokens, like `like`; its gradient is summed as in `sums`."""
    if cu_seqlens is None and not total.is_cpu:
        return total.reshape(*like.shape[:-1], 1).expand(like.shape)
    index, _ = segments(like, cu_seqlens)
    return total.index_select(0, index.reshape(-1)).reshape(index.shape) if total.is_cpu else total[index]


def tokens(mask: Tensor) -> Tensor:
    """Number of real tokens, 0-d int64."""
    return mask.sum()


def sequences(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Number of sequences with a real token, 0-d int64."""
    return (sums(mask.long(), cu_seqlens) > 0).sum()


def token_weights(
    mask: Tensor,
    dtype: torch.dtype,
    reduction: str,
    normalizer: Tensor | None,
    divisor: float,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Weight of every token, 0 where masked. `normalizer` (0-d) or a positive `divisor` replace the denominator.

    Denominators without either: token-mean: real tokens; token-sum: 1; seq-mean-*: sequences with a real token. A
    denominator of 0 gives 0.
    """
    real = mask.to(dtype)
    if reduction == "seq-mean-token-mean":
        weights = real / spread(sums(real, cu_seqlens).clamp(min=1), real, cu_seqlens)
    else:
        weights = real
    if normalizer is not None:
        denominator = normalizer.detach().to(dtype)
    elif divisor > 0:
        denominator = torch.full((), divisor, dtype=dtype, device=mask.device)
    elif reduction == "token-mean":
        denominator = tokens(mask).to(dtype)
    elif reduction == "token-sum":
        denominator = torch.ones((), dtype=dtype, device=mask.device)
    else:
        denominator = sequences(mask, cu_seqlens).to(dtype)
    return torch.where(denominator > 0, weights / denominator.where(denominator > 0, 1.0), 0.0)
