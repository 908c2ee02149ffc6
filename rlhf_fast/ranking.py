"""Losses on answers that are judged alone or in order: KTO, Plackett-Luce, and a length covariate for reward models."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._types import LossOutput, Stats
from rlhf_fast.preference import kl_baseline, mean_over
from rlhf_fast.preference_kinds import kto_terms

KTO_STATS = ("kl", "desirable_reward", "undesirable_reward", "desirable", "undesirable")
"""z0 in nats; means of beta x log-ratio over the answers of each label, 0 without any; how many there are."""

PLACKETT_LUCE_STATS = ("accuracy", "lists")
"""Share of neighbouring answers that the scores order like the ranking (ties count 0.5); lists with two answers or more."""


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    *,
    kl_logratios: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> LossOutput:
    """Mean over answers that are labelled desirable or not (Ethayarajh et al. 2024, arXiv 2402.01306).

    r = logprobs - ref_logprobs; z0 = max(0, mean of kl_logratios), a constant; a desirable answer costs
    desirable_weight (1 - sigmoid(beta (r - z0))), another undesirable_weight (1 - sigmoid(beta (z0 - r))). The paper keeps
    desirable_weight n_desirable / (undesirable_weight n_undesirable) in [1, 4/3]; the counts are among the statistics.

    Args:
        logprobs: (N,) log-probs of whole answers, in nats.
        ref_logprobs: (N,) the same under the reference, constants.
        desirable: (N,) bool.
        kl_logratios: (M,) log-ratios policy / reference of answers to other prompts, constants. Micro-batches of one batch
            share all of them.
        beta: > 0.
        desirable_weight, undesirable_weight: >= 0.
        mask: (N,) False = answer to leave out (never read, no gradient).
        normalizer: > 0, replaces the number of answers: with that of the whole batch, micro-batches add up to it.

    Returns:
        LossOutput(loss, stats); the loss is a scalar, 0 without answers; stats are KTO_STATS.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    op = "kto_loss"
    _check.floating(op, "logprobs", logprobs)
    if logprobs.dim() != 1:
        raise _check.error(ValueError, op, "logprobs", f"shape {tuple(logprobs.shape)}", "(N,)")
    _check.like(op, "ref_logprobs", ref_logprobs, logprobs, "logprobs")
    _check.boolean(op, "desirable", desirable)
    good = _check.mask_like(op, desirable, logprobs, "logprobs", "desirable")
    assert good is not None
    mask = _check.mask_like(op, mask, logprobs, "logprobs")
    if mask is None:
        mask = torch.ones_like(good)
    beta = _check.number(op, "beta", beta, 0.0, open_low=True)
    desirable_weight = _check.number(op, "desirable_weight", desirable_weight, 0.0)
    undesirable_weight = _check.number(op, "undesirable_weight", undesirable_weight, 0.0)
    wide, ref = _check.common_wide(logprobs, ref_logprobs)
    assert wide is not None and ref is not None
    ratio = wide.where(mask, 0.0) - ref.detach().where(mask, 0.0)
    kl = kl_baseline(op, kl_logratios, ratio)
    wanted, unwanted = kto_terms(ratio, ratio, kl, beta)
    losses = torch.where(good, desirable_weight * wanted, undesirable_weight * unwanted)
    return LossOutput(
        mean_over(op, losses, mask, normalizer), Stats(_kto_stats(beta * ratio, good, mask, kl), KTO_STATS)
    )


@torch.no_grad()
def _kto_stats(rewards: Tensor, good: Tensor, mask: Tensor, kl: Tensor) -> Tensor:
    sides = [mask & good, mask & ~good]
    counts = [side.sum().to(rewards.dtype) for side in sides]
    means = [rewards.where(s, 0.0).sum() / n.clamp(min=1) for s, n in zip(sides, counts, strict=True)]
    return torch.stack([kl, *means, *counts])


