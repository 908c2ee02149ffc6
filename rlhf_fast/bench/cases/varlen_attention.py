"""varlen_attention on the packed sequences of a micro-batch, against PyTorch's attention of one sequence after the other."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench.cases.common import DTYPES, elementwise
from rlhf_fast.bench.engine import Case
from rlhf_fast.reference.varlen_attention import sample

SHAPES = [((32,) * 16, 9, 3, 64), ((128,) * 8, 9, 3, 64), ((2048,), 9, 3, 64), ((256, 256), 32, 8, 128)]
"""Lengths, heads, heads of keys, width."""


def eager(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    parts = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        q, k, v = (x[None, start:stop].transpose(1, 2) for x in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


def cases() -> Iterator[Case]:
    for lengths, heads, kv_heads, width in SHAPES:
        for label, dtype in DTYPES.items():
            name = f"{len(lengths)} x {lengths[0]} tokens, {heads} and {kv_heads} heads of {width} {label}"
            make = partial(sample, lengths, heads, kv_heads, width, dtype=dtype)
            function: Any = rlhf_fast.varlen_attention
            yield from elementwise("varlen_attention", name, function, make, ("query", "key", "value"), eager)
