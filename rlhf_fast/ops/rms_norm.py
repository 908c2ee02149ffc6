"""Root mean square layer normalisation under a frozen weight, in one pass over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._native import DTYPES, kernel
from rlhf_fast._op import Op, cpp, no_doubles, reference_backward
from rlhf_fast.reference.rms_norm import rms_norm as reference

OP = "rms_norm"


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) (w + offset) along the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4).

    Computed in fp32 and rounded once, where a chain of PyTorch's operators rounds before the weight too. A row has the same bits in
    any batch.

    Args:
        x: (..., H); its last dimension has stride 1, or is copied.
        weight: (H,) in the dtype of x. A constant: it is frozen.
        eps: number >= 0.
        offset: added to the weight; 1 for models that store the weight less 1 (Gemma).

    Returns:
        (..., H) in the dtype of x; differentiable towards x.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, a weight that requires a gradient; names the argument.
    """
    _check.floating(OP, "x", x)
    _check.floating(OP, "weight", weight)
    _check.device(OP, "weight", weight, x, "x")
    if x.dim() < 1 or x.shape[-1] == 0:
        raise _check.error(ValueError, OP, "x", f"shape {tuple(x.shape)}", "(..., H) with H > 0")
    _check.shape(OP, "weight", weight, (x.shape[-1],), "the last dimension of x")
    if weight.dtype is not x.dtype:
        raise _check.error(TypeError, OP, "weight", weight.dtype, f"{x.dtype} (the dtype of x)")
    if weight.requires_grad:
        raise _check.error(ValueError, OP, "weight", "requires_grad=True", "a frozen one: it gets no gradient")
    return apply(x, weight, _check.number(OP, "eps", eps, 0.0), _check.number(OP, "offset", offset))


def apply(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """The op on checked arguments, as its schema has them."""
    return _rms_norm(x, weight, eps, offset)[0]


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, width) with a last stride of 1: a view where its strides allow."""
    x = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _forward(x, weight, eps, offset):  # type: ignore[no-untyped-def]
    rows = rows_of(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty(len(rows), dtype=torch.float32)
    kernel(OP)(
        rows, weight.contiguous(), y, rstd, *rows.shape, rows.stride(0), eps, offset, DTYPES[x.dtype], torch.get_num_threads()
    )  # fmt: skip
    return y, rstd


def _backward_cpp(grad, x, weight, rstd, eps, offset):  # type: ignore[no-untyped-def]
    rows, upstream = rows_of(x), rows_of(grad)
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    kernel(f"{OP}_backward")(
        upstream, rows, weight.contiguous(), rstd, grad_x, *rows.shape, upstream.stride(0), rows.stride(0), offset,
        DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return grad_x


_rms_norm_backward = Op(
    f"{OP}_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, float eps, float offset) -> Tensor",
    reference=lambda grad, x, weight, rstd, eps, offset: reference_backward(
        reference, (x, weight, eps, offset), (0,), (grad,)
    )[0],
    fake=lambda grad, x, *rest: x.new_empty(x.shape),
    backends=[cpp(_backward_cpp, no_doubles)],
    strided=True,
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None
    return _rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.offset), None, None, None


def _kept(x: Tensor) -> Tensor:
    """Place for 1 / sqrt(mean(x^2) + eps) of every row."""
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


_rms_norm = Op(
    OP,
    "(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
    reference=lambda *args: (reference(*args), _kept(args[0]).zero_()),
    fake=lambda x, *rest: (x.new_empty(x.shape), _kept(x)),
    backends=[cpp(_forward, no_doubles)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0,),
    strided=True,
)
