"""Mean and variance of the real ones among many numbers, in two levels and a fixed order, without atomics on floats.

A part of the numbers is four fp32 numbers (count, centre, offset, squares): its mean is centre + offset, unevaluated, where the
centre is a rounded mean and the offset what the rounding lost; squares is sum (x - mean)^2. Parts merge as in Chan et al. 1979.
A mean far from zero so costs no digits, and equal numbers have exactly the variance 0.
"""

import triton
import triton.language as tl

MAX_PARTS = 1024
"""Parts that the second level combines in one block."""


@triton.jit
def moments_of(x, real):
    """The part of a block; x is not looked at where it is not `real`."""
    BLOCK: tl.constexpr = x.shape[0]
    lane = tl.arange(0, BLOCK)
    count = tl.sum(real.to(tl.float32), 0)
    some = tl.maximum(count, 1.0)
    first = tl.min(tl.where(real, lane, BLOCK), 0)
    start = tl.sum(tl.where(lane == first, x, 0.0), 0)  # exact, so that equal numbers leave zeros
    centre = start + tl.sum(tl.where(real, x - start, 0.0), 0) / some
    gap = tl.where(real, x - centre, 0.0)
    offset = tl.sum(gap, 0) / some
    rest = tl.where(real, gap - offset, 0.0)
    return count, centre, offset, tl.sum(rest * rest, 0)


@triton.jit
def merged(count, centre, offset, squares, count2, centre2, offset2, squares2):
    """Both parts as one, around the first centre; each may be empty."""
    empty = count == 0
    gap = tl.where(empty | (count2 == 0), 0.0, (centre2 - centre) + (offset2 - offset))
    share = count2 / tl.maximum(count + count2, 1.0)
    return (
        count + count2,
        tl.where(empty, centre2, centre),
        tl.where(empty, offset2, offset + gap * share),
        squares + squares2 + gap * gap * count * share,
    )


@triton.jit
def pooled(count, centre, offset, squares):
    """One part from a block of parts."""
    BLOCK: tl.constexpr = count.shape[0]
    lane = tl.arange(0, BLOCK)
    some = count > 0
    first = tl.min(tl.where(some, lane, BLOCK), 0)
    total = tl.sum(count, 0)
    base = tl.sum(tl.where(lane == first, centre, 0.0), 0)
    mean = tl.where(some, (centre - base) + offset, 0.0)
    shift = tl.div_rn(tl.sum(count * mean, 0), tl.maximum(total, 1.0))
    gap = tl.where(some, mean - shift, 0.0)
    return total, base, shift, tl.sum(squares + count * gap * gap, 0)


@triton.jit
def store_part(parts, part, n_parts, count, centre, offset, squares):
    """parts: (4, n_parts)."""
    tl.store(parts + part, count)
    tl.store(parts + n_parts + part, centre)
    tl.store(parts + 2 * n_parts + part, offset)
    tl.store(parts + 3 * n_parts + part, squares)


@triton.jit
def load_parts(parts, n_parts, BLOCK: tl.constexpr):
    """`pooled` of all parts (4, n_parts); BLOCK >= n_parts."""
    lane = tl.arange(0, BLOCK)
    there = lane < n_parts
    return pooled(
        tl.load(parts + lane, there, other=0.0),
        tl.load(parts + n_parts + lane, there),
        tl.load(parts + 2 * n_parts + lane, there),
        tl.load(parts + 3 * n_parts + lane, there, other=0.0),
    )


@triton.jit
def scale_of(count, squares, eps, UNBIASED: tl.constexpr, FLOOR: tl.constexpr):
    """(divisor of the variance, 1 / standard deviation, whether the variance is below the floor).

    UNBIASED: over count - 1. FLOOR: max(var, eps) instead of var + eps.
    """
    divisor = tl.maximum(count - 1.0, 1.0) if UNBIASED else tl.maximum(count, 1.0)
    variance = tl.div_rn(squares, divisor)
    floored = variance < eps
    if FLOOR:
        variance = tl.where(floored, eps, variance)
    else:
        floored = variance != variance
        variance = variance + eps
    return divisor, tl.div_rn(1.0, tl.sqrt_rn(variance)), floored
