"""Layers of a frozen base that compute by our ops on a CPU what they computed before: RMSNorm, the gate of a feed-forward layer,
rotary positions.

None is found by its name. A layer is taken over when it gives on an example what the op gives; its object, its parameters and its
children stay. It computes as before outside of the passes of roles, and wherever the op does not apply (other devices, autocast,
fp64, a weight that trains).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from inspect import Parameter, signature
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast._op import SERVED, served
from rlhf_fast.model.linear import RowPlan, features, is_linear, weight_of
from rlhf_fast.ops.rms_norm import apply as norm_rows
from rlhf_fast.ops.rotary import _rotary as turn
from rlhf_fast.ops.silu_mul import apply as gate_rows
from rlhf_fast.reference.rms_norm import rms_norm as norm_formula
from rlhf_fast.reference.rotary import rotary as rotary_formula
from rlhf_fast.reference.rotary import sample as rotary_sample
from rlhf_fast.reference.silu_mul import silu_mul as gate_formula

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Share of the largest number by which a layer and the formula may differ: a few roundings at other places."""


class _FusedNorm:
    """What turns an RMSNorm into one by the op."""

    plan: RowPlan
    weight: Any
    fused_eps: float
    fused_offset: float

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight: Tensor = self.weight
        other = args or kwargs or weight.dtype is not x.dtype or weight.requires_grad
        if not self.plan.roles or other or not served(x, "rms_norm"):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return norm_rows(x, weight, self.fused_eps, self.fused_offset)


class _FusedGate:
    """What turns a feed-forward layer down(silu(gate(x)) up(x)) into one by the op."""

    plan: RowPlan
    fused_names: tuple[str, str, str]
    """Names of the children gate, up and down."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.plan.roles or args or kwargs or not served(x, "silu_mul"):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        gate, up, down = (getattr(self, name) for name in self.fused_names)
        return down(gate_rows(gate(x), up(x)))


class _FusedRotary:
    """What turns an attention into one whose rotary positions are the op's."""

    plan: RowPlan
    fused_forward: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.plan.roles:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self.fused_forward(*args, **kwargs)


_fused: dict[tuple[type[nn.Module], type], type[nn.Module]] = {}


def fuse(module: nn.Module, plan: RowPlan) -> None:
    """Take over, in place, every layer inside `module` that an op computes, for the passes of this plan.

    Does nothing to a layer that is taken over already, or whose weights are not on the CPU.
    """
    for layer in list(module.modules()):
        if "forward" in layer.__dict__ or isinstance(layer, (_FusedNorm, _FusedGate, _FusedRotary)):
            continue
        tensors = [*layer.parameters(), *layer.buffers()]
        if not tensors or any(not t.is_cpu or type(t) is not nn.Parameter for t in layer.parameters()):
            continue
        norm = _norm_of(layer)
        if norm is not None:
            layer.fused_eps, layer.fused_offset = norm  # type: ignore[assignment]
            _become(layer, plan, _FusedNorm)
        elif (names := _gate_of(layer)) is not None:
            layer.fused_names = names  # type: ignore[assignment]
            _become(layer, plan, _FusedGate)
        elif (forward := _with_our_rotary(type(layer))) is not None:
            _become(layer, plan, _FusedRotary, {"fused_forward": forward})


def _become(layer: nn.Module, plan: RowPlan, mixin: type, members: dict[str, Any] | None = None) -> None:
    kind = type(layer)
    if (kind, mixin) not in _fused:
        _fused[kind, mixin] = type(f"Fused{kind.__name__}", (mixin, kind), dict(members or {}))
    layer.__class__ = _fused[kind, mixin]
    layer.plan = plan  # type: ignore[assignment]


def _same(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype is not expected.dtype:
        return False
    scale = float(expected.float().abs().max())
    return bool(((found - expected).float().abs() <= _TOLERANCE[expected.dtype] * scale).all())


def _example(*shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) + 0.5).to(like.dtype)


@torch.no_grad()
def _norm_of(layer: nn.Module) -> tuple[float, float] | None:
    """(eps, offset) of an RMSNorm; None for another layer."""
    weights = dict(layer.named_parameters())
    if list(weights) != ["weight"] or weights["weight"].dim() != 1 or weights["weight"].dtype not in SERVED:
        return None
    weight = weights["weight"]
    x = _example(2, len(weight), like=weight)
    for eps in {value for value in vars(layer).values() if isinstance(value, float) and 0.0 <= value < 0.1}:
        # Of the size of eps too, or any eps would do.
        examples = [x, x * max(eps, 1e-12) ** 0.5]
        for offset in (0.0, 1.0):
            expected = [norm_formula(example, weight, eps, offset) for example in examples]
            if all(_same(_tried(layer, example), y) for example, y in zip(examples, expected, strict=True)):
                return eps, offset
    return None


