"""The rows of `rlhf-fast bench varlen_attention` under pytest-benchmark: `pytest bench --benchmark-enable`."""

from __future__ import annotations

import pytest

from rlhf_fast.bench.cases.varlen_attention import cases


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_row(bench_row, case):
    bench_row(case)
