"""What the cases share: which shapes, how a formulation becomes a contender, where a missing peer becomes a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.bench import peers
from rlhf_fast.bench.engine import Call, Results

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRUTH_ROWS = 8


def backward(outputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> None:
    """Backward of sum_i <outputs_i, upstream_i>, the gradient of any loss on them."""
    torch.autograd.backward(list(outputs), [g.to(o.dtype) for o, g in zip(outputs, upstream, strict=True)])


def leaf(x: Tensor) -> Tensor:
    """A fresh leaf over the same memory."""
    return x.detach().requires_grad_()


def peer(load: Callable[[], Any], make: Callable[[Any], Call]) -> Call | str:
    """A contender made from a peer's module, or the reason why there is none."""
    module = peers.attempt(load)
    return module if isinstance(module, str) else make(module)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a formulation, which happens at its first call, outside of the timing."""
    return torch.compile(function, dynamic=False)


def no_grad(call: Call) -> Call:
    """The same without autograd."""

    def run(inputs: dict[str, Any]) -> Results:
        with torch.no_grad():
            return call(inputs)

    return run
