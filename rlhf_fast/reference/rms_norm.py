"""Root mean square layer normalisation with a frozen weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) (w + offset) along the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    Statistics in fp32 (fp64 for fp64), rounded to the dtype of x before the weight, as models do it.
    """
    wide = x if x.dtype is torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * (weight + offset)


def sample(
    shape: tuple[int, ...] = (6, 40),
    *,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
    scale: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of ops.rms_norm for x of `shape`, rows of `scale` standard deviations."""
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(shape, generator=g, dtype=torch.float64)
    weight = 1.0 - offset + 0.3 * torch.randn(shape[-1], generator=g, dtype=torch.float64)
    return {"x": x.to(dtype), "weight": weight.to(dtype), "eps": 1e-5, "offset": offset}
