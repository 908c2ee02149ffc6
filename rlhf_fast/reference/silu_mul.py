"""The gate of a SwiGLU feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, silu(x) = x / (1 + e^-x) (Shazeer 2020, arXiv 2002.05202, eq. 6, before the last product).

    silu in fp32 (fp64 for fp64), rounded before the product, as models do it.
    """
    wide = gate if gate.dtype is torch.float64 else gate.float()
    return (wide * torch.sigmoid(wide)).to(gate.dtype) * up


def sample(
    shape: tuple[int, ...] = (6, 40), *, dtype: torch.dtype = torch.float32, scale: float = 2.0, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of ops.silu_mul, both of `shape`."""
    g = torch.Generator().manual_seed(seed)
    return {name: (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype) for name in ("gate", "up")}
