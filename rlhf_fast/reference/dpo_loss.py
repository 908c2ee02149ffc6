"""Direct preference losses on the log-probs of the tokens of two answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.reference._reduce import sums


def _logistic(x: Tensor, win: float, lose: float) -> Tensor:
    return -win * logsigmoid(x) if lose == 0 else -win * logsigmoid(x) - lose * logsigmoid(-x)


CURVES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "logistic": _logistic,
    "hinge": lambda x, win, lose: torch.relu(1 - x),
    "square": lambda x, win, lose: x.square(),
}
"""The loss of a pair as a function of x = scale x gap - offset."""


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_mask: Tensor | None,
    rejected_mask: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    normalizer: Tensor | None,
    chosen_cu_seqlens: Tensor | None,
    rejected_cu_seqlens: Tensor | None,
    beta: float,
    scale: float,
    offset: float,
    curve: str,
    win: float,
    lose: float,
    average: bool,
    divisor: float,
) -> tuple[Tensor, Tensor]:
    """(loss, beta x what is compared (2, B)). Rafailov et al. 2023 (arXiv 2305.18290) eq. 7 is scale = beta, offset = 0, logistic, win = 1.

    An answer's log-ratio is the sum (with average: the mean) over its real tokens of logprobs - ref_logprobs, or of logprobs
    without a reference; the gap is that of the chosen answer less that of the rejected one. normalizer or a positive divisor
    replace the number of pairs. Sums are fp64: thousands of nats, of which a loss sees the difference.
    """
    compared = [
        _answers(chosen, ref_chosen, chosen_mask, chosen_cu_seqlens, average),
        _answers(rejected, ref_rejected, rejected_mask, rejected_cu_seqlens, average),
    ]
    real = torch.ones_like(compared[0], dtype=torch.bool) if mask is None else mask
    compared = [x.where(real, 0.0) for x in compared]
    losses = CURVES[curve](scale * (compared[0] - compared[1]) - offset, win, lose)
    if weights is not None:
        losses = losses * weights.detach()
    if normalizer is not None:
        count = normalizer.detach()
    else:
        count = real.sum().to(losses.dtype) if divisor <= 0 else losses.new_full((), divisor)
    total = losses.where(real, 0.0).sum()
    loss = torch.where(count > 0, total / count.where(count > 0, 1.0), 0.0)
    return loss, beta * torch.stack([x.detach() for x in compared])


def _answers(
    logprobs: Tensor, ref: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, average: bool
) -> Tensor:
    """(B,) sum or mean over the real tokens of each answer."""
    real = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    x = logprobs.where(real, 0.0)
    if ref is not None:
        x = x.double() - ref.detach().where(real, 0.0).double()
    total = sums(x.double(), cu_seqlens)
    if average:
        total = total / sums(real.long(), cu_seqlens).clamp(min=1)
    return total.to(logprobs.dtype)


def sample(
    shape: tuple[int, int] = (5, 33),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    rejected_length: int | None = None,
) -> dict[str, Tensor]:
    """Keyword arguments of ops.dpo_loss with every optional tensor; the rejected answers have a length of their own."""
    g = torch.Generator().manual_seed(seed)
    pairs, length = shape
    draw = lambda n: torch.randn(pairs, n, generator=g, dtype=torch.float64)
    found = {}
    for side, n in (("chosen", length), ("rejected", length + 4 if rejected_length is None else rejected_length)):
        found[f"{side}_logprobs"] = -draw(n).abs()
        found[f"ref_{side}_logprobs"] = found[f"{side}_logprobs"] + 0.3 * draw(n)
        found[f"{side}_mask"] = torch.rand(pairs, n, generator=g) > 0.3
    found["weights"] = torch.rand(pairs, generator=g, dtype=torch.float64) + 0.5
    found["mask"] = torch.rand(pairs, generator=g) > 0.2
    order = ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
    found = {**{k: found[k] for k in order}, **found}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}
