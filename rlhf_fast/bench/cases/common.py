"""What the cases share: which shapes, how a formulation becomes a contender, where a missing peer becomes a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.bench import peers
from rlhf_fast.bench.engine import OURS, Call, Case, Results

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


def elementwise(
    op: str,
    name: str,
    function: Callable[..., Any],
    make: Callable[[], dict[str, Any]],
    leaves: Sequence[str],
    eager: Callable[..., Any],
) -> Iterator[Case]:
    """Forward, and forward with backward towards `leaves`, of an op against what models write (`eager`)."""

    def forward(x: dict[str, Any], function: Callable[..., Any]) -> Results:
        with torch.no_grad():
            return _several(function(**x))

    def both(x: dict[str, Any], function: Callable[..., Any]) -> Results:
        tracked = {key: leaf(x[key]) for key in leaves}
        found = _several(function(**{**x, **tracked}))
        backward(found, [y.detach() for y in found])
        return (*(y.detach() for y in found), *(t.grad for t in tracked.values()))

    for call, what in ((forward, "forward"), (both, "forward + backward")):
        contenders = {OURS: partial(call, function=function), "eager": partial(call, function=eager)}

        def truth(x: dict[str, Any], call: Callable[..., Results] = call) -> Results:
            floating = {k: v.double() for k, v in x.items() if isinstance(v, Tensor) and v.is_floating_point()}
            return call({**x, **floating}, eager)

        yield Case(op, f"{name}, {what}", make, contenders, truth)


def _several(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)
