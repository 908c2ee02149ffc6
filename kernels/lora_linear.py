"""The low-rank part of a linear layer with adapters, of all segments of rows at once (Hu et al. 2021, arXiv 2106.09685, eq. 3).

The product with the weight is PyTorch's. Two launches add the rest: one shrinks the rows of every segment to its rank, low = scale x A^T
in fp32, one expands them onto the rows of the product, y += low B^T in place. The backward is the same two launches with the factors
changed places. Operands of products are rounded to the dtype of x, as PyTorch's would be, sums are fp32; fp32 stays fp32, without TF32.

A sum runs along a row in steps of one size, whatever else is in the batch. No tile has 64 rows, from which on Triton would take
other instructions of sm_90 and sm_100 for a product: `mma.sync`, everywhere, is fast enough beside memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from rlhf_fast.kernels.common.launch import ceil_div, next_power_of_2, on_device
from rlhf_fast.kernels.common.layout import spread
from torch import Tensor

from rlhf_fast.ops import _matmul
from rlhf_fast.ops.lora_linear import _each, _kept, _rows

ROWS, WARPS = 32, 4
SEGMENTS = 32
"""Of one pair of launches; they are numbers among the arguments, so that no table has to reach the device."""

FAR = 2**23
"""Elements: a row or a stride, of which a tile has up to 128, beside another."""

_NUMBERS = ["firsts", "lasts", "ranks", "lows", "scales"]


@triton.jit
def _segment_of(tile, firsts, lasts, ranks, lows, scales, ROWS: tl.constexpr):
    """(first row of the tile, rows of the tile and before it in its segment, rank, scale, places among factors and low-rank numbers).

    The tiles of a segment follow those of the one before; of those that begin at or before a tile, the last one has rows.
    """
    first, last, rank, scale = tile * 0, tile * 0, 0, 0.0
    start, place, begin = tile * 0, tile * 0, tile * 0
    tiles, places = tile * 0, tile * 0
    for i in tl.static_range(len(firsts)):
        here = tile >= tiles
        begins, ends, width = firsts[i] >> 2, lasts[i] >> 2, ranks[i] >> 2
        first, last = tl.where(here, begins, first), tl.where(here, ends, last)
        rank, scale = tl.where(here, width, rank), tl.where(here, scales[i], scale)
        start, place, begin = (
            tl.where(here, tiles, start),
            tl.where(here, places, place),
            tl.where(here, lows[i] >> 2, begin),
        )
        tiles += (ends - begins + ROWS - 1) // ROWS
        places += width
    before = (tile - start) * ROWS
    return first + before, tl.minimum(last - first - before, ROWS).to(tl.int32), before, rank, scale, place, begin


@triton.jit(do_not_specialize=_NUMBERS)
def _shrink(
    x,  # rows of `size`
    a,  # (places, size), any strides
    low,  # fp32: (rows, rank) of each segment, one after the other
    firsts,
    lasts,
    ranks,
    lows,
    scales,
    size,
    a_row,
    a_column,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    SIZE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    row, rows, before, rank, scale, place, begin = _segment_of(tile, firsts, lasts, ranks, lows, scales, ROWS)
    part = tl.program_id(1).to(tl.int64) * RANKS
    if part >= rank:
        return
    r, p, k = tl.arange(0, ROWS), tl.arange(0, RANKS), tl.arange(0, SIZE)
    there, of_rank = (r < rows)[:, None], (p < (rank - part).to(tl.int32))[None, :]
    x += row * size
    a += (place + part) * a_row
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, size, SIZE):
        inside = k < size - start
        xs = tl.load(x + (r[:, None] * size + k[None, :]), there & inside[None, :], other=0.0)
        factors = tl.load(a + (p[None, :] * a_row + k[:, None] * a_column), of_rank & inside[:, None], other=0.0)
        total = tl.dot(xs, factors.to(xs.dtype), total, input_precision="ieee")
        x += SIZE
        a += SIZE * a_column
    low += begin + before * rank + part
    tl.store(low + (r[:, None] * rank + p[None, :]), total * scale, there & of_rank)


@triton.jit(do_not_specialize=_NUMBERS)
def _expand(
    low,
    b,  # (places, size), any strides
    y,  # rows of `size`
    firsts,
    lasts,
    ranks,
    lows,
    scales,
    size,
    b_row,
    b_column,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = y.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    row, rows, before, rank, _, place, begin = _segment_of(tile, firsts, lasts, ranks, lows, scales, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS
    r, p, c = tl.arange(0, ROWS), tl.arange(0, RANKS), tl.arange(0, COLUMNS)
    there, inside = (r < rows)[:, None], (c < (size - column).to(tl.int32))[None, :]
    low += begin + before * rank
    b += place * b_row + column * b_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANKS):
        of_rank = p < rank - start
        shrunk = tl.load(low + (r[:, None] * rank + p[None, :]), there & of_rank[None, :], other=0.0)
        factors = tl.load(b + (p[:, None] * b_row + c[None, :] * b_column), of_rank[:, None] & inside, other=0.0)
        total = tl.dot(shrunk.to(dtype), factors.to(dtype), total, input_precision="ieee")
        low += RANKS
        b += RANKS * b_row
    at = y + (row * size + column) + (r[:, None] * size + c[None, :])
    found = tl.load(at, there & inside).to(tl.float32) + total
    tl.store(at, found.to(dtype), there & inside)


def _coded(numbers: Sequence[int], count: int) -> tuple[int, ...]:
    """So many, zeros behind: four times a number and three, since Triton compiles anew for one in a tuple that is 1 or a multiple of 16."""
    return tuple(4 * number + 3 for number in (*numbers, *[0] * (count - len(numbers))))


def _groups(scales: Sequence[float], bounds: Sequence[int], ranks: Sequence[int]) -> Iterator[tuple]:  # type: ignore[type-arg]
    """Segments of one pair of launches: (numbers of each, tiles, largest rank, first place among the factors).

    Those of rank 0 have no rows here. The count is a power of two, the last ones having no rows: a kernel is compiled for few counts.
    """
    firsts = bounds[::2]
    lasts = [b if r else a for a, b, r in zip(firsts, bounds[1::2], ranks, strict=True)]
    places = list(accumulate(ranks, initial=0))
    lows = list(accumulate(((b - a) * r for a, b, r in zip(firsts, lasts, ranks, strict=True)), initial=0))
    for i in range(0, len(ranks), SEGMENTS):
        part = slice(i, i + SEGMENTS)
        tiles = sum(ceil_div(b - a, ROWS) for a, b in zip(firsts[part], lasts[part], strict=True))
        if tiles:
            count = next_power_of_2(len(ranks[part]))
            numbers = [_coded(of[part], count) for of in (firsts, lasts, ranks, lows[:-1])]
            factors = (*scales[part], *[0.0] * (count - len(scales[part])))
            yield (*numbers, factors), tiles, max(ranks[part]), places[i]


def _update(x: Tensor, a: Tensor, b: Tensor, y: Tensor | None, low: Tensor, *segments) -> None:  # type: ignore[no-untyped-def]
    """low = scale x a^T, and y += low b, of all segments; x, y: (rows, *) contiguous; a (R, in), b (R, out): any strides."""
    narrow = x.dtype.itemsize == 2
    for numbers, tiles, rank, place in _groups(*segments):
        factors = [_near(factor[place:]) for factor in (a, b)]
        with on_device(x):
            # Registers bound a tile. A step of the sum is 16 numbers of 16 bits, or one of fp32, in either size.
            width, size = ((16, 64) if rank <= 16 else (32, 32)) if narrow else (16, 16)
            _shrink[(tiles, ceil_div(rank, width))](
                x, factors[0], low, *numbers, x.shape[1], *factors[0].stride(), ROWS, width, size,
                num_stages=3, **spread(WARPS),
            )  # fmt: skip
            if y is not None and y.shape[1]:
                columns = 64 if narrow else 32
                _expand[(tiles, ceil_div(y.shape[1], columns))](
                    low, factors[1], y, *numbers, y.shape[1], *factors[1].stride(), ROWS, 16, columns,
                    num_stages=1, **spread(WARPS),
                )  # fmt: skip


def _near(factor: Tensor) -> Tensor:
    """Itself where the places of a tile of it fit in 32 bits, else a copy."""
    return factor if max(factor.stride()) <= FAR else factor.contiguous()


def forward(x, weight, lora_a, lora_b, lora_input, bias, scales, bounds, ranks):  # type: ignore[no-untyped-def]
    """The cell of lora_linear."""
    x = x.contiguous()
    y, low = F.linear(x, weight, None if bias is None else bias.to(x.dtype)), _kept(lora_a, bounds, ranks)
    _update(_rows(x if lora_input is None else lora_input), lora_a, lora_b.t(), _rows(y), low, scales, bounds, ranks)
    return y, low


def backward(grad, x, weight, lora_a, lora_b, low, other_input, scales, bounds, ranks, wanted):  # type: ignore[no-untyped-def]
    """The cell of lora_linear_backward. The gradients of the factors, sums over rows, are products of PyTorch's per segment."""
    flat, grad_y = _rows(x), _rows(grad)
    grad_x = F.linear(grad_y, weight.t()) if wanted[0] else None
    grad_input = torch.zeros_like(flat) if wanted[3] else None
    into = grad_input if other_input else grad_x
    grad_low = torch.empty_like(low)
    if into is not None or wanted[1]:
        _update(grad_y, lora_b.t(), lora_a, into, grad_low, scales, bounds, ranks)
    grad_a = flat.new_zeros(lora_a.shape, dtype=torch.float32) if wanted[1] else None
    grad_b = flat.new_zeros(lora_b.shape, dtype=torch.float32) if wanted[2] else None
    segments = scales, bounds, ranks
    for found, of, rows in ((grad_a, grad_low, flat), (grad_b, low, grad_y)):
        if found is None:
            continue
        for _, part, places, mine in _each(of.to(x.dtype), *segments):
            if mine.numel() and rows.numel():
                a, b, out = (
                    (mine.t(), rows[part], found[places]) if rows is flat else (rows[part].t(), mine, found[:, places])
                )
                _matmul.matmul(a, b, out)
    return (
        x.new_zeros(0) if grad_x is None else grad_x.view(x.shape),
        lora_a.new_zeros(0) if grad_a is None else grad_a.to(lora_a.dtype),
        lora_b.new_zeros(0) if grad_b is None else grad_b.to(lora_b.dtype),
        x.new_zeros(0) if grad_input is None else grad_input.view(x.shape),
    )
