"""lora_linear on the rows of four roles against eager PyTorch and the bare products with the weight."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench.cases.common import DTYPES, leaf
from rlhf_fast.bench.engine import OURS, Call, Case, Results
from rlhf_fast.reference.lora_linear import sample

ROWS, RANKS = 16384, (16, 16, 16)
"""32 x 128 tokens of policy, reference (no adapter), value and reward."""


def ours(x: dict[str, Any]) -> Results:
    with torch.no_grad():
        return (rlhf_fast.lora_linear(**x),)


def both(x: dict[str, Any]) -> Results:
    leaves = [leaf(x[name]) for name in ("x", "lora_a", "lora_b")]
    y = rlhf_fast.lora_linear(**{**x, **dict(zip(("x", "lora_a", "lora_b"), leaves, strict=True))})
    y.backward(y.detach())
    grads = [t.grad for t in leaves if t.grad is not None]
    return (y.detach(), *(g.to(y.dtype) for g in grads))  # what the factors' are sums of has that precision


def eager_of(call: Call) -> Call:
    def run(x: dict[str, Any]) -> Results:
        with rlhf_fast.use_backend("reference"):
            return call(x)

    return run


def bare(backward: bool) -> Call:
    """The products with the weight alone, as PyTorch has them."""

    def run(x: dict[str, Any]) -> Results:
        y = torch.nn.functional.linear(x["x"], x["weight"])
        if backward:
            y @ x["weight"]
        return (None,) * (4 if backward else 1)

    return run


def truth(x: dict[str, Any], call: Call) -> Results:
    return eager_of(call)({k: v.double() if isinstance(v, Tensor) else v for k, v in x.items()})


def cases() -> Iterator[Case]:
    for in_features, out_features in ((576, 1536), (1536, 576)):
        for label, dtype in DTYPES.items():
            for call, what in ((ours, "forward"), (both, "forward + backward")):
                yield Case(
                    "lora_linear",
                    f"[{ROWS}, {in_features}] to {out_features} {label}, 3 adapters of rank {RANKS[0]}, {what}",
                    partial(sample, ROWS, in_features, out_features, RANKS, dtype=dtype, bias=False),
                    {OURS: call, "eager": eager_of(call), "bare product": bare(call is both)},
                    partial(truth, call=call),
                )
