"""Kernels whose sums and scans have the same bits wherever their tensors lie."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def same_order(fn: Callable[..., Any]) -> Any:
    """triton.jit, never specialised on addresses and sizes.

    The compiler would spread a block over the threads by the alignment of its loads, and a sum or a scan follows the threads. Rows
    of packed sequences begin anywhere, so that full lines of four bytes a thread are what there is to load anyway.
    """
    names = [
        n for n, p in inspect.signature(fn).parameters.items() if p.annotation not in (tl.constexpr, "tl.constexpr")
    ]
    return triton.jit(fn, do_not_specialize=names)
