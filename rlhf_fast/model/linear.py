"""Frozen linear layers whose row blocks pass through the adapters of different roles, by the op `lora_linear`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.model.lora import LoraPair, LowRank
from rlhf_fast.ops.lora_linear import apply
from rlhf_fast.reference.lora_linear import segments


class RowPlan:
    """Roles of the rows of the current pass: equal blocks in this order; no role means the bare base.

    One plan is shared by all adapted layers of a model. It is per-model state: one pass at a time.
    """

    def __init__(self) -> None:
        self.roles: tuple[str, ...] = ()

    @contextmanager
    def use(self, roles: Sequence[str]) -> Iterator[None]:
        """Set the blocks inside the context and restore the earlier ones on leaving it, also on an error."""
        before, self.roles = self.roles, tuple(roles)
        try:
            yield
        finally:
            self.roles = before


class _RoleAdapters:
    """What turns a linear layer into an adapted one. The adapters lie in a plain dict, outside the base's
    parameters and state dict, so the base still saves and loads as the model it is."""

    plan: RowPlan
    pairs: dict[str, LoraPair]
    weight: Any
    bias: Any
    transposed = False

    def forward(self, x: Tensor) -> Tensor:
        roles = self.plan.roles
        if not roles:
            return super().forward(x)  # type: ignore[misc]
        weight: Tensor = self.weight.t() if self.transposed else self.weight
        bias: Tensor | None = self.bias
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # shapes alone have no autocast
            dtype = torch.get_autocast_dtype(device)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        a, b, lora_input, scales, bounds, ranks = self._adapters(x, roles)
        return apply(x, weight, a, b, lora_input, bias, scales, bounds, ranks)

    def _adapters(self, x: Tensor, roles: Sequence[str]) -> tuple[Any, ...]:
        """(A, B, what they read instead of x, scales, bounds, ranks) of the segments of x, as lora_linear has them."""
        rows = x.shape[:-1].numel()
        if rows % len(roles):
            raise ValueError(f"{type(self).__name__}: got {rows} rows, expected equal blocks for the roles {roles}")
        size = rows // len(roles)
        active = [(i, self.pairs[role]) for i, role in enumerate(roles) if role in self.pairs]
        if len(active) == 1:
            factors: tuple[Tensor, Tensor] = (active[0][1].lora_A, active[0][1].lora_B)
        elif active:
            factors = torch.cat([p.lora_A for _, p in active]), torch.cat([p.lora_B for _, p in active], dim=1)
        else:
            in_features, out_features = features(self)  # type: ignore[arg-type]
            factors = x.new_empty(0, in_features), x.new_empty(out_features, 0)
        bounds = [bound for i, _ in active for bound in (i * size, (i + 1) * size)]
        scales, ranks = [pair.scale for _, pair in active], [pair.lora_A.shape[0] for _, pair in active]
        return *factors, _dropped(x, size, active), scales, bounds, ranks


class _RoleAdaptersBeside(_RoleAdapters):
    """The same for a layer whose weight is no matrix of numbers (quantised): its own product, and the adapters' added to it in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super(_RoleAdapters, self).forward(x)  # type: ignore[misc]
        roles = self.plan.roles
        if not any(role in self.pairs for role in roles):
            return y
        a, b, lora_input, scales, bounds, ranks = self._adapters(x, roles)
        read, rows = (x if lora_input is None else lora_input).reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        parts, done = [], 0
        for scale, segment, places in segments(scales, bounds, ranks):
            low = F.linear(read[segment].float(), a[places].float()) * scale
            update = F.linear(low, b[:, places].float())
            parts += [rows[done : segment.start], (rows[segment].float() + update).to(y.dtype)]
            done = segment.stop
        parts = [part for part in (*parts, rows[done:]) if len(part)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(y.shape)


def _dropped(x: Tensor, size: int, active: Sequence[tuple[int, LoraPair]]) -> Tensor | None:
    """What the adapters of blocks of `size` rows read instead of x: x after their dropout; None without any."""
    rates = {i: pair.dropout for i, pair in active if pair.training and pair.dropout > 0.0}
    if not rates:
        return None
    rows = x.reshape(-1, x.shape[-1])
    blocks = [F.dropout(block, rates.get(i, 0.0), i in rates) for i, block in enumerate(rows.split(size))]
    return torch.cat(blocks).view(x.shape)


class LoraLinear(_RoleAdapters, nn.Linear):
    """nn.Linear with adapters per row block."""


class LoraConv1D(_RoleAdapters, Conv1D):
    """transformers' Conv1D (weight stored as (in, out)) with adapters per row block."""

    transposed = True


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LoraLinear, Conv1D: LoraConv1D}


