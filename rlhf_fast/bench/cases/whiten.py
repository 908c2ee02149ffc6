"""whiten against eager PyTorch and verl."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import rlhf_fast
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases.common import peer
from rlhf_fast.bench.engine import OURS, Call, Case, Results
from rlhf_fast.bench.machine import Machine
from rlhf_fast.reference.whiten import sample


def ours(x: dict[str, Any]) -> Results:
    return (rlhf_fast.whiten(x["x"], x["mask"]),)


def eager(x: dict[str, Any]) -> Results:
    with rlhf_fast.use_backend("reference"):
        return ours(x)


def of_verl(functional: Any) -> Call:
    def run(x: dict[str, Any]) -> Results:
        mask = x["mask"].float()
        return (functional.masked_whiten(x["x"], mask) * mask,)

    return run


def cases() -> Iterator[Case]:
    for rows, length in ((64, 1024), (256, 8192)):

        def limit(m: Machine, n: int = rows * length) -> float:
            return m.seconds(read=5 * n, written=4 * n)

        found: dict[str, Call | str] = {OURS: ours, "eager": eager, "verl": peer(peers.verl_functional, of_verl)}
        yield Case(
            "whiten",
            f"[{rows}, {length}] fp32",
            partial(sample, (rows, length)),
            found,
            lambda x: eager({"x": x["x"].double(), "mask": x["mask"]}),
            limit,
            memory=False,
        )
