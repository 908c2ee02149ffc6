from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from rlhf_fast.bench import machine, render
from rlhf_fast.bench.command import is_native
from rlhf_fast.bench.engine import OURS, Case, run


@pytest.fixture(scope="session")
def probe() -> machine.Probe:
    return machine.Probe()


@pytest.fixture(scope="session")
def limits(probe) -> machine.Machine:
    return machine.measure(probe)


@pytest.fixture
def bench_row(benchmark, limits, probe) -> Callable[[Case], None]:
    """Times ours under pytest-benchmark, after the row's own gate and its comparison with PyTorch in turn."""

    def bench(case: Case) -> None:
        row = run(replace(case, memory=False, seconds=min(case.seconds, 5.0)), limits, only=is_native, probe=probe)
        benchmark.extra_info.update({f"{name} / ours": round(ratio, 2) for name, ratio in row.ratios.items()})
        inputs, call = case.make(), case.contenders[OURS]
        assert not isinstance(call, str)
        benchmark.pedantic(call, args=(inputs,), rounds=5, warmup_rounds=1)
        print(render.text_row(row))

    return bench
