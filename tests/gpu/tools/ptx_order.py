"""What the blocks of a launch know of each other in the PTX machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Order:
    """What of other blocks' work a block has acquired: vector clocks, moved by atomics and fences.

    A block's clock steps at its barriers. A release by one thread publishes what its block did before the last barrier, and
    what that thread did itself.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self.clock = np.ones(blocks, np.int32)
        self._seen: dict[int, NDArray] = {}  # block: (3, blocks) of: clock, one thread, that thread's clock
        self._pending: dict[int, NDArray] = {}  # acquired by relaxed atomics, effective at the next fence
        self._published: dict[
            tuple[int, int], NDArray
        ] = {}  # by thread: what its relaxed atomics after a fence release
        self._at: dict[int, NDArray] = {}  # address: what was released there

    def _nothing(self) -> NDArray:
        none = np.zeros((3, self._blocks), np.int32)
        none[1] = -1
        return none

    def barrier(self, blocks: NDArray) -> None:
        self.clock[blocks] += 1

    def fence(self, block: int, thread: int) -> None:
        if block in self._pending:
            self._seen[block] = _joined(self._seen.get(block), self._pending.pop(block))
        self._published[block, thread] = self._own(block, thread)

    def _own(self, block: int, thread: int) -> NDArray:
        own = self._seen[block].copy() if block in self._seen else self._nothing()
        own[:, block] = self.clock[block] - 1, thread, self.clock[block]
        return own

    def atomic(self, block: int, thread: int, address: int, acquires: bool, releases: bool) -> None:
        there = self._at.get(address)
        if there is not None:
            into = self._seen if acquires else self._pending
            into[block] = _joined(into.get(block), there)
        out = self._own(block, thread) if releases else self._published.get((block, thread))
        if out is not None:
            self._at[address] = _joined(there, out)

    def after(self, block: int, others: NDArray, clocks: NDArray, threads: NDArray) -> NDArray:
        """Has what those threads of other blocks did at those clocks been released to this block?"""
        if block not in self._seen:
            return np.zeros(others.shape, bool)
        clock, thread, own_clock = self._seen[block][:, others]
        return (clocks <= clock) | ((threads == thread) & (clocks <= own_clock))


def _joined(a: NDArray | None, b: NDArray) -> NDArray:
    if a is None:
        return b.copy()
    later = b[2] > a[2]
    return np.stack([np.maximum(a[0], b[0]), np.where(later, b[1], a[1]), np.where(later, b[2], a[2])])
