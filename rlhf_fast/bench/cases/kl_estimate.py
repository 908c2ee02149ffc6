"""kl_estimate against the formulas trainers write out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import rlhf_fast
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases.common import compiled, no_grad, peer
from rlhf_fast.bench.engine import OURS, Call, Case, Results
from rlhf_fast.bench.machine import Machine

RELATIVE = 1e-6
"""Largest relative error of k3, at any log-ratio."""


def make(rows: int, length: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    logprobs = -torch.randn(rows, length, generator=g).abs()
    return {"logprobs": logprobs, "ref_logprobs": logprobs + 0.3 * torch.randn(rows, length, generator=g)}


def spread(rows: int, length: int) -> dict[str, Any]:
    """Log-ratios of both signs from 1e-8 to 10 by size, exact in fp32: the reference is the log-ratio itself."""
    size = torch.logspace(-8, 1, rows * length // 2).clamp(max=10.0)
    return {"logprobs": torch.zeros(rows, length), "ref_logprobs": torch.cat([size, -size]).view(rows, length)}


def k3(x: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    d = ref - x
    return d.exp() - d - 1


def ours(x: dict[str, Any]) -> Results:
    return (rlhf_fast.kl_estimate(x["logprobs"], x["ref_logprobs"], "k3"),)


def truth(x: dict[str, Any]) -> Results:
    d = x["ref_logprobs"].double() - x["logprobs"].double()
    series = sum(d**n / math.factorial(n) for n in range(2, 12))  # near 0 the difference would cancel
    return (series.where(d.abs() < 0.1, torch.expm1(d) - d),)


def cases() -> Iterator[Case]:
    for rows, length, inputs in ((32, 2048, make), (256, 8192, make), (32, 2048, spread)):

        def limit(m: Machine, n: int = rows * length) -> float:
            return m.seconds(read=8 * n, written=4 * n, exps=n)

        fused = compiled(k3)

        def run_compiled(x: dict[str, Any], f: Callable[..., Any] = fused) -> Results:
            return (f(x["logprobs"], x["ref_logprobs"]),)

        found: dict[str, Call | str] = {
            OURS: ours,
            "eager": no_grad(lambda x: (k3(x["logprobs"], x["ref_logprobs"]),)),
            "torch.compile": no_grad(run_compiled),
            "verl": peer(peers.verl, lambda m: lambda x: (m.kl_penalty(x["logprobs"], x["ref_logprobs"], "k3"),)),
            "OpenRLHF": peer(
                lambda: peers.openrlhf("models.utils"),
                lambda m: lambda x: (m.compute_approx_kl(x["logprobs"], x["ref_logprobs"], kl_estimator="k3"),),
            ),
        }
        yield Case(
            "kl_estimate",
            f"k3, [{rows}, {length}] fp32{', relative error at log-ratios 1e-8 to 10' if inputs is spread else ''}",
            partial(inputs, rows, length),
            found,
            truth,
            limit,
            {"eager": 1.0} if rows == 32 else {},
            memory=False,
            relative=RELATIVE if inputs is spread else None,
        )
