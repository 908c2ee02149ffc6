"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Each head x to x cos + rotate_half(x) sin (Su et al. 2021, arXiv 2104.09864, eq. 34, with the halves of a head as its pairs)."""
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    query, key = (x * cosine + _rotate_half(x) * sine for x in (query, key))
    return query, key


def _rotate_half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def sample(
    batch: int = 2,
    length: int = 5,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of ops.rotary; as in models the heads of a token lie side by side."""
    g = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(batch, length, n, width, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)
        for n in (heads, kv_heads)
    )
    steps = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * steps
    angles = torch.cat([angles, angles], -1).expand(batch, -1, -1)
    return {"query": query, "key": key, "cosine": angles.cos().to(dtype), "sine": angles.sin().to(dtype)}
