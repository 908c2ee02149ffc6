"""rms_norm on the rows of a micro-batch against the operators that models write it with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import rlhf_fast
from rlhf_fast.bench.cases.common import DTYPES, elementwise
from rlhf_fast.bench.engine import Case
from rlhf_fast.reference.rms_norm import rms_norm as eager
from rlhf_fast.reference.rms_norm import sample

SHAPES = [(512, 384), (4096, 576), (4096, 4096)]


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        for label, dtype in DTYPES.items():
            yield from elementwise(
                "rms_norm",
                f"{list(shape)} {label}",
                rlhf_fast.rms_norm,
                partial(sample, shape, dtype=dtype),
                ("x",),
                eager,
            )