def plackett_luce_loss(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    normalizer: Tensor | float | None = None,
) -> LossOutput:
    """Mean negative log-likelihood of rankings: -sum over k of (s_k - logsumexp(s_k .. s_K)), best answer first.

    Plackett 1975, Luce 1959; for preferences Rafailov et al. 2023 (arXiv 2305.18290) eq. 18: with beta x log-ratios as scores it
    is DPO on lists. Two answers give Bradley-Terry, `reward_loss` on one pair.

    Args:
        scores: (B, K) scores of the answers to one prompt, from the best to the worst.
        mask: like scores, False = no answer (never read, no gradient); lists may differ in length.
        normalizer: > 0, replaces the number of lists with two answers or more.

    Returns:
        LossOutput(loss, stats); the loss is a scalar, 0 without such a list; stats are PLACKETT_LUCE_STATS.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    op = "plackett_luce_loss"
    _check.floating(op, "scores", scores)
    if scores.dim() != 2:
        raise _check.error(ValueError, op, "scores", f"shape {tuple(scores.shape)}", "(B, K)")
    real = _check.mask_like(op, mask, scores, "scores")
    if real is None:
        real = torch.ones_like(scores, dtype=torch.bool)
    s = _check.wide(scores).where(real, 0.0)
    lists = real.sum(1) > 1
    if s.shape[1] == 0:
        zero = s.sum()
        return LossOutput(zero, Stats(torch.stack([zero.detach(), zero.detach()]), PLACKETT_LUCE_STATS))
    # The lowest finite number rather than -inf: a missing answer at the tail would make a logsumexp of nothing.
    hidden = s.masked_fill(~real, torch.finfo(s.dtype).min)
    rest = hidden.flip(1).logcumsumexp(1).flip(1)
    losses = (rest - s).where(real, 0.0).sum(1)
    return LossOutput(
        mean_over(op, losses, lists, normalizer), Stats(_order_stats(s, real, lists), PLACKETT_LUCE_STATS)
    )


@torch.no_grad()
def _order_stats(s: Tensor, real: Tensor, lists: Tensor) -> Tensor:
    order = (~real).long().argsort(dim=1, stable=True)  # the answers of a list next to each other
    s, real = s.gather(1, order), real.gather(1, order)
    neighbours = real[:, :-1] & real[:, 1:]
    gap = s[:, :-1] - s[:, 1:]
    hits = (gap > 0).to(s.dtype) + 0.5 * (gap == 0).to(s.dtype)
    accuracy = hits.where(neighbours, 0.0).sum() / neighbours.sum().clamp(min=1)
    return torch.stack([accuracy, lists.sum().to(s.dtype)])


def with_length_covariate(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    coef: Tensor | float,
    *,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scores for `reward_loss` whose difference holds coef tanh((|chosen| - |rejected|) / scale), so that length explains its share.

    The length term of the logit in length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475), scale being the
    standard deviation of the differences there. Half goes to either score, so a centring term sees none of it. Rewards are
    the scores before.

    Args:
        chosen_scores, rejected_scores: (...) scores of the two answers of each pair.
        chosen_lengths, rejected_lengths: like the scores, integer, in tokens.
        coef: a number, or a 0-d tensor, which may be learned.
        scale: > 0, in tokens; a number or a 0-d constant.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    op = "with_length_covariate"
    _check.floating(op, "chosen_scores", chosen_scores)
    _check.like(op, "rejected_scores", rejected_scores, chosen_scores, "chosen_scores")
    for name, x in (("chosen_lengths", chosen_lengths), ("rejected_lengths", rejected_lengths)):
        _check.integer(op, name, x)
        _check.shape(op, name, x, chosen_scores.shape, "chosen_scores")
        _check.device(op, name, x, chosen_scores, "chosen_scores")
    for name, value in (("coef", coef), ("scale", scale)):
        if isinstance(value, Tensor):
            if value.dim() != 0:
                raise _check.error(ValueError, op, name, f"shape {tuple(value.shape)}", "a number or a 0-d tensor")
        elif name == "coef":
            _check.number(op, name, value)
        else:
            _check.number(op, name, value, 0.0, open_low=True)
    chosen, rejected = _check.common_wide(chosen_scores, rejected_scores)
    assert chosen is not None and rejected is not None
    scale = scale.detach() if isinstance(scale, Tensor) else scale
    longer = (chosen_lengths.long() - rejected_lengths.long()).to(chosen.dtype)
    half = 0.5 * coef * torch.tanh(longer / scale)
    return chosen + half, rejected - half
