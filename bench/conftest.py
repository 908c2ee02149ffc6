from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

import rlhf_fast


@pytest.fixture
def against_eager(benchmark):
    """Times a call with the kernels against the same call in plain PyTorch, after checking that the two agree.

    `call` returns a sequence of tensors. The two run in turn, so that a drift of the machine meets both.
    """

    def plain(call: Callable) -> Callable:
        def run():
            with rlhf_fast.use_backend("reference"):
                return call()

        return run

    def run(call: Callable, *, pairs: int = 5, atol: float = 1e-5, rtol: float = 1e-4) -> float:
        eager = plain(call)
        for a, b in zip(call(), eager(), strict=True):
            torch.testing.assert_close(a, b, atol=atol, rtol=rtol)
        ratios = []
        for _ in range(pairs):
            seconds = []
            for side in (call, eager):
                start = time.perf_counter()
                side()
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[1] / seconds[0])
        ratio = statistics.median(ratios)
        benchmark.extra_info["eager / ours"] = round(ratio, 2)
        benchmark.pedantic(call, rounds=20, warmup_rounds=2)
        print(f"\n{ratio:.1f} x faster than eager PyTorch (median of {pairs} pairs)")
        return ratio

    return run
