"""Whitening (zero mean, unit variance) over the real entries."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check
from rlhf_fast._native import kernel
from rlhf_fast._op import Op, cpp, cuda, no_doubles, reference_backward, triton
from rlhf_fast.reference.whiten import whiten as reference


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over all real entries together (Huang et al. 2024, arXiv 2403.17031, section 3).

    The moments are sums in an order that depends on the size alone, so the bits are the same run after run and for any number of
    threads; around a mean of the numbers themselves (in fp64 on the CPU), so that a mean far from zero costs no digits.

    Args:
        x: (...).
        mask: like x, True = real. Masked entries are never read and give 0.
        shift_mean: False adds the mean back (reward whitening).
        unbiased: variance over n - 1 (TRL, verl) instead of n (OpenAI).
        eps: > 0, added to the variance.

    Returns:
        Like x, fp32 (fp64 for fp64); differentiable towards x. One real entry has variance 0, so it gives 0 (its value
        without shift_mean); no real entry gives zeros.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    if type(x) is not Tensor or x.dtype not in _check.FLOATS:
        _check.floating("whiten", "x", x)
    if mask is not None:
        mask = _check.mask_like("whiten", mask, x, "x")
    eps = _check.number("whiten", "eps", eps, 0.0, open_low=True)
    if x.dtype is not torch.float32 or not x.is_contiguous():
        x = _check.wide(x)
    return _whiten(x, mask, bool(shift_mean), bool(unbiased), eps)


def _forward(x, mask, shift_mean, unbiased, eps):  # type: ignore[no-untyped-def]
    out = _buffers.empty_like(x)
    kernel("whiten")(
        x,
        mask,
        out,
        x.numel(),
        shift_mean,
        unbiased,
        eps,
        x.dtype is torch.float64,
        torch.get_num_threads(),
    )
    return out


def _backward_cpp(grad, x, mask, shift_mean, unbiased, eps):  # type: ignore[no-untyped-def]
    grad = grad.contiguous()
    grad_x = _buffers.empty_like(x)
    kernel("whiten_backward")(
        grad,
        x,
        mask,
        grad_x,
        x.numel(),
        shift_mean,
        unbiased,
        False,
        eps,
        x.dtype is torch.float64,
        torch.get_num_threads(),
    )
    return grad_x


def _backward_reference(grad, x, mask, shift_mean, unbiased, eps):  # type: ignore[no-untyped-def]
    return reference_backward(reference, (x, mask, shift_mean, unbiased, eps), (0,), (grad,))[0]


_whiten_backward = Op(
    "whiten_backward",
    "(Tensor grad, Tensor x, Tensor? mask, bool shift_mean, bool unbiased, float eps) -> Tensor",
    reference=_backward_reference,
    fake=lambda grad, x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    backends=[cuda("whiten", "backward", no_doubles), triton("whiten", "backward", no_doubles), cpp(_backward_cpp)],
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, mask, *ctx.rest = inputs
    ctx.save_for_backward(x, mask)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return _whiten_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


_whiten = Op(
    "whiten",
    "(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, float eps) -> Tensor",
    reference=reference,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    backends=[cuda("whiten", "forward", no_doubles), triton("whiten", "forward", no_doubles), cpp(_forward)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0,),
)
