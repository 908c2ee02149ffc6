"""A linear layer whose row segments pass through adapters of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def segments(
    scales: Sequence[float], bounds: Sequence[int], ranks: Sequence[int]
) -> Iterator[tuple[float, slice, slice]]:
    """(scale, rows, places among the stacked factors) of each segment; bounds: first and last row of each, one after the other."""
    ends = list(accumulate(ranks))
    for i, (scale, end) in enumerate(zip(scales, ends, strict=True)):
        yield scale, slice(bounds[2 * i], bounds[2 * i + 1]), slice(end - ranks[i], end)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_input: Tensor | None,
    bias: Tensor | None,
    scales: Sequence[float],
    bounds: Sequence[int],
    ranks: Sequence[int],
) -> Tensor:
    """y = W x + b, and on the rows of a segment + scale B (A z) with its factors, everything in the dtype of x; z: lora_input, or x."""
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    y = F.linear(x, weight, None if bias is None else bias.to(weight.dtype)).reshape(-1, weight.shape[0])
    flat = (x if lora_input is None else lora_input).reshape(-1, x.shape[-1])
    parts, done = [], 0
    for scale, rows, places in segments(scales, bounds, ranks):
        low = F.linear(flat[rows], a[places])
        parts += [y[done : rows.start], torch.addmm(y[rows], low, b[:, places].t(), alpha=scale)]
        done = rows.stop
    parts = [part for part in (*parts, y[done:]) if len(part)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts) if parts else y).view(*x.shape[:-1], weight.shape[0])


def sample(
    rows: int = 24,
    in_features: int = 40,
    out_features: int = 33,
    ranks: Sequence[int] = (4, 8),
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of ops.lora_linear: as many equal row blocks as ranks and one more, which has no adapter and comes second."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

    size = rows // (len(ranks) + 1)
    starts = [i * size for i in range(len(ranks) + 1) if i != 1 or not ranks]
    return {
        "x": normal(rows, in_features),
        "weight": normal(out_features, in_features, std=in_features**-0.5),
        "lora_a": normal(sum(ranks), in_features, std=in_features**-0.5).float(),
        "lora_b": normal(out_features, sum(ranks), std=0.3).float(),
        "bias": normal(out_features) if bias else None,
        "scale": [2.0 - 0.5 * i for i in range(len(ranks))],
        "segments": [(start, start + size) for start, _ in zip(starts, ranks, strict=False)],
        "ranks": list(ranks),
    }
