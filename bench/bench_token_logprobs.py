"""token_logprobs, forward and backward, against log_softmax + gather in eager PyTorch: `pytest bench --benchmark-enable`."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import rlhf_fast
from rlhf_fast.reference.token_logprobs import sample

SHAPES = [(256, 151936), (2048, 50304)]


def ours(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    leaf = logits.detach().requires_grad_()
    rlhf_fast.token_logprobs(leaf, ids).logprobs.sum().backward()
    return leaf.grad


def eager(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    leaf = logits.detach().requires_grad_()
    torch.log_softmax(leaf, -1).gather(-1, ids[:, None]).sum().backward()
    return leaf.grad


def gate() -> None:
    """Correctness first: no timing without it."""
    kwargs = sample((64,), 1000, ref=False)
    logits, ids = kwargs["logits"], kwargs["token_ids"].clamp(min=0)
    torch.testing.assert_close(ours(logits, ids), eager(logits, ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(benchmark, shape, dtype):
    gate()
    rows, vocab = shape
    logits = torch.randn(rows, vocab).to(dtype)
    ids = torch.randint(0, vocab, (rows,))
    ratios = []
    for i in range(6):  # in turn, so that a drift of the machine meets both; the first pair warms up
        seconds = []
        for call in (ours, eager):
            start = time.perf_counter()
            call(logits, ids)
            seconds.append(time.perf_counter() - start)
        if i:
            ratios.append(seconds[1] / seconds[0])
    benchmark.extra_info["eager / ours"] = round(statistics.median(ratios), 2)
    benchmark.pedantic(ours, args=(logits, ids), rounds=5, warmup_rounds=1)
    print(f"\n{shape} {dtype}: {statistics.median(ratios):.1f} x faster than eager (median of 5 pairs)")
