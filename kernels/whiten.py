"""Whitening over the real entries (arXiv 2403.17031, section 3), and its adjoint: two launches each.

The first launch leaves the moments of parts of the array, each program of the second combines all of them, in the same order.
"""

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels.common.launch import on_device
from rlhf_fast.kernels.common.layout import same_order, spread
from rlhf_fast.kernels.common.moments import MAX_PARTS, load_parts, merged, moments_of, scale_of, store_part
from rlhf_fast.kernels.common.scan import mask_at
from torch import Tensor

BLOCK, WARPS = 1024, 4
BLOCKS = 4
"""Blocks of a part while there are less than MAX_PARTS parts: a program of the second launch reads 16 bytes of every part."""


@same_order
def _moments(x, mask, parts, n, size, BLOCK: tl.constexpr):
    part = tl.program_id(0)
    begin = part.to(tl.int64) * size
    count, centre, offset, squares = 0.0, 0.0, 0.0, 0.0
    for i in range(0, size, BLOCK):
        at = begin + i + tl.arange(0, BLOCK)
        real = mask_at(mask, at, at < n)
        m, c, o, q = moments_of(tl.load(x + at, real), real)
        count, centre, offset, squares = merged(count, centre, offset, squares, m, c, o, q)
    store_part(parts, part, tl.num_programs(0), count, centre, offset, squares)


@same_order
def _standardise(
    x, mask, out, parts, n_parts, n, size, eps,
    SHIFT: tl.constexpr, UNBIASED: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * size
    count, centre, offset, squares = load_parts(parts, n_parts, PARTS)
    _, scale, _ = scale_of(count, squares, eps, UNBIASED, FLOOR)
    for i in range(0, size, BLOCK):
        at = begin + i + tl.arange(0, BLOCK)
        real = mask_at(mask, at, at < n)
        y = ((tl.load(x + at, real) - centre) - offset) * scale
        if not SHIFT:
            y += centre + offset
        tl.store(out + at, tl.where(real, y, 0.0), at < n)


@same_order
def _moments_and_products(x, grad, mask, parts, n, size, BLOCK: tl.constexpr):
    """Moments of x, sum of the upstream gradient, and sum of its products with x - centre."""
    part = tl.program_id(0)
    n_parts = tl.num_programs(0)
    begin = part.to(tl.int64) * size
    count, centre, offset, squares = 0.0, 0.0, 0.0, 0.0
    total, dot = 0.0, 0.0
    for i in range(0, size, BLOCK):
        at = begin + i + tl.arange(0, BLOCK)
        real = mask_at(mask, at, at < n)
        value = tl.load(x + at, real, other=0.0)
        upstream = tl.load(grad + at, real, other=0.0)
        m, c, o, q = moments_of(value, real)
        count, centre, offset, squares = merged(count, centre, offset, squares, m, c, o, q)
        dot += tl.sum(upstream * (value - centre), 0)  # the first centre stays
        total += tl.sum(upstream, 0)
    store_part(parts, part, n_parts, count, centre, offset, squares)
    tl.store(parts + 4 * n_parts + part, total)
    tl.store(parts + 5 * n_parts + part, dot)


@same_order
def _adjoint(
    x, grad, mask, grad_x, parts, n_parts, n, size, eps,
    SHIFT: tl.constexpr, UNBIASED: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y = (x - mu) s + shift: dx = s (g - mean g) - s^3 (x - mu) sum(g (x - mu)) / divisor, + mean g without SHIFT.

    With a variance below the floor the scale is a constant and the middle term vanishes.
    """
    begin = tl.program_id(0).to(tl.int64) * size
    count, centre, offset, squares = load_parts(parts, n_parts, PARTS)
    divisor, scale, floored = scale_of(count, squares, eps, UNBIASED, FLOOR)
    lane = tl.arange(0, PARTS)
    there = lane < n_parts
    some = tl.load(parts + lane, there, other=0.0) > 0
    part_centre = tl.load(parts + n_parts + lane, there)
    total = tl.load(parts + 4 * n_parts + lane, there, other=0.0)
    dots = tl.load(parts + 5 * n_parts + lane, there)
    dot = tl.sum(tl.where(some, dots + total * ((part_centre - centre) - offset), 0.0), 0)
    mean = tl.div_rn(tl.sum(total, 0), tl.maximum(count, 1.0))
    slope = tl.where(floored, 0.0, tl.div_rn(scale * scale * scale * dot, divisor))
    for i in range(0, size, BLOCK):
        at = begin + i + tl.arange(0, BLOCK)
        real = mask_at(mask, at, at < n)
        value = (tl.load(x + at, real) - centre) - offset
        into = scale * (tl.load(grad + at, real) - mean) - slope * value
        if not SHIFT:
            into += mean
        tl.store(grad_x + at, tl.where(real, into, 0.0), at < n)


def parts_of(n: int) -> tuple[int, int]:
    """(number of parts, entries of a part) of n entries: by n alone."""
    size = triton.cdiv(triton.cdiv(n, MAX_PARTS), BLOCK) * BLOCK
    size = max(size, BLOCKS * BLOCK)
    return triton.cdiv(n, size), size


def standardise(
    x: Tensor,
    mask: Tensor | None,
    out: Tensor,
    parts: Tensor,
    shift_mean: bool,
    unbiased: bool,
    floor: bool,
    eps: float,
) -> None:
    """out = the whitened x, which it may be, from the moments (4, P) of parts of the real ones."""
    n = x.numel()
    programs, size = parts_of(n)
    _standardise[(programs,)](
        x, mask, out, parts, parts.shape[1], n, size, eps,
        shift_mean, unbiased, floor, BLOCK, triton.next_power_of_2(parts.shape[1]), **spread(WARPS),
    )  # fmt: skip


def forward(x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float) -> Tensor:
    """14 bytes an entry with a mask, of which 4 written: two passes over x."""
    out = torch.empty_like(x)
    n = x.numel()
    if n:
        count, size = parts_of(n)
        parts = x.new_empty(4, count)
        with on_device(x):
            _moments[(count,)](x, mask, parts, n, size, BLOCK, **spread(WARPS))
            standardise(x, mask, out, parts, shift_mean, unbiased, False, eps)
    return out


def adjoint(
    grad: Tensor, x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, floor: bool, eps: float
) -> Tensor:
    """The gradient of x; 22 bytes an entry with a mask, of which 4 written: two passes over x and the upstream gradient."""
    grad = grad.contiguous()
    grad_x = torch.empty_like(x)
    n = x.numel()
    if n:
        count, size = parts_of(n)
        parts = x.new_empty(6, count)
        with on_device(x):
            _moments_and_products[(count,)](x, grad, mask, parts, n, size, BLOCK, **spread(WARPS))
            _adjoint[(count,)](
                x, grad, mask, grad_x, parts, count, n, size, eps,
                shift_mean, unbiased, floor, BLOCK, triton.next_power_of_2(count), **spread(WARPS),
            )  # fmt: skip
    return grad_x


def backward(grad: Tensor, x: Tensor, mask: Tensor | None, shift_mean: bool, unbiased: bool, eps: float) -> Tensor:
    """`adjoint` without a floor of the variance."""
    return adjoint(grad, x, mask, shift_mean, unbiased, False, eps)
