"""Attention of single tokens over cached keys, in plain PyTorch: the specification of ops.cached_attention."""

from __future__ import annotations

import torch
from torch import Tensor


def cached_attention(
    query: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    rows: Tensor | None,
    lengths: Tensor | None,
    prefix_keys: Tensor | None,
    prefix_values: Tensor | None,
    prefix_rows: Tensor | None,
    prefix_start: Tensor | None,
    prefix_stop: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """(N, heads, Dv) as in ops.cached_attention; softcap 0: none, window 0: all keys. In fp32, or fp64 for fp64."""
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    shared = None if prefix_values is None else prefix_values
    value_width = (values if shared is None else shared).shape[-1]  # type: ignore[union-attr]
    out = query.new_zeros(*query.shape[:2], value_width)
    for i in range(query.shape[0]):
        parts: list[tuple[Tensor, Tensor]] = []
        if prefix_keys is not None and prefix_values is not None:
            row, seen = int(prefix_rows[i]), slice(int(prefix_start[i]), int(prefix_stop[i]))  # type: ignore[index]
            parts.append((prefix_keys[row, :, seen], prefix_values[row, :, seen]))
        if keys is not None and values is not None:
            row, seen = int(rows[i]), slice(0, int(lengths[i]))  # type: ignore[index]
            parts.append((keys[row, :, seen], values[row, :, seen]))
        k, v = (torch.cat([p[j] for p in parts], dim=1).to(wide) for j in (0, 1))  # (kv_heads, L, D)
        if window:
            k, v = k[:, -window:], v[:, -window:]
        if k.shape[1] == 0:
            continue
        q = query[i].to(wide).view(k.shape[0], -1, query.shape[-1])  # (kv_heads, group, D)
        scores = scale * q @ k.transpose(1, 2)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        out[i] = (scores.softmax(-1) @ v).reshape(query.shape[1], -1).to(out.dtype)
    return out


def sample(
    tokens: int = 7,
    heads: int = 6,
    kv_heads: int = 2,
    width: int = 24,
    value_width: int | None = None,
    *,
    prompts: int = 3,
    prompt_length: int = 11,
    room: int = 9,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Tensor arguments of ops.cached_attention: tokens of shared prompts, each with a slot of its own."""
    g = torch.Generator().manual_seed(seed)
    value_width = width if value_width is None else value_width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    start = torch.randint(0, prompt_length, (tokens,), generator=g)
    return {
        "query": normal(tokens, heads, width),
        "keys": normal(tokens + 1, kv_heads, room, width),
        "values": normal(tokens + 1, kv_heads, room, value_width),
        "rows": torch.randperm(tokens + 1, generator=g)[:tokens],
        "lengths": torch.randint(0, room + 1, (tokens,), generator=g),
        "prefix_keys": normal(prompts, kv_heads, prompt_length, width),
        "prefix_values": normal(prompts, kv_heads, prompt_length, value_width),
        "prefix_rows": torch.randint(0, prompts, (tokens,), generator=g),
        "prefix_start": start,
        "prefix_stop": start + torch.randint(1, prompt_length, (tokens,), generator=g).clamp(max=prompt_length - start),
    }
