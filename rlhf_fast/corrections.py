"""Weights and masks for samples that another policy drew than the one that is trained: engine mismatch and stale weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._sequences import Layout, layout
from rlhf_fast._types import Stats
from rlhf_fast.ops.ppo_loss import token_advantages
from rlhf_fast.reference.kl_estimate import k3_of

STATS = ("weight_mean", "weight_min", "weight_max", "bounded_fraction", "effective_samples", "approx_kl_k3", "tokens")
"""Of the returned weights over the real tokens, 0 without any; bounded_fraction: share of tokens whose weight a bound changed;
effective_samples: (sum w)^2 / (N sum w^2); approx_kl_k3: KL(rollout || old) in nats; tokens is a count."""

LOG_CLAMP = 20.0
"""Bound of a log-weight on both sides, of a token or of a whole sequence (verl)."""

Bounds = tuple[float | None, float | None]


class RolloutCorrection(NamedTuple):
    """What `rollout_correction` returns; all constants."""

    weights: Tensor
    """Like the log-probs, 0 where masked or rejected: `importance_weights` of the losses."""
    keep: Tensor
    """Real tokens that were not rejected."""
    stats: Stats


def _token(d: Tensor, at: Layout) -> Tensor:
    return d.clamp(-LOG_CLAMP, LOG_CLAMP).exp()


def _sequence(d: Tensor, at: Layout) -> Tensor:
    """Likelihood ratio of the whole sequence: 1.1 per token is 13,780 after 100 tokens."""
    return at.sum(d).clamp(-LOG_CLAMP, LOG_CLAMP).exp()


def _geometric(d: Tensor, at: Layout) -> Tensor:
    return at.mean(d).clamp(-LOG_CLAMP, LOG_CLAMP).exp()


def _mean_k3(d: Tensor, at: Layout) -> Tensor:
    return at.mean(k3_of(d.clamp(-LOG_CLAMP, LOG_CLAMP)))


class Kind(NamedTuple):
    """A number per token, and what happens to the tokens where it leaves the bounds."""

    measure: Callable[[Tensor, Layout], Tensor]
    outside: str
    """"clamp": the weight is the number, clamped; "drop": the weight is the number, 0 outside; "reject": 1, 0 outside."""
    bounds: Bounds
    """Default (low, high), None for none."""


KINDS: dict[str, Kind] = {
    "token": Kind(_token, "clamp", (None, None)),
    "token-tis": Kind(_token, "clamp", (None, 2.0)),
    "sequence-tis": Kind(_sequence, "clamp", (None, 2.0)),
    "token-mis": Kind(_token, "drop", (0.5, 5.0)),
    "sequence-mis": Kind(_sequence, "drop", (None, 3.0)),
    "geometric": Kind(_geometric, "reject", (0.999, 1.001)),
    "mean-k3": Kind(_mean_k3, "reject", (None, 0.01)),
}


@torch.no_grad()
def rollout_correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    kind: str = "token-tis",
    bounds: Bounds | float | None = None,
    normalize: bool = False,
    process_group: object | None = None,
    cu_seqlens: Tensor | None = None,
) -> RolloutCorrection:
    """Importance weights pi_old / pi_rollout for tokens that an inference engine or an older policy drew.

    With w = exp(old_logprobs - rollout_logprobs):
    token: w, unbounded (the factor of decoupled PPO, Fu et al. 2025, arXiv 2505.24298); token-tis: min(w, high), truncated
    importance sampling; sequence-tis: the product of w over the sequence, truncated; token-mis, sequence-mis: the same two, but
    0 outside the bounds (IcePop; TRL's "mask" modes); geometric: the sequence is rejected when exp(mean log w) leaves the
    bounds; mean-k3: when mean(w - 1 - log w) exceeds the upper one (both as in verl's rollout correction).
    Weights and rejections combine by multiplication. The weights are a factor of the policy term and leave its denominators as
    they are; `mask=keep` instead takes rejected tokens out of the denominators as well.
    Where old_logprobs are the rollout's own ("bypass"), the ratio of the loss already is pi / pi_rollout: these weights are
    then 1, and multiplying by any other would count the mismatch twice.

    Args:
        old_logprobs: (B, T), in nats, of the policy that the loss calls old, recomputed by the trainer; (N,) with cu_seqlens.
        rollout_logprobs: like old_logprobs, as the engine that sampled reports them.
        mask: like old_logprobs, True = real token. Masked tokens are never read.
        kind: one of the seven above.
        bounds: (low, high) of the number that the kind looks at, None for no bound on a side; a number: high alone. Default: that
            of KINDS.
        normalize: divide the weights by their mean over the real tokens of the batch (of all ranks with process_group), which
            has to be the whole batch of the step: the mean of a part is another number.
        process_group: ranks over which `normalize` takes its mean.
        cu_seqlens: (S+1,) boundaries of packed sequences.

    Returns:
        RolloutCorrection(weights, keep, stats), fp32 (fp64 when an input is fp64).

    Raises:
        TypeError, ValueError: wrong kind, dtype, shape, device or range; names the argument.
    """
    op = "rollout_correction"
    _check.choice(op, "kind", kind, tuple(KINDS))
    low, high = bounds_of(op, "bounds", kind, bounds)
    at = layout(op, "old_logprobs", old_logprobs, mask, cu_seqlens)
    _check.like(op, "rollout_logprobs", rollout_logprobs, old_logprobs, "old_logprobs")
    old, rollout = _check.common_wide(old_logprobs, rollout_logprobs)
    d = (old - rollout).where(at.mask, 0.0)  # type: ignore[operator]
    weights, inside = weigh(d, at, kind, low, high)
    count = at.mask.sum()
    if normalize:
        totals = torch.stack([weights.sum().double(), count.double()])
        if process_group is not None:
            torch.distributed.all_reduce(totals, group=process_group)  # type: ignore[arg-type]
        average = (totals[0] / totals[1].clamp(min=1)).to(weights.dtype)
        weights = torch.where(average > 0, weights / average.where(average > 0, 1.0), weights)
    keep = at.mask if KINDS[kind].outside == "clamp" else at.mask & inside
    mean = lambda x: x.to(d.dtype).where(at.mask, 0.0).sum() / count.clamp(min=1)
    extreme = lambda fill, f: torch.where(count > 0, f(weights.where(at.mask, fill)), 0.0) if d.numel() else d.sum()
    squares = weights.square().sum()
    stats = [
        mean(weights),
        extreme(math.inf, torch.amin),
        extreme(-math.inf, torch.amax),
        mean(~inside),
        torch.where(squares > 0, weights.sum().square() / (count * squares).where(squares > 0, 1.0), 0.0),
        mean(k3_of(d.clamp(-LOG_CLAMP, LOG_CLAMP))),
        count.to(d.dtype),
    ]
    return RolloutCorrection(weights, keep, Stats(torch.stack(stats), STATS))


def weigh(d: Tensor, at: Layout, kind: str, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(weights, whether the number lies within the bounds) of log-weights `d`, which are 0 where masked; weights are 0 there."""
    measure, outside, _ = KINDS[kind]
    x = measure(d, at)
    inside = (x >= low) & (x <= high)
    if outside == "clamp":
        weights = x.clamp(low, high)
    else:
        weights = (x if outside == "drop" else torch.ones_like(x)).where(inside, 0.0)
    return weights.where(at.mask, 0.0), inside


def bounds_of(op: str, argument: str, kind: str, bounds: Bounds | float | None) -> tuple[float, float]:
    """Checked bounds of a kind, its own for None."""
    bounds = KINDS[kind].bounds if bounds is None else bounds
    pair = bounds if isinstance(bounds, (tuple, list)) else (None, bounds)
    if len(pair) != 2:
        raise _check.error(ValueError, op, argument, repr(bounds), "a number or a pair (low, high)")
    low = 0.0 if pair[0] is None else _check.number(op, argument, pair[0], 0.0)
    high = math.inf if pair[1] is None else _check.number(op, argument, pair[1], 0.0, open_low=True)
    if low > high:
        raise _check.error(ValueError, op, argument, repr(bounds), "low <= high")
    return low, high


@torch.no_grad()
def off_policy_mask(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Real tokens outside of stale bad samples (DeepSeek-V3.2, arXiv 2512.02556, eq. 9).

    A token is dropped where its advantage is negative and its sequence's mean of rollout_logprobs - logprobs exceeds the
    threshold: the policy has already left that answer. Pass the result as the mask of the loss, or as a factor of its
    importance_weights, which leaves the denominators as they are (TRL's form).

    Args:
        logprobs: (B, T), in nats, of the policy that is trained; (N,) with cu_seqlens.
        rollout_logprobs: like logprobs, of the policy or engine that sampled.
        advantages: like logprobs, or one per sequence.
        mask: like logprobs, True = real token. Masked tokens are never read.
        threshold: in nats per token.
        cu_seqlens: (S+1,) boundaries of packed sequences.

    Returns:
        bool, like logprobs.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    op = "off_policy_mask"
    threshold = _check.number(op, "threshold", threshold)
    at = layout(op, "logprobs", logprobs, mask, cu_seqlens)
    _check.floating(op, "advantages", advantages)
    advantages = token_advantages(advantages, logprobs, at.cu_seqlens)
    _check.like(op, "rollout_logprobs", rollout_logprobs, logprobs, "logprobs")
    _check.like(op, "advantages", advantages, logprobs, "logprobs")
    new, rollout, A = _check.common_wide(logprobs, rollout_logprobs, advantages)
    stale = at.mean((rollout - new).where(at.mask, 0.0)) > threshold  # type: ignore[operator]
    return at.mask & ~(stale & (A < 0))  # type: ignore[operator]