def is_linear(module: nn.Module) -> bool:
    """True for a layer an adapter could stand on, supported or not."""
    return isinstance(module, (nn.Linear, Conv1D))


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(module, nn.Linear):  # a quantised weight has another shape
        return module.in_features, module.out_features
    rows, columns = weight_of(module).shape
    return rows, columns


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight, typed."""
    return module.weight  # type: ignore[return-value]


def pairs_on(module: nn.Module) -> dict[str, LoraPair]:
    """The adapters standing on a layer, by role; empty for a layer that is not adapted."""
    return getattr(module, "pairs", {})


def is_quantized(module: nn.Module) -> bool:
    """True for a linear layer of bitsandbytes, adapted or not."""
    return isinstance(module, nn.Linear) and any(c.__module__.startswith("bitsandbytes.") for c in type(module).__mro__)


def check_adaptable(name: str, module: nn.Module, fold: bool = False) -> None:
    """Raises TypeError for a layer that does not compute `W x + b`: grouped, a router; ValueError for a fold into a quantised one."""
    if is_quantized(module):
        if not fold:
            return
        expected = "a layer in floating point: fold into the base before it is quantised"
        raise ValueError(f"SharedModel: argument 'fold' got the quantised module {name!r}, expected {expected}")
    if type(module) in _ADAPTED or is_adapted(module) or _is_plain(module):
        return
    raise TypeError(
        f"SharedModel: module {name!r} is a {type(module).__module__}.{type(module).__name__},"
        " expected a layer that computes W x + b; name the layers to adapt in lora.target_modules"
    )


@torch.no_grad()
def _is_plain(module: nn.Module) -> bool:
    """True if a subclass of nn.Linear computes on one row what nn.Linear does."""
    if not isinstance(module, nn.Linear) or module.weight.dim() != 2 or not module.weight.is_floating_point():
        return False
    x = torch.linspace(-1.0, 1.0, module.weight.shape[1]).to(module.weight).unsqueeze(0)
    try:
        y, expected = module(x), F.linear(x, module.weight, module.bias)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-2, atol=1e-2)


def is_adapted(module: nn.Module) -> bool:
    """True for a layer that some model's roles already run through."""
    return isinstance(module, _RoleAdapters)


def is_known(module: nn.Module) -> bool:
    """True for a layer whose class computes `W x + b`, no subclass of it."""
    return type(module) in (nn.Linear, Conv1D)


def adapt(module: nn.Module, plan: RowPlan) -> None:
    """Turn a plain linear layer into an adapted one, in place: same object, same parameters, same names.

    Does nothing to a layer that is one already.
    """
    kind = type(module)
    if is_adapted(module):
        return
    if kind not in _ADAPTED:
        mixin = _RoleAdaptersBeside if is_quantized(module) else _RoleAdapters
        _ADAPTED[kind] = type(f"Lora{kind.__name__}", (mixin, kind), {})
    module.__class__ = _ADAPTED[kind]
    module.plan, module.pairs = plan, {}  # type: ignore[assignment]


def select(linears: Mapping[str, nn.Module], suffixes: Sequence[str] | None) -> list[str]:
    """Names of the layers whose name ends in one of the suffixes (all of them for None).

    Raises ValueError for a suffix without a layer, TypeError for a layer that cannot be adapted.
    """
    if suffixes is None:
        names = list(linears)
    else:
        for suffix in suffixes:
            if not any(_ends_in(name, suffix) for name in linears):
                available = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
                raise ValueError(
                    f"SharedModel: argument 'lora.target_modules' got {suffix!r}, expected among {available}"
                )
        names = [name for name in linears if any(_ends_in(name, suffix) for suffix in suffixes)]
    for name in names:
        check_adaptable(name, linears[name])
    return names


def _ends_in(name: str, suffix: str) -> bool:
    return f".{name}".endswith(f".{suffix}")


@torch.no_grad()
def fold_into(module: nn.Module, update: LowRank) -> None:
    """W += scale B A, in fp32, stored back in the dtype of W."""
    weight = weight_of(module)
    delta = update.delta().to(weight.device)
    weight.copy_(weight.float() + (delta.t() if isinstance(module, Conv1D) else delta))
