"""Rows of per-token arrays, and the scan of generalised advantage estimation over one of them.

A scan is s_out = a s_in + b from token to token, a skipped slot being a = 1, b = 0; it needs the state before every token as well as
the one after it. Rows are walked in blocks that begin at their first slot, whatever their length: a row then has the same bits
with any padding, in any batch, packed or not.
"""

import triton
import triton.language as tl

BLOCK, WARPS = 256, 4
"""Slots at a time, two a thread; the order of the sums depends on both. A scan keeps four numbers of every 32 slots in registers."""


@triton.jit
def row_of(cu_seqlens, row, tokens, length):
    """(first slot, number of slots) of a row of (rows, length), the last of which may be cut short, or of packed sequences.

    Boundaries on an accelerator are not checked on the host, so they are clamped here.
    """
    if cu_seqlens is None:
        begin = row * length
        return begin, tl.minimum(begin + length, tokens) - begin
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + row), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + row + 1), begin), tokens)
        return begin, end - begin


@triton.jit
def mask_at(mask, at, inside):
    """Real ones among the slots `at` that are `inside`; all of them without a mask."""
    if mask is None:
        return inside
    else:
        return tl.load(mask + at, inside, other=0) != 0


@triton.jit
def mask_from(mask, start, lane, inside):
    """`mask_at` of the lanes of the block that begins at `start`."""
    if mask is None:
        return inside
    else:
        return mask_at(mask + start, lane, inside)


@triton.jit
def last_real(mask, size, BLOCK: tl.constexpr):
    """Slot of the last real token of the row that begins at mask[0]; -1 when there is none."""
    if mask is None:
        return size - 1
    else:
        lane = tl.arange(0, BLOCK)
        last = tl.full((), -1, tl.int64)
        start = tl.cdiv(size, BLOCK) * BLOCK
        while start > 0:
            start -= BLOCK
            found = tl.max(tl.where(mask_at(mask + start, lane, lane < left(size, start, BLOCK)), lane, -1), 0)
            last = tl.where(found >= 0, start + found, last)
            start = tl.where(found >= 0, 0, start)
        return last


@triton.jit
def left(size, start, BLOCK: tl.constexpr):
    """Slots of the block that begins at `start`, as a number of lanes: offsets in a block are 32-bit, those of blocks 64-bit."""
    return tl.minimum(size - start, BLOCK).to(tl.int32)


@triton.jit
def lane_of(slot, start, BLOCK: tl.constexpr):
    """Lane of a slot in the block that begins at `start`, -1 when it is in another."""
    return tl.where((slot >= start) & (slot < start + BLOCK), slot - start, -1).to(tl.int32)


@triton.jit
def _then(a, b, before_a, before_b, a2, b2, before_a2, before_b2):
    """A stretch of tokens and the stretch after it as one. before_*: the state before the last token, from that before the first."""
    return a * a2, a2 * b + b2, before_a2 * a, before_a2 * b + before_b2


@triton.jit
def scan(a, b, state, REVERSE: tl.constexpr):
    """(state before every token of a block, state after the last one), from the state before the first one."""
    BLOCK: tl.constexpr = a.shape[0]
    ones = tl.full(a.shape, 1.0, tl.float32)
    zeros = tl.zeros(a.shape, tl.float32)
    all_a, all_b, before_a, before_b = tl.associative_scan((a, b, ones, zeros), 0, _then, reverse=REVERSE)
    lane = tl.arange(0, BLOCK)
    final = lane == (0 if REVERSE else BLOCK - 1)
    return before_a * state + before_b, tl.sum(tl.where(final, all_a * state + all_b, 0.0), 0)
