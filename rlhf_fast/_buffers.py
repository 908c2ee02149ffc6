"""Recycled memory for large results on the CPU.

A fresh block costs more in page faults than the kernel that fills it: 77 of 109 ms of the backward of token_logprobs on
[2048, 50304] fp32, 10 of 11 ms of gae on [256, 8192] where the C library hands its memory back to the system between two calls.
Blocks therefore come back here when the tensor over them dies, and serve the next result.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 2**20
"""Bytes from which a result is recycled: the 5 us that takes are little beside the kernel that fills it."""
LARGEST_CACHE = (
    min(2**32, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16) if sys.platform == "linux" else 0
)
"""Bytes of unused blocks that are kept: a sixteenth of the memory, 4 GiB at most."""

_HUGE_PAGE = 2 * 2**20
_free: list[mmap.mmap] = []


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised contiguous CPU tensor."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALLEST or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    block = _take(size)
    # The tensor keeps the array alive, and the array's end is the tensor's: that is when the block comes back.
    array = (ctypes.c_char * size).from_buffer(block)
    weakref.finalize(array, _give_back, block).atexit = False
    return torch.frombuffer(array, dtype=dtype, count=count).view(shape)


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised, with the shape and dtype of a contiguous CPU tensor."""
    return torch.empty_like(x) if x.nbytes < SMALLEST else empty(x.shape, x.dtype)


def cached_bytes() -> int:
    """Bytes of blocks that wait for reuse."""
    return sum(len(block) for block in list(_free))


def release() -> None:
    """Give the unused blocks back to the system."""
    _free.clear()


def _take(size: int) -> mmap.mmap:
    # At most a quarter larger, so that a small result does not hold a huge block.
    for block in sorted((b for b in list(_free) if size <= len(b) <= size + size // 4), key=len):
        with contextlib.suppress(ValueError):  # another thread may have taken it
            _free.remove(block)
            return block
    step = _HUGE_PAGE if size >= 8 * _HUGE_PAGE else mmap.PAGESIZE
    block = mmap.mmap(-1, -(-size // step) * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    _free.append(block)
    while cached_bytes() > LARGEST_CACHE:
        _free.pop(0)
