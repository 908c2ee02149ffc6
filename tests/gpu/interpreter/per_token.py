"""What the tests of the per-token kernels share: a public function on the Triton cells under the sanitizer, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu.tools.on_cpu import on_cpu
from gpu.tools.sanitizer import Sanitizer
from parity import assert_parity, double
from torch import Tensor

import rlhf_fast

ORDERS = ("forward", "reverse", "shuffle")


@dataclass
class Run:
    """Results by name, gradients as "d <input>", and what was launched."""

    results: dict[str, Tensor]
    launches: list[Any]

    @property
    def moved(self) -> int:
        """Bytes that DRAM must deliver and take: every element once a launch."""
        return sum(launch.load_first + launch.store_first for launch in self.launches)


Outputs = Mapping[str, Tensor]
Call = Callable[..., Outputs]


def evaluate(call: Call, kwargs: Mapping[str, Any], leaves: Sequence[str] = ()) -> dict[str, Tensor]:
    """Outputs of `call`, and the gradients of the leaves for upstream gradients that differ from element to element."""
    inputs = {k: v.clone().requires_grad_() if k in leaves else v for k, v in kwargs.items()}
    outputs = call(**inputs)
    results = {name: x.detach() for name, x in outputs.items()}
    leaves = [k for k in leaves if k in inputs]
    if leaves:
        flowing = [x for x in outputs.values() if x.requires_grad]
        upstream = [torch.linspace(-1, k + 1.5, x.numel()).view_as(x).to(x.dtype) for k, x in enumerate(flowing)]
        wanted = [inputs[k] for k in leaves]
        found = torch.autograd.grad(flowing, wanted, upstream, allow_unused=True, materialize_grads=True)
        results |= {f"d {k}": g for k, g in zip(leaves, found, strict=True)}
    return results


def sanitized(call: Call, kwargs: Mapping[str, Any], leaves: Sequence[str] = (), order: str = "forward") -> Run:
    """`evaluate` on the Triton kernels; nothing found, and no element of a result left unwritten."""
    with Sanitizer(order=order, seed=1) as s, on_cpu("triton"):
        results = evaluate(call, kwargs, leaves)
        for name, x in results.items():
            assert s.unwritten(x) == 0, name
    s.check()
    return Run(results, s.launches)


def check(
    call: Call,
    kwargs: Mapping[str, Any],
    leaves: Sequence[str] = (),
    *,
    order: str = "forward",
    scale: Mapping[str, str | float] | None = None,
) -> Run:
    """`sanitized`, within the tolerance rule of the fp64 reference.

    scale: {result: magnitude, or the result that has it, of which the floor is a share}: where one number is what is left of terms
    of both signs.
    """
    got = sanitized(call, kwargs, leaves, order)
    with rlhf_fast.use_backend("reference"):
        plain, truth = evaluate(call, kwargs, leaves), evaluate(call, double(dict(kwargs)), leaves)
    for name, x in got.results.items():
        sizes = [_magnitude(truth[name]), *_sizes(truth, (scale or {}).get(name))]
        assert_parity(x, truth[name], plain[name], name, max(sizes))
    return got


def _magnitude(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _sizes(results: Mapping[str, Tensor], of: str | float | None) -> list[float]:
    return [] if of is None else [_magnitude(results[of]) if isinstance(of, str) else of]


def same(a: Run, b: Run) -> bool:
    """Equal to the bit."""
    return a.results.keys() == b.results.keys() and all(torch.equal(a.results[k], b.results[k]) for k in a.results)


def in_every_order(call: Call, kwargs: Mapping[str, Any], leaves: Sequence[str] = ()) -> Run:
    """`sanitized`, with the same bits in whatever order the programs run."""
    first, *others = (sanitized(call, kwargs, leaves, order) for order in ORDERS)
    assert all(same(first, other) for other in others)
    return first


def poisoned(kwargs: Mapping[str, Any], mask: Tensor, value: float, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Copies with `value` wherever an array like the mask is masked."""
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    for k, v in copies.items():
        if isinstance(v, Tensor) and v.is_floating_point() and v.shape == mask.shape and k not in keep:
            v[~mask] = value
    return copies
