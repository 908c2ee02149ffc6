"""First-order recurrences over the tokens of every sequence, in plain PyTorch: padded or packed, in 64 + log2(T / 64) steps.

No shape depends on what is in a tensor and the host reads nothing, so that all of it can be traced and a GPU never waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fast.reference._reduce import segments, spread

CHUNK = 64
"""Steps that are taken one after another."""


@dataclass(frozen=True)
class Steps:
    """The tokens of every sequence as steps of a recurrence: (B, T), or (N,) with cu_seqlens."""

    real: Tensor
    """bool: a step; the other slots are passed over."""
    last: Tensor
    """The last step of its sequence."""
    following: Tensor
    """Slot of the next step, flat; any slot where there is none."""
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, mask: Tensor, cu_seqlens: Tensor | None, gaps: bool = False) -> Steps:
        """The real slots; with `gaps`, all slots up to the last real one."""
        nowhere = mask.numel()
        place = torch.arange(nowhere, device=mask.device).view(mask.shape)
        nearest = torch.where(mask, place, nowhere)
        nearest = (
            nearest.flip(-1).cummin(-1).values.flip(-1)
        )  # at the slot or after it, in the row or in all of the pack
        after = pad(nearest[..., 1:], (0, 1), value=nowhere)
        if cu_seqlens is not None:
            after = after.where(after < spread(cu_seqlens[1:], mask, cu_seqlens), nowhere)
        some = after < nowhere
        real = mask | some if gaps else mask
        if gaps:
            after = place + 1
        return cls(real, real & ~some, after.where(some, 0), cu_seqlens)

    def next(self, x: Tensor, end: Tensor | None) -> Tensor:
        """x, like `real`, of the next step; after the last one `end` (one number per sequence), or 0."""
        found = x.reshape(-1).index_select(0, self.following.reshape(-1)).view(x.shape) if x.numel() else x
        return found.where(~self.last, 0.0 if end is None else self.each(end))

    def each(self, x: Tensor) -> Tensor:
        """One number per sequence, at each of its slots."""
        return spread(x, self.real, self.cu_seqlens)

    def accumulate(self, a: float | Tensor, b: Tensor) -> Tensor:
        """x = b + a x of the next step, 0 after the last. a: constants. Slots that are no step have the x of the next one."""
        return _scan(torch.where(self.real, a, b.new_ones(())), b.where(self.real, 0.0), self.cu_seqlens)


def _scan(a: Tensor, b: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x_t = b_t + a_t x_{t+1} in every row of (B, T) or sequence of (N,): chunks of CHUNK steps side by side, then the carries
    between them by doubling. The order of the terms depends on the place in the sequence alone, and no product is divided out.
    """
    if b.numel() == 0:
        return b
    if cu_seqlens is None:
        rows, T = b.shape
        chunks = -(-T // CHUNK)
        grid = lambda x: pad(x, (0, chunks * CHUNK - T)).view(rows, chunks, CHUNK)
        return _scan_chunks(grid(a), grid(b), None).reshape(rows, -1)[:, :T]
    number, count = segments(b, cu_seqlens)
    parts = (cu_seqlens[1:] - cu_seqlens[:-1] + CHUNK - 1) // CHUNK
    ends = parts.cumsum(0)  # in chunks; no more of them than one that is not full per sequence
    chunks = len(b) // CHUNK + count
    inside = torch.arange(len(b), device=b.device) - cu_seqlens[:-1][number]
    slot = (ends - parts)[number] * CHUNK + inside
    grid = lambda x: x.new_zeros(chunks * CHUNK).index_copy(0, slot, x).view(1, chunks, CHUNK)
    last = torch.zeros(chunks + 1, dtype=torch.bool, device=b.device).index_fill(0, ends, True)
    return _scan_chunks(grid(a), grid(b), last[None, 1:]).reshape(-1).index_select(0, slot)


def _scan_chunks(a: Tensor, b: Tensor, last: Tensor | None) -> Tensor:
    """The same along the last two dimensions of (R, chunks, CHUNK); last (R, chunks): where a sequence ends with the chunk."""
    x, through = torch.zeros_like(b[..., 0]), torch.ones_like(b[..., 0])
    inner, products = [], []
    a, b = (t.movedim(2, 0).contiguous() for t in (a, b))
    for step, offset in zip(reversed(a.unbind()), reversed(b.unbind()), strict=True):
        x, through = offset + step * x, step * through
        inner.append(x)
        products.append(through)
    if last is not None:
        through = through.masked_fill(last, 0.0)
    length, ahead = x.shape[1], 1
    while ahead < length:  # x of a chunk with the next 1, 2, 4 ... behind it
        beyond, further = (pad(t[:, ahead:], (0, ahead)) for t in (x, through))
        x = torch.where(through == 0, x, x + through * beyond)  # what stands beyond an end may be NaN
        through, ahead = through * further, 2 * ahead
    entering = pad(x[:, 1:], (0, 1))
    if last is not None:
        entering = entering.masked_fill(last, 0.0)
    return torch.stack(inner[::-1], 2) + torch.stack(products[::-1], 2) * entering[..., None]
