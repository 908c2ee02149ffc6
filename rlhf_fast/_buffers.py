"""Recycled memory for large results on the CPU.

A fresh block of hundreds of MiB costs more in page faults than the kernel that fills it: 77 of 109 ms of the backward of
token_logprobs on [2048, 50304] fp32. Blocks therefore come back here when the tensor over them dies, and serve the next result.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 32 * 2**20
"""Bytes from which a result is recycled; the C library keeps smaller blocks itself."""
LARGEST_CACHE = 2**30
"""Bytes of unused blocks that are kept."""

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


def cached_bytes() -> int:
    """Bytes of blocks that wait for reuse."""
    return sum(len(block) for block in _free)


def release() -> None:
    """Give the unused blocks back to the system."""
    _free.clear()


def _take(size: int) -> mmap.mmap:
    # At most a quarter larger, so that a small result does not hold a huge block.
    fits = sorted((len(block), i) for i, block in enumerate(_free) if size <= len(block) <= size + size // 4)
    if fits:
        return _free.pop(fits[0][1])
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap) -> None:
    _free.append(block)
    while cached_bytes() > LARGEST_CACHE:
        _free.pop(0)
