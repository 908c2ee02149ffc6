"""Bradley-Terry loss of a reward model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

STATS = ("accuracy", "margin", "chosen_score", "rejected_score", "center", "pairs")
"""Means over the real pairs: chosen > rejected (ties 0.5), chosen - rejected, the scores, (chosen + rejected)^2; pairs: how many."""


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    mask: Tensor | None,
    center_coef: float,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """mean[(1 - e) softplus(-x) + e softplus(x)] + center_coef mean (chosen + rejected)^2, x = chosen - rejected - margin."""
    real = torch.ones_like(chosen, dtype=torch.bool) if mask is None else mask
    chosen, rejected = chosen.where(real, 0.0), rejected.where(real, 0.0)
    gap = chosen - rejected
    x = gap if margin is None else gap - margin.detach().where(real, 0.0)
    pairs = real.sum()
    mean = lambda v: v.where(real, 0.0).sum() / pairs.clamp(min=1)
    nll = (
        -torch.nn.functional.logsigmoid(x)
        if smoothing == 0
        else (1 - smoothing) * softplus(-x) + smoothing * softplus(x)
    )
    center = mean((chosen + rejected).square())
    loss = mean(nll) + center_coef * center
    accuracy = mean((gap > 0).to(gap.dtype) + 0.5 * (gap == 0).to(gap.dtype))
    stats = [accuracy, mean(gap), mean(chosen), mean(rejected), center, pairs.to(gap.dtype)]
    return loss, torch.stack([s.detach() for s in stats])


def sample(n: int = 33, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of ops.reward_loss."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n, generator=g, dtype=torch.float64)
    return {
        "chosen_scores": (3 * draw()).to(dtype),
        "rejected_scores": (3 * draw()).to(dtype),
        "margin": draw().abs().to(dtype),
        "mask": torch.rand(n, generator=g) > 0.2,
    }
