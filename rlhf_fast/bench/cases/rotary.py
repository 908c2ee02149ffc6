"""rotary on the queries and keys of a micro-batch, and of a decoding step, against the operators that models write it with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import rlhf_fast
from rlhf_fast.bench.cases.common import DTYPES, elementwise
from rlhf_fast.bench.engine import Case
from rlhf_fast.reference.rotary import rotary as eager
from rlhf_fast.reference.rotary import sample

SHAPES = [(64, 1, 9, 3, 64), (16, 32, 9, 3, 64), (8, 512, 32, 8, 128)]
"""Rows, tokens, heads, heads of keys, width."""


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        for label, dtype in DTYPES.items():
            name = "{} x {} tokens, {} and {} heads of {}".format(*shape)
            make = partial(sample, *shape, dtype=dtype)
            yield from elementwise("rotary", f"{name} {label}", rlhf_fast.rotary, make, ("query", "key"), eager)
