"""reward_loss with gradients and statistics, against eager PyTorch and OpenRLHF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases.common import leaf, peer
from rlhf_fast.bench.engine import OURS, Call, Case, Results


def make(n: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {"chosen": 3 * torch.randn(n, generator=g), "rejected": 3 * torch.randn(n, generator=g)}


def with_gradients(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Call:
    def run(x: dict[str, Any]) -> Results:
        chosen, rejected = leaf(x["chosen"]), leaf(x["rejected"])
        loss = loss_of(chosen, rejected)
        loss.backward()
        return loss.detach(), chosen.grad, rejected.grad

    return run


def ours(chosen: Tensor, rejected: Tensor) -> Tensor:
    return rlhf_fast.reward_loss(chosen, rejected).loss


def eager(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def cases() -> Iterator[Case]:
    for n in (64, 65536):
        found: dict[str, Call | str] = {
            OURS: with_gradients(ours),
            "eager, loss alone": with_gradients(eager),
            "OpenRLHF": peer(
                lambda: peers.openrlhf("models.loss"), lambda m: with_gradients(lambda c, r: m.PairWiseLoss()(c, r))
            ),
        }
        yield Case(
            "reward_loss",
            f"{n} pairs, forward + backward",
            partial(make, n),
            found,
            lambda x: with_gradients(eager)({k: v.double() for k, v in x.items()}),
            memory=False,
            seconds=4,
        )
