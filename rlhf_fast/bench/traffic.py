"""Bytes moved, kernels launched, memory held and products computed by a formulation, counted on tensors without data.

The formulation runs on "meta" tensors, which have shapes and no data. Every operator that is no view counts as one kernel that
reads each of its inputs once and writes each of its outputs once, gathers and scatters only the elements they pick: a lower bound
of what it does on an accelerator. Where a branch asks for data, every condition is false and every element is picked.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALLOCATIONS = ("empty", "new_empty", "detach", "lift_fresh", "is_same_size", "resize_", "set_")
"""Beginnings of the names of operators that move nothing."""
FILLS = ("zero", "ones", "full", "fill_", "new_zeros", "new_ones", "new_full")
"""Beginnings of the names of operators that read nothing."""
GATHERS = ("gather", "index_select", "index", "embedding")
SCATTERS = ("scatter_", "scatter_add_", "index_put_", "index_add_", "index_copy_")
"""Operators that touch only the elements they pick."""
ADDING = ("scatter_add_", "index_add_")
"""Those that always read what they write."""
FRESH = ("scatter_add", "index_add", "index_put")
"""What autograd does to fresh zeros, in place but for the time that a mode like this one is active."""


class Traffic(TorchDispatchMode):
    """Counts while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.launches = self.flops = 0
        self.live = self.peak = 0
        self.inside: dict[str, Callable[..., Any]] = {}
        """Operators that are compositions, by name, and the function whose operators are counted in their place."""
        self._sizes: dict[int, int] = {}
        self._filled = 0
        """The storage that the last kernel filled."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, known = kwargs or {}, _operator(func)
        name = known.name
        if name in self.inside:
            with self:
                return self.inside[name](*args, **kwargs)
        if name in FRESH and args[0].untyped_storage()._cdata == self._filled:
            func = getattr(torch.ops.aten, f"{name}_").default
            known, name = _operator(func), f"{name}_"
        if name in ("_local_scalar_dense", "is_nonzero") and (args[0].is_meta or isinstance(args[0], FakeTensor)):
            return False
        if name == "nonzero" and args[0].is_meta:
            out = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        if known.view:
            return out
        inputs = tensors((args, {k: v for k, v in kwargs.items() if k not in known.results} if kwargs else None))
        outputs = tensors(out)
        if not known.writes and outputs and _only_looks(inputs, outputs):
            return out
        for x in outputs:
            self._hold(x)
        if not outputs or name.startswith(ALLOCATIONS):
            return out
        read, written = sum(map(touched, inputs)), sum(map(touched, outputs))
        if name in GATHERS:
            read = written + sum(map(touched, inputs[1:]))
        elif name in SCATTERS:
            read, written = _scattered(inputs, name in ADDING or (name == "index_put_" and args[-1] is True))
        elif name.startswith(FILLS):
            read = 0
        elif name == "copy_":
            read = sum(map(touched, inputs[1:]))
        self._filled = outputs[0].untyped_storage()._cdata if name.startswith(FILLS) else 0
        self.add(read, written, 0 if known.flops is None else int(known.flops(*args, **kwargs, out_val=out)))
        return out

    def kernel(self, read: Sequence[Tensor], written: Sequence[Tensor], flops: int = 0) -> None:
        """Count one kernel that no operator stands for."""
        self.add(sum(map(touched, read)), sum(map(touched, written)), flops)

    def add(self, read: int, written: int, flops: int = 0) -> None:
        self.read += read
        self.written += written
        self.flops += flops
        self.launches += 1

    def _hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among the leaves."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def touched(x: Tensor) -> int:
    """Distinct bytes of a tensor: an expanded dimension counts once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


class _Operator(NamedTuple):
    """What the schema of an operator tells."""

    name: str
    """Without "aten::"."""
    view: bool
    writes: bool
    """To an argument."""
    results: frozenset[str]
    """Names of the arguments that are only written."""
    flops: Callable[..., int] | None


@functools.cache
def _operator(func: Any) -> _Operator:
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    packets = (func._overloadpacket, getattr(torch.ops.aten, name.rstrip("_"), None))  # the second for those in place
    return _Operator(
        name,
        any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns),
        schema.is_mutable,
        frozenset(a.name for a in schema.arguments if a.is_out),
        next((flop_registry[p] for p in packets if p in flop_registry), None),
    )


def _only_looks(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether the results are views, which some schemas do not say."""
    held = {x.untyped_storage()._cdata for x in inputs}
    return all(x.untyped_storage()._cdata in held for x in outputs)


def _scattered(inputs: Sequence[Tensor], accumulated: bool) -> tuple[int, int]:
    """(read, written) of a scatter into inputs[0]; the rest are indices and values."""
    written = max((x.numel() for x in inputs[1:]), default=0) * inputs[0].element_size()
    return sum(map(touched, inputs[1:])) + (written if accumulated else 0), written


@dataclass(frozen=True)
class Count:
    """Of one formulation at one shape."""

    name: str
    shape: str
    moved: int
    launches: int
    peak: int
    """Bytes of live results, the inputs not counted."""
    minimum: int
    """Bytes that any formulation has to move: each input once, each result once."""
    flops: int = 0
    """Of matrix products."""

    @property
    def ratio(self) -> float:
        """Bytes over the least."""
        return self.moved / self.minimum


def count(
    name: str,
    shape: str,
    call: Callable[[], Any],
    minimum: int,
    around: Callable[[Traffic], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Count:
    """Run `call` on meta tensors, within `around`, and count."""
    with Traffic() as traffic, around(traffic):
        result = call()
    del result
    moved = traffic.read + traffic.written
    return Count(name, shape, moved, traffic.launches, traffic.peak, minimum, traffic.flops)


def amount(x: float) -> str:
    """Two decimals, or two digits of a small number that they would not show."""
    return f"{x:.2g}" if 0.005 <= x < 0.1 else f"{x:,.2f}"


def table(title: str, counts: Sequence[Count]) -> str:
    """Markdown, one block per shape in the order given, least traffic first; products where all have some."""
    products = all(c.flops for c in counts)
    head = [title, "", "GB moved", "of the least", "kernels", "peak GiB", *(["TFLOP of products"] if products else [])]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    shapes = list(dict.fromkeys(c.shape for c in counts))
    for c in sorted(counts, key=lambda c: (shapes.index(c.shape), c.moved)):
        cells = [c.shape, c.name, amount(c.moved / 1e9), f"{c.ratio:,.2f} x", f"{c.launches:,}"]
        cells += [amount(c.peak / 2**30), *([f"{c.flops / 1e12:.1f}"] if products else [])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
