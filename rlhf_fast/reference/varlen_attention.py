"""Causal attention within packed sequences, in plain PyTorch: the specification of ops.varlen_attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float, window: int = 0
) -> tuple[Tensor, Tensor]:
    """(N, heads, Dv) as in ops.varlen_attention, and of each query and head (largest scaled score, 1 / sum e), e relative to it.

    window 0: all keys. In fp32, or fp64 for fp64.
    """
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    group = query.shape[1] // max(key.shape[1], 1)
    parts = []
    for start, stop in pairwise([0, *cu_seqlens.tolist()]):  # an empty one first, for no sequences at all
        q = query[start:stop].to(wide).transpose(0, 1)
        k, v = (x[start:stop].to(wide).transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
        place = torch.arange(stop - start, device=query.device)
        behind = place[:, None] - place  # keys that a query sees lie 0 to window - 1 tokens before it
        seen = (behind >= 0) & (behind < window) if window else behind >= 0
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(~seen, float("-inf"))
        largest = scores.detach().amax(-1, keepdim=True) if stop > start else scores.new_empty(len(scores), 0, 1)
        state = torch.cat([largest, 1 / (scores.detach() - largest).exp().sum(-1, keepdim=True)], -1)
        parts.append(((scores.softmax(-1) @ v).transpose(0, 1), state.transpose(0, 1)))
    out, state = (torch.cat(each) for each in zip(*parts, strict=True))
    return out.to(query.dtype), state


def sample(
    lengths: tuple[int, ...] = (5, 1, 9),
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    value_width: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Tensor arguments of ops.varlen_attention."""
    g = torch.Generator().manual_seed(seed)
    widths = {"query": (heads, width), "key": (kv_heads, width), "value": (kv_heads, value_width or width)}
    tensors = {
        name: torch.randn(sum(lengths), *shape, generator=g, dtype=torch.float64).to(dtype)
        for name, shape in widths.items()
    }
    return {**tensors, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
