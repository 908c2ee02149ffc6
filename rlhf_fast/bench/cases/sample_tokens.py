"""sample_tokens against what generation loops write out: softmax and multinomial, and the log-prob of the token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import rlhf_fast
from rlhf_fast.bench.cases.common import DTYPES, TRUTH_ROWS, no_grad
from rlhf_fast.bench.engine import OURS, Call, Case, Results
from rlhf_fast.bench.machine import Machine
from rlhf_fast.reference.sample_tokens import sample

SHAPES = [(64, 49152), (64, 151936)]


def ours(x: dict[str, Any]) -> Results:
    found = rlhf_fast.sample_tokens(x["logits"], x["uniform"])
    return found.logprobs, found.entropy


def by_inversion(x: dict[str, Any]) -> Results:
    """The same token in plain PyTorch."""
    log_p = x["logits"].float().log_softmax(-1)
    cumulative = log_p.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cumulative, x["uniform"][:, None] * cumulative[:, -1:], right=True)
    return log_p.gather(-1, token).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def by_multinomial(x: dict[str, Any]) -> Results:
    """As transformers' generate samples, with the log-prob: another token, so the entropy alone can be compared."""
    log_p = x["logits"].float().log_softmax(-1)
    log_p.gather(-1, torch.multinomial(log_p.exp(), 1))
    return None, -(log_p.exp() * log_p).sum(-1)


def truth(x: dict[str, Any]) -> Results:
    first = {"logits": x["logits"][:TRUTH_ROWS].double(), "uniform": x["uniform"][:TRUTH_ROWS]}
    with rlhf_fast.use_backend("reference"):
        return ours(first)


def cases() -> Iterator[Case]:
    for rows, vocab in SHAPES:
        for label, dtype in DTYPES.items():

            def limit(m: Machine, size: int = rows * vocab * dtype.itemsize, n: int = rows * vocab) -> float:
                return m.seconds(read=size, exps=n)

            found: dict[str, Call | str] = {
                OURS: ours,
                "eager, the same token": no_grad(by_inversion),
                "eager, multinomial": no_grad(by_multinomial),
            }
            yield Case(
                "sample_tokens",
                f"[{rows}, {vocab}] {label}, token, log-prob and entropy",
                partial(sample, (rows,), vocab, dtype=dtype),
                found,
                truth,
                limit,
                {"eager, the same token": 5.0},
                seconds=4,
            )
