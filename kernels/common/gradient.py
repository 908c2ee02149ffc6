"""The gradient of a row of logits away from the target, tile by tile."""

import triton
import triton.language as tl
from rlhf_fast.kernels.common.softmax import capped, slope_of, widened


@triton.jit
def _gradient(
    x,
    xr,
    softcap,
    scale2,
    offset,
    ref_base,
    constant,
    slope,
    by_gap,
    CAP: tl.constexpr,
    MIXED: tl.constexpr,
    REF: tl.constexpr,
):
    """Of a tile away from the target. REF: from u and v, `offset` being the largest logit, else from d. MIXED: entropy or KL take
    part; `slope` is the derivative of the weight by u or d."""
    y = capped(x, softcap, CAP)
    if REF:
        d = y - offset
        e = tl.exp2(d * scale2)
    else:
        d = tl.fma(y, scale2, -offset)
        e = tl.exp2(d)
    if MIXED:
        weight = tl.fma(slope, d, constant)
        if REF:
            weight = tl.fma(by_gap, d - (capped(xr, softcap, CAP) - ref_base), weight)
        found = tl.where(e == 0.0, 0.0, e * weight)  # the weight of a dead class may be infinite
    else:
        found = e * constant
    return found * slope_of(x, softcap, CAP)


@triton.jit
def write_row(
    z,
    r,
    out,
    vocab,
    softcap,
    scale2,
    offset,
    ref_base,
    constant,
    slope,
    by_gap,
    CAP: tl.constexpr,
    MIXED: tl.constexpr,
    REF: tl.constexpr,
    LANES: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    tile: tl.constexpr = 2 * LANES if REF else 4 * LANES  # registers for two rows
    columns = tl.arange(0, tile)
    whole = vocab // tile * tile
    for start in range(0, whole, tile):
        x = widened(tl.load(z + start + columns))
        xr = widened(tl.load(r + start + columns)) if REF else x
        found = _gradient(x, xr, softcap, scale2, offset, ref_base, constant, slope, by_gap, CAP, MIXED, REF)
        tl.store(out + start + columns, found.to(dtype))
    for start in range(whole, vocab, LANES):
        lanes = start + tl.arange(0, LANES)
        x = tl.load(z + lanes, mask=lanes < vocab).to(tl.float32)
        xr = tl.load(r + lanes, mask=lanes < vocab).to(tl.float32) if REF else x
        found = _gradient(x, xr, softcap, scale2, offset, ref_base, constant, slope, by_gap, CAP, MIXED, REF)
        tl.store(out + lanes, found.to(dtype), mask=lanes < vocab)