@torch.no_grad()
def _gate_of(layer: nn.Module) -> tuple[str, str, str] | None:
    """Names of (gate, up, down) in a feed-forward layer; None for another layer."""
    linears = {name: child for name, child in layer.named_children() if is_linear(child)}
    if len(linears) != 3 or sum(1 for _ in layer.parameters()) != sum(
        1 for m in linears.values() for _ in m.parameters()
    ):
        return None
    (width, count), *_ = Counter(features(child)[0] for child in linears.values()).most_common()
    weight = weight_of(next(iter(linears.values())))
    if count < 2 or weight.dtype not in SERVED:
        return None
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # input and output
    handles = [
        child.register_forward_hook(lambda _, args, y, name=name: seen.__setitem__(name, (args[0], y)))
        for name, child in linears.items()
    ]
    try:
        x = _example(2, width, like=weight)
        y = _tried(layer, x)
    finally:
        for handle in handles:
            handle.remove()
    if y is None or len(seen) != 3:
        return None
    outer = [name for name, (given, _) in seen.items() if given is x]
    inner = [name for name in seen if name not in outer]
    if len(outer) != 2 or len(inner) != 1 or not _same(y, seen[inner[0]][1]):
        return None
    for gate, up in (outer, outer[::-1]):
        if _same(seen[inner[0]][0], gate_formula(seen[gate][1], seen[up][1])):
            return gate, up, inner[0]
    return None


def _tried(layer: nn.Module, x: Tensor) -> Any:
    """What a layer makes of x, or None when it wants something else."""
    try:
        return layer(x)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None


def _with_our_rotary(kind: type[nn.Module]) -> Any:
    """The forward of a class with our rotary positions in the place of the function of its module that computes them; or None.

    The class and its module stay as they are: the code is the same, and looks the name up in a namespace of its own.
    """
    forward = kind.forward
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    for name in forward.__code__.co_names:
        found = forward.__globals__.get(name)
        if isinstance(found, FunctionType) and _turns(found):
            own = FunctionType(
                forward.__code__,
                {**forward.__globals__, name: _turning(found)},
                forward.__name__,
                forward.__defaults__,
                forward.__closure__,
            )
            own.__kwdefaults__, own.__doc__ = forward.__kwdefaults__, forward.__doc__
            own.__annotations__, own.__qualname__ = forward.__annotations__, forward.__qualname__
            return own
    return None


def _turns(function: Callable[..., Any]) -> bool:
    """Whether a function of (query, key, cosine, sine) is rotary positions by halves."""
    kinds = [p for p in signature(function).parameters.values() if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    if len(kinds) < 4 or any(p.default is not Parameter.empty for p in kinds[:4]):
        return False
    if any(p.default is Parameter.empty for p in kinds[4:]):
        return False
    x = tuple(rotary_sample(2, 3, 2, 1, 8).values())
    try:
        found = function(*x)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    expected = rotary_formula(*x)
    return isinstance(found, tuple) and len(found) == 2 and all(map(_same, found, expected))


def _turning(original: Callable[..., Any]) -> Callable[..., Any]:
    def rotary(query: Any, key: Any, cosine: Any, sine: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not all(_alike(query, x) for x in (key, cosine, sine)) or not served(query, "rotary"):
            return original(query, key, cosine, sine, *args, **kwargs)
        return turn(query, key, cosine, sine)

    return rotary


def _alike(query: Any, x: Any) -> bool:
    """Whether the op takes x beside the queries (B, heads, T, D): keys of that shape, or a table (B or 1, T, D)."""
    if not isinstance(query, Tensor) or not isinstance(x, Tensor) or x.dtype is not query.dtype or query.dim() != 4:
        return False
    if x.shape[-2:] != query.shape[-2:]:
        return False
    return len(x) == len(query) if x.dim() == 4 else len(x) in (1, len(query)) and x.dim() == 3 and not x.requires_grad


def fused(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, what) of every layer that was taken over: "rms_norm", "silu_mul" or "rotary"."""
    ops = {_FusedNorm: "rms_norm", _FusedGate: "silu_mul", _FusedRotary: "rotary"}
    for name, layer in module.named_modules():
        for mixin, op in ops.items():
            if isinstance(layer, mixin):
                yield name, op
