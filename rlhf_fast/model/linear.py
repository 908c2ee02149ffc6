"""Frozen linear layers whose row blocks pass through the adapters of different roles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from rlhf_fast.model.lora import LoraPair, LowRank


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


class Block(NamedTuple):
    """One row block of a pass that has an adapter."""

    start: int
    stop: int
    scale: float
    dropout: float  # probability; 0 outside train mode


def _rows(x: Tensor, block: Block) -> Tensor:
    """The rows of a block; a slice costs as much as a small product, so the whole is not sliced."""
    return x if x.shape[0] == block.stop - block.start else x[block.start : block.stop]


def _affine(x: Tensor, weight: Tensor, bias: Any, transposed: bool) -> Tensor:
    """The base layer exactly as its own class computes it, so that an idle adapter leaves the same bits."""
    if not transposed:
        return F.linear(x, weight, bias)
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    blocks: Sequence[Block],
    factors: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Output (…, out), the low-rank activations (rows, r) and the dropout masks (rows, in) of each block."""
    y = _affine(x, weight, bias, transposed)
    x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    lows, keeps = [], []
    for i, block in enumerate(blocks):
        a, b = factors[2 * i], factors[2 * i + 1]
        x_block, y_block = _rows(x_rows, block), _rows(y_rows, block)
        keep = None
        if block.dropout > 0.0:
            keep = torch.empty_like(x_block, dtype=torch.bool).bernoulli_(1.0 - block.dropout)
            x_block = x_block * keep / (1.0 - block.dropout)
        if a.dtype is not y.dtype:
            a, b = a.to(y.dtype), b.to(y.dtype)
        low = F.linear(x_block, a)
        # In place on the base output: no second (rows, out) tensor, and B = 0 adds exactly 0.
        y_block.addmm_(low, b.t(), alpha=block.scale)
        lows.append(low)
        keeps.append(keep)
    return y, lows, keeps


class _AdaptedLinear(torch.autograd.Function):
    """`y = W x + b`, plus `scale B A x` on the row blocks; W and b are constants, so only x and the (rows, r)
    activations are kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        blocks: Sequence[Block],
        *factors: Tensor,
    ) -> Tensor:
        y, lows, keeps = _forward(x, weight, bias, transposed, blocks, factors)
        ctx.blocks, ctx.transposed = blocks, transposed
        ctx.save_for_backward(x, weight, *factors, *lows, *keeps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.blocks)
        x, weight, *rest = ctx.saved_tensors
        factors, lows, keeps = rest[: 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        x_rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_rows @ (weight.t() if ctx.transposed else weight)
        grads: list[Tensor | None] = []
        for i, (block, low, keep) in enumerate(zip(ctx.blocks, lows, keeps, strict=True)):
            a, b = factors[2 * i], factors[2 * i + 1]
            needs_a, needs_b = ctx.needs_input_grad[5 + 2 * i : 7 + 2 * i]
            grad_block = _rows(grad_rows, block)
            grad_low = (grad_block @ b.to(grad_block.dtype)).mul_(block.scale)  # (rows, r)
            if grad_x is not None:
                _add_input_grad(_rows(grad_x, block), grad_low, a, keep, block.dropout)
            grad_a = grad_b = None
            if needs_a:
                x_block = _rows(x_rows, block)
                if keep is not None:
                    x_block = x_block * keep / (1.0 - block.dropout)
                grad_a = (grad_low.t() @ x_block).to(a.dtype)
            if needs_b:
                grad_b = (grad_block.t() @ low).to(b.dtype).mul_(block.scale)
            grads += [grad_a, grad_b]
        grad_input = None if grad_x is None else grad_x.view(x.shape)
        return grad_input, None, None, None, None, *grads


def _add_input_grad(out: Tensor, grad_low: Tensor, a: Tensor, keep: Tensor | None, dropout: float) -> None:
    """out (rows, in) += grad_low A, through the dropout mask."""
    a = a.to(out.dtype)
    if keep is None:
        out.addmm_(grad_low, a)
    else:
        out.addcmul_(grad_low @ a, keep.to(out.dtype), value=1.0 / (1.0 - dropout))


class _RoleAdapters:
    """What turns a linear layer into an adapted one. The adapters lie in a plain dict, outside the base's
    parameters and state dict, so the base still saves and loads as the model it is."""

    plan: RowPlan
    pairs: dict[str, LoraPair]
    weight: Any
    bias: Any
    transposed = False

    def forward(self, x: Tensor) -> Tensor:
        roles, pairs = self.plan.roles, self.pairs
        active = [(i, pairs[role]) for i, role in enumerate(roles) if role in pairs]
        if not active:
            return super().forward(x)  # type: ignore[misc]
        rows = x.shape[:-1].numel()
        if rows % len(roles):
            raise ValueError(f"{type(self).__name__}: got {rows} rows, expected equal blocks for the roles {roles}")
        size = rows // len(roles)
        blocks, factors = [], []
        for i, pair in active:
            dropout = pair.dropout if pair.training else 0.0
            blocks.append(Block(i * size, (i + 1) * size, pair.scale, dropout))
            factors += [pair.lora_A, pair.lora_B]
        weight, bias = self.weight, self.bias
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if not torch.is_grad_enabled():
            return _forward(x, weight, bias, self.transposed, blocks, factors)[0]
        return _AdaptedLinear.apply(x, weight, bias, self.transposed, blocks, *factors)


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
    rows, columns = weight_of(module).shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def weight_of(module: nn.Module) -> Tensor:
    """The module's weight, typed."""
    return module.weight  # type: ignore[return-value]


def pairs_on(module: nn.Module) -> dict[str, LoraPair]:
    """The adapters standing on a layer, by role; empty for a layer that is not adapted."""
    return getattr(module, "pairs", {})


def check_adaptable(name: str, module: nn.Module) -> None:
    """Raises TypeError for a layer that does not compute `W x + b`: quantised, grouped, a router."""
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


def adapt(module: nn.Module, plan: RowPlan) -> None:
    """Turn a plain linear layer into an adapted one, in place: same object, same parameters, same names.

    Does nothing to a layer that is one already.
    """
    kind = type(module)
    if is_adapted(module):
        return
    if kind not in _ADAPTED:
        _ADAPTED[kind] = type(f"Lora{kind.__name__}", (_RoleAdapters, kind), {})
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
