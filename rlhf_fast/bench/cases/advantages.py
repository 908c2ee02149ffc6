"""advantages, all five stages, against gae alone and against the same stages as trainers run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases import gae
from rlhf_fast.bench.cases.common import no_grad, peer
from rlhf_fast.bench.engine import OURS, Call, Case, Results
from rlhf_fast.bench.machine import Machine
from rlhf_fast.reference.advantages import WHITEN_EPS

KL_COEF = 0.05
TENSORS = ("scores", "values", "mask", "logprobs", "ref_logprobs")

Scan = Callable[[dict[str, Any]], Any]
"""{"rewards", "values", "mask"} -> (advantages, returns)."""


def make(rows: int, length: int) -> dict[str, Any]:
    x = gae.make(rows, length)
    g = torch.Generator().manual_seed(1)
    logprobs = -torch.randn(rows, length, generator=g).abs()
    ref = logprobs + 0.3 * torch.randn(rows, length, generator=g)
    return {
        "values": x["values"],
        "mask": x["mask"],
        "scores": torch.randn(rows, generator=g),
        "logprobs": logprobs,
        "ref_logprobs": ref,
        "rewards": x["rewards"],
    }


def ours(x: dict[str, Any]) -> Results:
    out = rlhf_fast.advantages(
        x["scores"],
        x["values"],
        x["mask"],
        logprobs=x["logprobs"],
        ref_logprobs=x["ref_logprobs"],
        kl_coef=KL_COEF,
        gamma=gae.GAMMA,
        lam=gae.LAM,
    )
    return out.advantages, out.returns


def eager(x: dict[str, Any]) -> Results:
    with rlhf_fast.use_backend("reference"):
        return ours(x)


def stages(
    scan: Scan, scores: Tensor, values: Tensor, mask: Tensor, logprobs: Tensor, ref_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """The same stages in plain PyTorch around a scan, for rows without gaps."""
    rewards = -KL_COEF * (logprobs - ref_logprobs) * mask
    rewards = rewards.scatter_add(1, mask.sum(1, keepdim=True) - 1, scores[:, None])
    raw, returns = scan({"rewards": rewards, "values": values, "mask": mask})
    real = mask.sum()
    off = (raw - (raw * mask).sum() / real) * mask
    return off * torch.rsqrt((off * off).sum() / (real - 1) + WHITEN_EPS), returns


def chunked(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The stages around a scan made of matrix products, of tensors in the order of TENSORS: what a compiler can take."""
    return stages(gae.chunked, *tensors)


def of_tensors(function: Callable[..., Results]) -> Call:
    return no_grad(lambda x: function(*(x[k] for k in TENSORS)))


def gae_alone(x: dict[str, Any]) -> Results:
    gae.ours(x)
    return None, None


def of_verl(algos: Any) -> Call:
    def run(x: dict[str, Any]) -> Results:
        mask = x["mask"].float()
        rewards = -KL_COEF * algos.kl_penalty(x["logprobs"], x["ref_logprobs"], "k1") * mask
        last = x["mask"].sum(1) - 1
        rewards[torch.arange(len(last), device=last.device), last] += x["scores"]
        advantages, returns = algos.compute_gae_advantage_return(rewards, x["values"], mask, gae.GAMMA, gae.LAM)
        return advantages * mask, returns * mask

    return no_grad(run)


def truth(x: dict[str, Any]) -> Results:
    return eager({k: v.double() if v.is_floating_point() else v for k, v in x.items()})


def cases() -> Iterator[Case]:
    for rows, length in ((64, 1024), (256, 8192)):

        def limit(m: Machine, tokens: int = rows * length) -> float:
            return m.seconds(read=13 * tokens, written=16 * tokens)

        found: dict[str, Call | str] = {
            OURS: ours,
            "gae alone": gae_alone,
            "eager": eager,
            "verl": peer(peers.verl, of_verl),
        }
        yield Case(
            "advantages",
            f"[{rows}, {length}] fp32",
            partial(make, rows, length),
            found,
            truth,
            limit,
            {"gae alone": 1 / 1.5},
            memory=False,
        )
