"""Bytes moved, kernels launched and memory held by a formulation, counted on shapes too large to run: `rlhf-fast bench --traffic`.

The formulation runs on "meta" tensors, which have shapes and no data. Every operator that is no view counts as one kernel that
reads each of its inputs once and writes each of its outputs once: a lower bound of what it does on an accelerator. An op of ours
is one operator, which is what its kernel does: every input once, every output once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_fast.bench import peers
from rlhf_fast.bench.cases import token_logprobs
from rlhf_fast.bench.cases.common import backward, leaf

ALLOCATIONS = ("empty", "new_empty", "detach", "lift_fresh", "is_same_size", "_local_scalar_dense", "resize_", "set_")
"""Beginnings of the names of operators that move nothing."""
GATHERS = ("gather", "index_select", "index.", "embedding")
"""Operators that touch only the elements they pick."""


class Traffic(TorchDispatchMode):
    """Counts while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.launches = 0
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        namespace, _, name = func.name().partition("::")
        if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return out  # a view, perhaps of what the caller holds anyway
        for x in outputs:
            self._hold(x)
        if not outputs or (namespace == "aten" and name.startswith(ALLOCATIONS)):
            return out
        written = sum(map(touched, outputs))
        if namespace == "aten" and name.startswith(GATHERS):
            read = written + sum(touched(x) for x in inputs[1:])
        elif namespace == "aten" and name.startswith(("zero_", "fill_")):
            read = 0
        elif namespace == "aten" and name.startswith("copy_"):
            read = sum(touched(x) for x in inputs[1:])
        else:
            read = sum(map(touched, inputs))
        self.read += read
        self.written += written
        self.launches += 1
        return out

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


def touched(x: Tensor) -> int:
    """Distinct bytes of a tensor: an expanded dimension counts once."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


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


def count(name: str, shape: str, call: Callable[[], Any], minimum: int) -> Count:
    """Run `call` on meta tensors and count."""
    with Traffic() as traffic:
        result = call()
    del result
    return Count(name, shape, traffic.read + traffic.written, traffic.launches, traffic.peak, minimum)


def formulations() -> dict[str, token_logprobs.Formulation | str]:
    """What is counted: ours, PyTorch and the peers that are installed, or the reason why not."""
    found: dict[str, token_logprobs.Formulation | str] = {
        "rlhf_fast": token_logprobs.ours,
        "eager": token_logprobs.log_softmax,
        "eager, logsumexp": token_logprobs.logsumexp,
    }
    for name, load, make in (
        # On a GPU TRL has a fused kernel of its own; what is counted is its path in PyTorch, as on every other device.
        ("TRL, PyTorch path", peers.trl_utils, token_logprobs.of_trl),
        ("verl, PyTorch path", peers.verl_functional, token_logprobs.of_verl),
    ):
        module = peers.attempt(load)
        found[name] = module if isinstance(module, str) else make(module)
    return found


def audit(rows: int = 8192, vocab: int = 151936, dtype: torch.dtype = torch.bfloat16) -> list[Count]:
    """Log-prob and entropy, forward and backward, of logits (rows, vocab)."""
    logits = torch.empty(rows, vocab, dtype=dtype, device="meta")
    ids = torch.empty(rows, dtype=torch.int64, device="meta")
    upstream = torch.empty(rows, device="meta")
    size = logits.numel() * dtype.itemsize
    small = rows * (8 + 2 * 4)
    shape = f"[{rows}, {vocab}] {str(dtype).removeprefix('torch.')}"
    counts = []
    for name, formulation in formulations().items():
        if isinstance(formulation, str):
            continue

        def forward(formulation: token_logprobs.Formulation = formulation) -> Any:
            with torch.no_grad():
                return formulation(logits, ids)

        def both(formulation: token_logprobs.Formulation = formulation) -> Any:
            x = leaf(logits)
            backward(formulation(x, ids), (upstream, upstream))
            return x.grad

        counts.append(count(name, f"{shape}, forward", forward, size + small))
        counts.append(count(name, f"{shape}, forward + backward", both, 3 * size + 2 * small))
    return counts


def table(counts: Sequence[Count]) -> str:
    """Markdown."""
    lines = [
        "| log-prob + entropy | | GB moved | of the least | kernels | peak GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in sorted(counts, key=lambda c: (len(c.shape), c.moved)):
        lines.append(
            f"| {c.shape} | {c.name} | {c.moved / 1e9:.2f} | {c.moved / c.minimum:.1f} x | {c.launches:,} | {c.peak / 2**30:.2f} |"
        )
    return "\n".join(lines) + "\n"
