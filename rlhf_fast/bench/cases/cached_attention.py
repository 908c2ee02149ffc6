"""cached_attention against PyTorch's attention over keys side by side, as transformers' caches keep them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import rlhf_fast
from rlhf_fast.bench.cases.common import DTYPES, no_grad
from rlhf_fast.bench.engine import OURS, Call, Case, Results

TOKENS, SAMPLES = 64, 4
HEADS, KV_HEADS, WIDTH = 9, 3, 64
LENGTHS = [(8, 24), (128, 128), (512, 512)]
"""Of a prompt and of what follows it."""


def make(prompt: int, room: int, dtype: torch.dtype) -> dict[str, Any]:
    """A decode step: every row has all its keys. `k` and `v` are the same for each row on its own."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    rows = torch.arange(TOKENS)
    x: dict[str, Any] = {
        "query": normal(TOKENS, HEADS, WIDTH),
        "rows": rows,
        "lengths": torch.full((TOKENS,), room),
        "prefix_rows": rows // SAMPLES,
        "prefix_start": torch.zeros_like(rows),
        "prefix_stop": torch.full((TOKENS,), prompt),
    }
    for name in ("keys", "values"):
        x[name] = normal(TOKENS, KV_HEADS, room, WIDTH)
        x[f"prefix_{name}"] = normal(TOKENS // SAMPLES, KV_HEADS, prompt, WIDTH)
        x[name[0]] = torch.cat([x[f"prefix_{name}"].repeat_interleave(SAMPLES, 0), x[name]], 2)
    return x


def ours(x: dict[str, Any]) -> Results:
    return (rlhf_fast.cached_attention(**{name: value for name, value in x.items() if name not in ("k", "v")}),)


def side_by_side(x: dict[str, Any]) -> Results:
    """No copy of the keys is counted, though transformers' dynamic cache makes one in each step."""
    out = torch.nn.functional.scaled_dot_product_attention(x["query"][:, :, None], x["k"], x["v"], enable_gqa=True)
    return (out[:, :, 0],)


def truth(x: dict[str, Any]) -> Results:
    return side_by_side({name: x[name].double() for name in ("query", "k", "v")})


def cases() -> Iterator[Case]:
    for prompt, room in LENGTHS:
        for label, dtype in DTYPES.items():
            found: dict[str, Call | str] = {OURS: ours, "PyTorch, keys side by side": no_grad(side_by_side)}
            yield Case(
                "cached_attention",
                f"{TOKENS} rows of {HEADS} heads over {prompt} + {room} keys, {label}",
                partial(make, prompt, room, dtype),
                found,
                truth,
                bars={"PyTorch, keys side by side": 1.0},
                memory=False,
                seconds=4,
            )
