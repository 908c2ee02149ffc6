"""ppo_loss with gradients and all statistics, against eager, compiled and the trainers' own losses; other hot recipes against
their formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases.common import compiled, leaf, peer
from rlhf_fast.bench.engine import OURS, Call, Case, Results
from rlhf_fast.bench.machine import Machine
from rlhf_fast.reference.ppo_loss import sample

VALUE_COEF, CLIP, VALUE_CLIP = 0.1, 0.2, 0.2

Loss = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


def make(rows: int, length: int) -> dict[str, Any]:
    x = sample((rows, length))
    return {k: x[k] for k in ("logprobs", "old_logprobs", "advantages", "mask", "values", "old_values", "returns")}


def with_gradients(loss_of: Loss) -> Call:
    def run(x: dict[str, Any]) -> Results:
        logprobs, values = leaf(x["logprobs"]), leaf(x["values"])
        loss = loss_of(logprobs, values, x)
        loss.backward()
        return loss.detach(), logprobs.grad, values.grad

    return run


def ours(logprobs: Tensor, values: Tensor, x: dict[str, Any]) -> Tensor:
    rest = {k: x[k] for k in ("old_values", "returns")}
    return rlhf_fast.ppo_loss(logprobs, x["old_logprobs"], x["advantages"], x["mask"], values=values, **rest).loss


def with_statistics(logprobs: Tensor, values: Tensor, x: dict[str, Any]) -> Tensor:
    """The reference: the same loss and the same statistics in PyTorch."""
    with rlhf_fast.use_backend("reference"):
        return ours(logprobs, values, x)


def bare(
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_values: Tensor,
    returns: Tensor,
) -> Tensor:
    """Loss alone."""
    ratio = (logprobs - old_logprobs).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    clipped = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    value = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return ((policy + VALUE_COEF * value) * mask).sum() / mask.sum()


def fed(function: Callable[..., Tensor]) -> Loss:
    names = ("old_logprobs", "advantages", "mask", "old_values", "returns")
    return lambda logprobs, values, x: function(logprobs, values, *(x[n] for n in names))


def of_verl(algos: Any) -> Call:
    from verl.workers.config import ActorConfig  # type: ignore[import-not-found]

    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=CLIP, clip_ratio_c=1e9
    )

    def loss(logprobs: Tensor, values: Tensor, x: dict[str, Any]) -> Tensor:
        mask = x["mask"].float()
        policy, _ = algos.compute_policy_loss_vanilla(
            x["old_logprobs"], logprobs, x["advantages"], mask, "token-mean", config
        )
        value, _ = algos.compute_value_loss(values, x["returns"], x["old_values"], mask, VALUE_CLIP)
        return policy + VALUE_COEF * value

    return with_gradients(loss)


def of_openrlhf(module: Any) -> Call:
    policy, value = module.PolicyLoss(CLIP, CLIP), module.ValueLoss(VALUE_CLIP)

    def loss(logprobs: Tensor, values: Tensor, x: dict[str, Any]) -> Tensor:
        mask = x["mask"].float()
        found = policy(logprobs, x["old_logprobs"], x["advantages"], mask)
        found = found[0] if isinstance(found, tuple) else found
        return found + VALUE_COEF * value(values, x["old_values"], x["returns"], mask)

    return with_gradients(loss)


HOT = ("cispo", "gspo")
"""Recipes whose surrogate or whose level of the ratio is another one, timed beside ppo."""


def of_recipe(recipe: str, fused: bool) -> Call:
    def run(x: dict[str, Any]) -> Results:
        logprobs = leaf(x["logprobs"])
        loss = rlhf_fast.policy_loss(recipe, logprobs, x["old_logprobs"], x["advantages"], x["mask"], fused=fused).loss
        loss.backward()
        return loss.detach(), logprobs.grad

    return run


def near(rows: int, length: int) -> dict[str, Any]:
    """An update's batch: small log-ratios, an advantage for each answer, most of them good, or the loss would be what is left of terms that cancel."""
    x = make(rows, length)
    g = torch.Generator().manual_seed(1)
    x["logprobs"] = x["old_logprobs"] + 0.01 * torch.randn(rows, length, generator=g)
    return {**x, "advantages": 1 + torch.randn(rows, generator=g)}


def truth_of(call: Call, x: dict[str, Any]) -> Results:
    """The same in fp64."""
    return call({k: v.double() if v.is_floating_point() else v for k, v in x.items()})


def truth(x: dict[str, Any]) -> Results:
    return truth_of(with_gradients(with_statistics), x)


def cases() -> Iterator[Case]:
    for rows, length in ((64, 1024), (256, 4096)):

        def limit(m: Machine, tokens: int = rows * length) -> float:
            return m.seconds(read=25 * tokens, written=8 * tokens)

        found: dict[str, Call | str] = {
            OURS: with_gradients(ours),
            "eager": with_gradients(with_statistics),
            "eager, loss alone": with_gradients(fed(bare)),
            "torch.compile, loss alone": with_gradients(fed(compiled(bare))),
            "verl": peer(peers.verl, of_verl),
            "OpenRLHF": peer(lambda: peers.openrlhf("models.loss"), of_openrlhf),
        }
        bars = {"eager": 8.0, "torch.compile, loss alone": 1.5} if rows == 64 else {}
        yield Case(
            "ppo_loss",
            f"[{rows}, {length}] fp32, forward + backward, policy and value",
            partial(make, rows, length),
            found,
            truth,
            limit,
            bars,
            memory=False,
        )
    for recipe in HOT:
        yield Case(
            "ppo_loss",
            f"{recipe} [64, 1024] fp32, forward + backward",
            partial(near, 64, 1024),
            {OURS: of_recipe(recipe, True), "eager": of_recipe(recipe, False)},
            partial(truth_of, of_recipe(recipe, False)),
            lambda m: m.seconds(read=13 * 65536, written=4 * 65536),
            {"eager": 8.0},
            memory=False,
            seconds=6,
        )
