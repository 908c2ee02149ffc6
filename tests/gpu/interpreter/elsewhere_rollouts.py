"""The process of test_rollouts.py: rollouts on a device that is no CPU, attending there by the Triton kernels in Triton's interpreter.

What reaches a kernel are the device's tensors; the interpreter gets the memory that is inside of them. Prints JSON: for every
rollout its tokens and numbers, and what the host asked of the device.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "model"))

import torch
from elsewhere import NAME, Elsewhere, install
from gpu.interpreter.rollouts import ROLLOUTS, model_of, numbers, rollout
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast._op import OPS
from rlhf_fast.rollout import attention_of

_aten = torch.ops.aten
_WAITING = (_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default)
"""Ops whose result the host has to wait for."""


class Waits(TorchDispatchMode):
    """Counts them for tensors of the device: also copies to the host, and the places of a mask that is an index."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        ours = bool(args) and isinstance(args[0], Elsewhere)
        to_host = isinstance(found, Tensor) and found.device.type == "cpu" and function in (_aten._to_copy.default,)
        masks = function in (_aten.index.Tensor, _aten.index_put_.default) and any(
            x is not None and x.dtype is torch.bool for x in args[1]
        )
        into_host = function is _aten.copy_.default and not ours and isinstance(args[1], Elsewhere)
        if (ours and (function in _WAITING or to_host or masks)) or into_host:
            self.seen[str(function)] += 1
        return found


def _inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel on the memory that device tensors hold."""

    def call(*args: Any) -> Any:
        assert all(isinstance(x, Elsewhere) for x in args if isinstance(x, Tensor))
        found = function(*(x.inner if isinstance(x, Elsewhere) else x for x in args))
        return tuple(map(Elsewhere, found)) if isinstance(found, tuple) else Elsewhere(found)

    return call


@contextmanager
def kernels_there(*ops: str) -> Iterator[None]:
    """The device has the Triton cells of these ops."""
    before = {name: OPS[name].backends for name in ops}
    for name, cells in before.items():
        cell = next(cell for cell in cells if cell.name == "triton")
        there = replace(cell, device=NAME, fn=_inside(cell.fn), missing=lambda: None)
        OPS[name].backends = (there, *cells)
        OPS[name]._chosen.clear()
    try:
        yield
    finally:
        for name, cells in before.items():
            OPS[name].backends = cells
            OPS[name]._chosen.clear()


def main() -> None:
    device = install()
    found = {}
    with kernels_there("cached_attention"):
        for name in ROLLOUTS:
            model = model_of(name)
            model.to(device)
            reason = attention_of(model)
            with Waits() as waits:
                got = rollout(model, name, device)
            found[name] = {**numbers(got), "reason": reason, "waits": dict(waits.seen)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
