"""Token batches: padded tensors with their masks, and the packed form with cu_seqlens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Row = TypeVar("Row")


@dataclass(frozen=True)
class Batch:
    """Padded sequences. Masks are bool, True = real token."""

    input_ids: Tensor
    """(B, T) int64; padding holds id 0 and is never read."""
    attention_mask: Tensor
    """(B, T)."""
    target_mask: Tensor
    """(B, T): tokens that are learned or scored; the log-prob of token t comes from position t - 1, so never token 0."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        return Batch(self.input_ids[rows], self.attention_mask[rows], self.target_mask[rows])

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.target_mask.to(device))

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.attention_mask.sum())


def pad(
    sequences: Sequence[Sequence[int]], *, left: bool = False, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(ids (B, T) int64, mask (B, T) bool) of ragged sequences, on a device; T is the longest.

    Raises ValueError for an empty list or an empty sequence.
    """
    if not sequences or not all(len(s) for s in sequences):
        empty = [i for i, s in enumerate(sequences) if not len(s)]
        raise ValueError(
            f"pad: argument 'sequences' got empty sequences at {empty[:5]}, expected at least one token each"
        )
    T = max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), T, dtype=torch.int64)
    mask = torch.zeros(len(sequences), T, dtype=torch.bool)
    for i, s in enumerate(sequences):
        where = slice(T - len(s), T) if left else slice(0, len(s))
        ids[i, where] = torch.as_tensor(s, dtype=torch.int64)
        mask[i, where] = True
    return ids.to(device), mask.to(device)


def collate(sequences: Sequence[Sequence[int]], learn: Sequence[Sequence[bool]]) -> Batch:
    """Right-padded batch; learn[i][t] says whether token t of sequence i is a target (the first token never is)."""
    ids, mask = pad(sequences)
    targets = torch.zeros_like(mask)
    for i, row in enumerate(learn):
        targets[i, : len(row)] = torch.as_tensor(row, dtype=torch.bool)
    targets[:, 0] = False
    return Batch(ids, mask, targets)


def cu_seqlens(mask: Tensor) -> Tensor:
    """(B + 1,) int32 boundaries of the real tokens of each row of a (B, T) mask, once packed."""
    bounds = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    bounds[1:] = mask.sum(1).cumsum(0)
    return bounds


def pack(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(N, ...) real positions of x (B, T, ...) in row order, and their cu_seqlens (B + 1,)."""
    return x[mask], cu_seqlens(mask)


def unpack(packed: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """The inverse of `pack`: (B, T, ...) with `fill` at padding."""
    x = packed.new_full((*mask.shape, *packed.shape[1:]), fill)
    x[mask] = packed
    return x


def hold_out(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(held out, kept): a share of the rows, rounded down, and the others, in an order that follows from the seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held = int(len(rows) * fraction)
    return [rows[i] for i in order[:held]], [rows[i] for i in order[held:]]


class Shuffle:
    """An endless shuffled stream of row numbers whose every batch follows from the seed and the step alone."""

    def __init__(self, rows: int, seed: int) -> None:
        if rows < 1:
            raise ValueError(f"Shuffle: argument 'rows' got {rows}, expected at least 1")
        self.rows, self.seed = rows, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int, size: int) -> list[int]:
        """Row numbers of batch `step`: a new permutation for each pass over the rows."""
        return [self._row(position) for position in range(step * size, (step + 1) * size)]

    def batches(self, size: int, epochs: int, most: int | None) -> int:
        """How many batches take every row `epochs` times, the last of them perhaps with rows of another pass; at most `most`."""
        total = math.ceil(self.rows / size) * epochs
        return total if most is None else min(total, most)

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self.rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.rows, generator=generator)
        return int(self._order[index])
