"""The frozen linear layers of a base for the time of a rollout: weights in panels, adapters in the same sums.

A decode step multiplies a few rows by every weight of the model, so what counts is how weights are read. Packed once, they are
read in order and need no rearrangement in each call; layers with the same input are one product; and the low-rank update of the
sampling role adds to the sums before they are rounded. Every element is summed over k in an order that depends on k alone: a row
has the same bits in any batch, which the products of PyTorch's CPU libraries do not promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast import _buffers, _native
from rlhf_fast.model.linear import features, is_adapted, pairs_on, weight_of
from rlhf_fast.ops._matmul import native

COLUMNS = 32
"""Columns of a panel (kPackedColumns of csrc/cpu/ops.h)."""
SHARED_PRODUCTS = 2**20
"""Multiplications below which a second thread costs more than it saves: some 5 us."""
CROWDED = 1024
"""Bytes: rows that are multiples of it apart share few places in the caches, and are spread before a product."""


def packable(weight: Tensor) -> bool:
    """Whether the kernel multiplies by this weight."""
    if weight.device.type != "cpu" or weight.dim() != 2 or not native(torch.float32):
        return False
    if weight.dtype is torch.bfloat16:
        module, _ = _native.load()
        return module is not None and module.isa() == "avx512bf16"
    return weight.dtype is torch.float32


class Panels:
    """A weight (n, k), or several below each other, packed; `multiply` is x W^T with what a rollout adds to it."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.k = weights[0].shape[1]
        self.n = sum(w.shape[0] for w in weights)
        self.dtype = weights[0].dtype
        self.unit = 2 if self.dtype is torch.bfloat16 else 1  # elements of k in 32 bits
        depth = -(-self.k // self.unit)
        if any(w.shape[0] % COLUMNS for w in weights[:-1]):
            weights = [torch.cat(list(weights))]
        panels = -(-self.n // COLUMNS) * COLUMNS
        self.packed = _buffers.empty((panels, depth), torch.float32)
        at = 0
        for w in weights:
            w = w if 1 in w.stride() else w.contiguous()
            _native.kernel("pack_linear")(
                w, self.packed[at:], *w.shape, *w.stride(), _native.DTYPES[w.dtype], torch.get_num_threads()
            )  # fmt: skip
            at += w.shape[0]

    def multiply(
        self,
        x: Tensor,
        dtype: torch.dtype,
        *,
        low: Tensor | None = None,
        up: Panels | None = None,
        bias: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """(m, n) = scale (x W^T + low up^T) + bias in `dtype`, the weight's or fp32; x (m, k) and low (m, r) in the weight's dtype.

        bias: (n,) fp32.
        """
        if x.stride(1) != 1 or x.stride(0) % self.unit or x.dtype is not self.dtype:
            x = x.to(self.dtype, memory_format=torch.contiguous_format).contiguous()
        m = x.shape[0]
        out = torch.empty((m, self.n), dtype=dtype)
        threads = torch.get_num_threads() if m * self.n * self.k >= SHARED_PRODUCTS else 1
        crowded = m > 4 and x.stride(0) * x.element_size() % CROWDED == 0
        spread = torch.empty((m, self.k + 2 * COLUMNS), dtype=self.dtype) if crowded else None
        _native.kernel("packed_linear")(
            x, self.packed, low, None if up is None else up.packed, bias, out, spread,
            m, self.n, self.k, 0 if low is None else low.shape[1], x.stride(0), self.n, scale,
            _native.DTYPES[self.dtype], _native.DTYPES[dtype], threads,
        )  # fmt: skip
        return out


@dataclass
class Group:
    """Linear layers that read the same input, as one product."""

    modules: Sequence[nn.Module]
    panels: Panels
    bias: Tensor | None
    down: Panels | None = None
    """The A of the members' adapters below each other."""
    up: Panels | None = None
    """Their B as blocks of a matrix (n, all ranks)."""
    scale: float = 1.0
    """Of the low-rank activations."""
    waiting: dict[int, Tensor] = field(default_factory=dict)
    """Results that members have yet to ask for, with `last` the input they belong to."""
    last: Tensor | None = None

    def forward(self, i: int) -> Callable[[Tensor], Tensor]:
        """The forward of member i."""
        if len(self.modules) == 1:
            return self._product

        starts, at = [], 0
        for module in self.modules:
            starts.append((at, features(module)[1]))
            at += features(module)[1]

        def forward(x: Tensor) -> Tensor:
            if x is not self.last or i not in self.waiting:
                out = self._product(x)
                self.last = x
                self.waiting = {j: out.narrow(-1, *part) for j, part in enumerate(starts)}
            result = self.waiting.pop(i)
            if not self.waiting:
                self.last = None
            return result

        return forward

    def _product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = None
        if self.down is not None:
            low = self.down.multiply(rows, self.panels.dtype, scale=self.scale)
        out = self.panels.multiply(rows, self.panels.dtype, low=low, up=self.up, bias=self.bias)
        return out.view(*x.shape[:-1], out.shape[-1])


class PackedBase:
    """The packed linear layers of a base, in groups. Holds a second copy of their weights."""

    def __init__(self, linears: Mapping[str, nn.Module], groups: Sequence[Sequence[str]]) -> None:
        self.groups = []
        for names in groups:
            modules = [linears[name] for name in names]
            weights = [_matrix(module) for module in modules]
            self.groups.append(Group(modules, Panels(weights), _joined_bias(modules)))

    @contextmanager
    def running(self, role: str) -> Iterator[None]:
        """The layers compute from the packed weights, with the role's adapters, inside the context."""
        modules: list[Any] = []
        try:
            for group in self.groups:
                _adapt(group, role)
                for i, module in enumerate(group.modules):
                    module.forward = group.forward(i)  # type: ignore[method-assign]
                    modules.append(module)
            yield
        finally:
            for module in modules:
                del module.forward
            for group in self.groups:
                group.down = group.up = group.last = None
                group.waiting = {}


def can_pack(module: nn.Module) -> bool:
    """Whether a linear layer is one whose forward PackedBase can stand in for."""
    known = type(module) in (nn.Linear, Conv1D) or is_adapted(module)
    weight = weight_of(module)
    even = weight.dtype is not torch.bfloat16 or features(module)[0] % 2 == 0  # pairs are read
    return known and even and packable(weight) and "forward" not in module.__dict__


def _matrix(module: nn.Module) -> Tensor:
    weight = weight_of(module).detach()
    return weight.t() if isinstance(module, Conv1D) else weight


@torch.no_grad()
def _joined_bias(modules: Sequence[nn.Module]) -> Tensor | None:
    found: list[Tensor | None] = [getattr(module, "bias", None) for module in modules]
    if all(bias is None for bias in found):
        return None
    sizes = [features(module)[1] for module in modules]
    return torch.cat([torch.zeros(n) if b is None else b.float() for n, b in zip(sizes, found, strict=True)])


@torch.no_grad()
def _adapt(group: Group, role: str) -> None:
    """Pack the adapters of a role. Factors are rounded to the weight's dtype as in training; the scale is applied to the low-rank
    activations where all members have the same, else to B before it is rounded."""
    pairs = [pairs_on(module).get(role) for module in group.modules]
    present = [pair for pair in pairs if pair is not None]
    if not present:
        return
    alike = len({pair.scale for pair in present}) == 1
    group.scale = present[0].scale if alike else 1.0
    rank = sum(pair.lora_A.shape[0] for pair in present)
    rank += rank % 2  # pairs are read
    dtype = group.panels.dtype
    down = torch.zeros(rank, group.panels.k, dtype=dtype)
    up = torch.zeros(group.panels.n, rank, dtype=dtype)
    row = column = 0
    for module, pair in zip(group.modules, pairs, strict=True):
        n = features(module)[1]
        if pair is not None:
            r = pair.lora_A.shape[0]
            down[column : column + r] = pair.lora_A
            up[row : row + n, column : column + r] = pair.lora_B if alike else pair.lora_B * pair.scale
            column += r
        row += n
    group.down, group.up = Panels([down]), Panels([up])
