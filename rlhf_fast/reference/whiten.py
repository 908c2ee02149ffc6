"""Whitening over the real entries."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(x: Tensor, mask: Tensor | None, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance over the real entries; no entry: 0 and 0, one entry: its value and 0."""
    real = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    x = x.where(real, 0.0)
    count = real.sum()
    mean = x.sum() / count.clamp(min=1)
    squares = (x - mean).where(real, 0.0).square().sum()
    return mean, squares / (count - int(unbiased)).clamp(min=1)


def standardise(
    x: Tensor, mask: Tensor | None, unbiased: bool, eps: float, floor: bool, shift_mean: bool = True
) -> Tensor:
    """(x - mean) / sqrt(var + eps), or / sqrt(max(var, eps)) with `floor`; masked entries are scaled along."""
    mean, variance = moments(x, mask, unbiased)
    y = (x - mean) * (variance.clamp(min=eps) if floor else variance + eps).rsqrt()
    return y if shift_mean else y + mean


def by_deviation(x: Tensor, mask: Tensor, unbiased: bool, eps: float) -> Tensor:
    """(x - mean) / (sqrt(var) + eps) in fp64, rounded to the dtype of x; masked entries give 0."""
    wide = x.double()
    mean, variance = moments(wide, mask, unbiased)
    some = variance > 0  # the root has no slope at 0
    deviation = variance.where(some, 1.0).sqrt().where(some, 0.0)
    return ((wide - mean).where(mask, 0.0) / (deviation + eps)).to(x.dtype)


def whiten(x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float) -> Tensor:
    """(x - mean) * rsqrt(var + eps) over the real entries, + mean without shift_mean; masked entries give 0."""
    if mask is not None:
        x = x.where(mask, 0.0)
    y = standardise(x, mask, unbiased, eps, floor=False, shift_mean=shift_mean)
    return y if mask is None else y.where(mask, 0.0)


def sample(shape: tuple[int, ...] = (4, 33), *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of ops.whiten: a mean far from zero, ragged mask."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": (3.0 + 0.5 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype),
        "mask": torch.rand(shape, generator=g) > 0.2,
    }
