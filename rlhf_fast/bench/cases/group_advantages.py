"""group_advantages against eager PyTorch and verl."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

import rlhf_fast
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases.common import no_grad, peer
from rlhf_fast.bench.engine import OURS, Call, Case, Results


def make(groups: int, size: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(groups * size, generator=g)
    return {
        "scores": torch.randn(groups * size, generator=g),
        "group_ids": torch.arange(groups).repeat_interleave(size)[order],
    }


def ours(x: dict[str, Any]) -> Results:
    return (rlhf_fast.group_advantages(x["scores"], x["group_ids"], "grpo"),)


def eager(x: dict[str, Any]) -> Results:
    with rlhf_fast.use_backend("reference"):
        return ours(x)


def of_verl(algos: Any) -> Call:
    """Takes token rewards; one token per completion asks for the least work."""

    def run(x: dict[str, Any]) -> Results:
        ids: np.ndarray = x["group_ids"].numpy()
        rewards = x["scores"][:, None]
        found, _ = algos.compute_grpo_outcome_advantage(rewards, torch.ones_like(rewards), ids)
        return (found[:, 0],)

    return no_grad(run)


def cases() -> Iterator[Case]:
    for groups, size in ((64, 8), (1024, 16)):
        found: dict[str, Call | str] = {OURS: ours, "eager": eager, "verl": peer(peers.verl, of_verl)}
        yield Case(
            "group_advantages",
            f"grpo, {groups} groups of {size}",
            partial(make, groups, size),
            found,
            lambda x: eager(x | {"scores": x["scores"].double()}),
            memory=False,
            seconds=4,
        )
