"""dpo_loss from the log-probs of tokens, with gradients and rewards, against the formula on sums and TRL's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

import rlhf_fast
from rlhf_fast.bench.cases.common import compiled, leaf
from rlhf_fast.bench.cases.ppo_loss import truth_of
from rlhf_fast.bench.engine import OURS, Call, Case, Results
from rlhf_fast.bench.machine import Machine
from rlhf_fast.reference.dpo_loss import sample

BETA = 0.1
POLICY = ("chosen_logprobs", "rejected_logprobs")
REFERENCE = ("ref_chosen_logprobs", "ref_rejected_logprobs")
MASKS = ("chosen_mask", "rejected_mask")

Loss = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


def make(pairs: int, length: int) -> dict[str, Any]:
    x = sample((pairs, length), rejected_length=length)
    return {k: x[k] for k in (*POLICY, *REFERENCE, *MASKS)}


def with_gradients(loss_of: Loss) -> Call:
    def run(x: dict[str, Any]) -> Results:
        chosen, rejected = (leaf(x[k]) for k in POLICY)
        loss = loss_of(chosen, rejected, x)
        loss.backward()
        return loss.detach(), chosen.grad, rejected.grad

    return run


def ours(chosen: Tensor, rejected: Tensor, x: dict[str, Any], fused: bool | None = None) -> Tensor:
    masks = {k: x[k] for k in MASKS}
    return rlhf_fast.preference_loss(chosen, rejected, *(x[k] for k in REFERENCE), **masks, beta=BETA, fused=fused).loss


def bare(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
) -> Tensor:
    """Loss alone, with the sums in fp32: as in TRL's DPOTrainer."""
    gap = (chosen * chosen_mask).sum(-1) - (ref_chosen * chosen_mask).sum(-1)
    other = (rejected * rejected_mask).sum(-1) - (ref_rejected * rejected_mask).sum(-1)
    return -logsigmoid(BETA * (gap - other)).mean()


def fed(function: Callable[..., Tensor]) -> Loss:
    return lambda chosen, rejected, x: function(chosen, rejected, *(x[k] for k in (*REFERENCE, *MASKS)))


def truth(x: dict[str, Any]) -> Results:
    return truth_of(with_gradients(partial(ours, fused=False)), x)


def cases() -> Iterator[Case]:
    for pairs, length in ((16, 1024), (64, 2048)):

        def limit(m: Machine, tokens: int = 2 * pairs * length) -> float:
            return m.seconds(read=9 * tokens, written=4 * tokens)

        found: dict[str, Call | str] = {
            OURS: with_gradients(ours),
            "eager": with_gradients(partial(ours, fused=False)),
            "eager, loss alone": with_gradients(fed(bare)),
            "torch.compile, loss alone": with_gradients(fed(compiled(bare))),
        }
        yield Case(
            "dpo_loss",
            f"[{pairs}, {length}] chosen and rejected, fp32, forward + backward",
            partial(make, pairs, length),
            found,
            truth,
            limit,
            {"eager": 4.0} if pairs == 64 else {},
            memory=False,
            seconds=6,
        )
