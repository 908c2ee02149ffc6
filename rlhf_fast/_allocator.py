"""What the C library does with memory that tensors on the CPU give back."""

from __future__ import annotations

import ctypes
import platform

LARGE = 2**17
"""Bytes from which a block is one of the system's own, and goes back to it when its tensor dies: glibc's bound before it raises it.
With 1 MiB, activations of a few sequences of a small model stayed in the heap: 94 of 264 MiB of a run of kto."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def return_large_blocks() -> bool:
    """Make the process give blocks of LARGE bytes or more back when they die; False where the C library is not glibc.

    glibc raises that bound up to 32 MiB by itself, and before 2.38 an aligned request (all of PyTorch's) does not fit into the hole that
    an equal one left: with gradient checkpointing a process held three times what lived, and more with every step (`bench/memory.py`
    without a budget). Fresh pages cost time instead.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, LARGE)) and bool(mallopt(_TRIM_THRESHOLD, LARGE))


def trim() -> bool:
    """Give what dead tensors have left in the C library's heap back to the system; False where that is not glibc, or nothing was left.

    After an update that is most of its activations: 600 of 1,880 MiB of a GRPO run of a 135M model, on top of which a rollout packs the
    weights once more. Fresh pages cost the next update some hundredths of its time.
    """
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).malloc_trim(0))


def resident_bytes() -> int:
    """Bytes of this process that are in memory, mapped files included; 0 where the system does not tell (not Linux)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return 0
    import mmap

    return pages * mmap.PAGESIZE
