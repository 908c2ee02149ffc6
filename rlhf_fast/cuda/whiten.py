"""Whitening and its adjoint: csrc/cuda/whiten.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.cuda.common import run

MAX_PARTS, MOMENT_DOUBLES, SUM_DOUBLES = 1024, 3, 2
"""The constants of csrc/cuda/ops.h."""


def moments_scratch(x: Tensor) -> Tensor:
    """Memory for the moments of the parts of x."""
    return x.new_empty(MAX_PARTS * MOMENT_DOUBLES, dtype=torch.float64)


def forward(x, mask, shift_mean, unbiased, eps):  # type: ignore[no-untyped-def]
    """Like x."""
    out = torch.empty_like(x)
    run("whiten", x, x, mask, out, moments_scratch(x), x.numel(), shift_mean, unbiased, eps)
    return out


def backward(grad, x, mask, shift_mean, unbiased, eps):  # type: ignore[no-untyped-def]
    """d x."""
    return adjoint(grad.contiguous(), x, mask, shift_mean, unbiased, False, eps)


def adjoint(grad, x, mask, shift_mean, unbiased, floor_variance, eps):  # type: ignore[no-untyped-def]
    """d x; floor_variance: of a whitening by 1 / sqrt(max(var, eps))."""
    out = torch.empty_like(x)
    scratch = x.new_empty(MAX_PARTS * (MOMENT_DOUBLES + SUM_DOUBLES), dtype=torch.float64)
    run("whiten_backward", x, grad, x, mask, out, scratch, x.numel(), shift_mean, unbiased, floor_variance, eps)
    return out
