"""Sums over a whole launch, in one launch: programs that count first, and a last program that combines the parts.

A kernel whose gradients need a count of the real tokens has two programs for every part of the tokens. Programs take numbers
from a ticket counter: the first half counts and waits for nobody, the second half waits for the counts of programs that have
started already, so the order in which the device starts programs cannot stop it. Counts are integers, so their sum does not
depend on the order either. Of the second half, the last one to finish combines what all have stored, in the order of the parts.
"""

import triton
import triton.language as tl

_ARRIVED = tl.constexpr(1 << 40)
"""One program that has counted, in the second counter; below lies what they have counted."""


@triton.jit
def take_ticket(counters):
    """Number of this program in the order of starting."""
    return tl.atomic_add(counters, 1, sem="relaxed")


@triton.jit
def add_count(counters, count):
    """`count` of one of the programs that count."""
    tl.atomic_add(counters + 1, count.to(tl.int64) + _ARRIVED, sem="release")


@triton.jit
def whole_count(counters, parts):
    """Sum of the counts of `parts` programs; waits until they are there."""
    seen = tl.atomic_add(counters + 1, 0, sem="acquire")
    while (seen >> 40) < parts:
        seen = tl.atomic_add(counters + 1, 0, sem="acquire")
    return seen - ((seen >> 40) << 40)


@triton.jit
def is_last(counters, parts):
    """Whether this is the last of `parts` programs to get here; it then sees what all of them stored before."""
    tl.debug_barrier()  # the stores of all threads come before the release of one
    return tl.atomic_add(counters + 2, 1, sem="acq_rel") == parts - 1


@triton.jit
def reset(counters):
    """Zeros for the next launch, by the last program."""
    tl.store(counters + tl.arange(0, 4), tl.zeros((4,), tl.int64))
