"""The gate of a SwiGLU feed-forward layer, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._native import DTYPES, kernel
from rlhf_fast._op import Op, cpp, no_doubles, reference_backward
from rlhf_fast.ops.rms_norm import rows_of
from rlhf_fast.reference.silu_mul import silu_mul as reference

OP = "silu_mul"


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, silu(x) = x / (1 + e^-x) (Shazeer 2020, arXiv 2002.05202, eq. 6, before the last product).

    Computed in fp32 and rounded once. The backward keeps the two inputs and nothing else: silu is computed again.

    Args:
        gate: (..., F); its last dimension has stride 1, or is copied.
        up: like gate, any strides of its own.

    Returns:
        (..., F) in the dtype of gate; differentiable towards both.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; names the argument.
    """
    _check.floating(OP, "gate", gate)
    _check.like(OP, "up", up, gate, "gate")
    if gate.dim() < 1:
        raise _check.error(ValueError, OP, "gate", "shape ()", "(..., F)")
    if up.dtype is not gate.dtype:
        raise _check.error(TypeError, OP, "up", up.dtype, f"{gate.dtype} (the dtype of gate)")
    return apply(gate, up)


def apply(gate: Tensor, up: Tensor) -> Tensor:
    """The op on checked arguments."""
    return _silu_mul(gate, up)


def _forward(gate, up):  # type: ignore[no-untyped-def]
    out = torch.empty(gate.shape, dtype=gate.dtype)
    if out.numel():
        g, u = rows_of(gate), rows_of(up)
        kernel(OP)(g, u, out, *g.shape, g.stride(0), u.stride(0), DTYPES[gate.dtype], torch.get_num_threads())
    return out


def _backward_cpp(grad, gate, up):  # type: ignore[no-untyped-def]
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    if gate.numel():
        d, g, u = rows_of(grad), rows_of(gate), rows_of(up)
        kernel(f"{OP}_backward")(
            d, g, u, grad_gate, grad_up, *g.shape, d.stride(0), g.stride(0), u.stride(0), DTYPES[gate.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
    return grad_gate, grad_up


_silu_mul_backward = Op(
    f"{OP}_backward",
    "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    reference=lambda grad, gate, up: reference_backward(reference, (gate, up), (0, 1), (grad,)),
    fake=lambda grad, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
    backends=[cpp(_backward_cpp, no_doubles)],
    strided=True,
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    found = _silu_mul_backward(grad, *ctx.saved_tensors)
    return tuple(g if want else None for g, want in zip(found, ctx.needs_input_grad, strict=True))


_silu_mul = Op(
    OP,
    "(Tensor gate, Tensor up) -> Tensor",
    reference=reference,
    fake=lambda gate, up: gate.new_empty(gate.shape),
    backends=[cpp(_forward, no_doubles)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0, 1),
    strided=True,
)
