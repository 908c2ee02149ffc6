"""silu_mul on the rows of a micro-batch against PyTorch's silu and product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F

import rlhf_fast
from rlhf_fast.bench.cases.common import DTYPES, elementwise
from rlhf_fast.bench.engine import Case
from rlhf_fast.reference.silu_mul import sample

SHAPES = [(512, 1024), (4096, 1536), (4096, 11008)]


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        for label, dtype in DTYPES.items():
            yield from elementwise(
                "silu_mul",
                f"{list(shape)} {label}",
                rlhf_fast.silu_mul,
                partial(sample, shape, dtype=dtype),
                ("gate", "up"),
                lambda gate, up: F.silu(gate) * up,
            )
