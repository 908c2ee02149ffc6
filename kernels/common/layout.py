"""How blocks are spread over threads and registers: the same for every tensor of an op, and nothing spilled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from rlhf_fast.kernels.common.launch import EXACT

REGISTERS = 128
"""A thread may have so many. Left alone, ptxas spills a few to make room for one more block."""


def same_order(fn: Callable[..., Any]) -> Any:
    """triton.jit, never specialised on addresses and sizes.

    The compiler would spread a block over the threads by the alignment of its loads, and a sum or a scan follows the threads. Rows
    of packed sequences begin anywhere, so that full lines of four bytes a thread are what there is to load anyway.
    """
    names = [
        n for n, p in inspect.signature(fn).parameters.items() if p.annotation not in (tl.constexpr, "tl.constexpr")
    ]
    return triton.jit(fn, do_not_specialize=names)


def spread(warps: int) -> dict[str, Any]:
    """Launch options of a block on so many warps."""
    options = {"num_warps": warps, **EXACT}
    if not triton.knobs.runtime.interpret and triton.runtime.driver.active.get_current_target().backend == "cuda":
        options["maxnreg"] = REGISTERS  # AMD's compiler does not know it, and does not need it
    return options
