"""Losses on preference pairs by name, and what some of them keep between steps. The kinds are in `preference_kinds`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._types import PreferenceOutput
from rlhf_fast.ops.dpo_loss import Answers, Curve, answers, check_pairs, pair_loss
from rlhf_fast.ops.ppo_loss import scalar
from rlhf_fast.preference_kinds import CURVES, DIVERGENCES, KINDS, Pairs
from rlhf_fast.sequences import sequence_logprobs

_RANGES: dict[str, tuple[float, float]] = {
    "label_smoothing": (0.0, math.nextafter(0.5, 0.0)),
    "gamma": (-math.inf, math.inf),
    "delta": (-math.inf, math.inf),
    "penalty": (0.0, math.inf),
    "nll_coef": (0.0, math.inf),
    "length_coef": (-math.inf, math.inf),
    "tau": (math.ulp(0.0), 1.0),
    "alpha": (-math.inf, math.inf),
    "desirable_weight": (0.0, math.inf),
    "undesirable_weight": (0.0, math.inf),
}
"""Of the options; tau > 1 would let exp(-x) outgrow its gate."""

OP = "preference_loss"


def preference_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    *,
    kind: str | Mapping[str, float] = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    kl_logratios: Tensor | None = None,
    weights: Tensor | None = None,
    divergence: str = "reverse_kl",
    gamma: float = 0.0,
    delta: float | Tensor = 0.0,
    penalty: float = 50.0,
    nll_coef: float = 1.0,
    length_coef: float = 0.01,
    tau: float = 0.05,
    alpha: float | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
    fused: bool | None = None,
) -> PreferenceOutput:
    """Mean loss over pairs of (chosen, rejected) answers; D = (chosen - ref_chosen) - (rejected - ref_rejected).

    Takes the log-probs of whole answers, or of their tokens with masks, as `token_logprobs` and `linear_token_logprobs` give
    them: those are summed over each answer, and its tokens counted. The kinds that depend on D alone then run in one pass, by the
    kernel of `dpo_loss`.

    The formula and the paper of each kind are in KINDS. Length-desensitised DPO (Liu et al. 2024, arXiv 2409.06411) is dpo on
    log-probs of `sequence_logprobs` with a tail weight; TR-DPO (Gorbatovski et al. 2024, 2404.09656) is any kind with
    `update_reference` between steps.

    Args:
        chosen_logprobs, rejected_logprobs: (B,) log-probs of the whole answers (sums over tokens), in nats; or of their tokens,
            (B, T) and (B, T'), or (N,) and (N',) with the cu_seqlens of that side.
        ref_chosen_logprobs, ref_rejected_logprobs: like them, under the reference, constants. Required by the kinds that
            compare with it, refused by the others.
        kind: one of KINDS, or {kind: weight} for a weighted sum (MPO, Wang et al. 2024, arXiv 2411.10442: {"dpo": 0.8,
            "bco": 0.2, "sft": 1.0}) with one set of options.
        beta: > 0.
        label_smoothing: e in [0, 0.5), probability that the label is flipped; exo needs e > 0.
        chosen_lengths, rejected_lengths: (B,) tokens per answer, for the kinds that read them. The log-probs stay sums. None with
            log-probs of tokens.
        kl_logratios: (M,) log-ratios policy / reference of answers to other prompts, constants; for kto: z0 is their mean,
            at least 0. Micro-batches of one batch share all of them.
        weights: (B,) constant factors of the pairs' losses.
        divergence: one of DIVERGENCES, for the kinds that allow it (f-DPO); "alpha" is (1 - u^-alpha) / alpha, so TRL's
            coefficient is 1 - alpha.
        gamma: target margin of simpo and alpha_po, in units of the loss's logit (TRL's simpo_gamma), and slic's delta.
        delta: reward shift of bco, a number or a 0-d constant; see `running_delta`.
        penalty, nll_coef, length_coef, tau, alpha, desirable_weight, undesirable_weight: as in the formulas.
        mask: (B,) False = pair to leave out (never read, no gradient).
        normalizer: > 0, replaces the number of pairs: with that of the whole batch, micro-batches add up to its loss and
            gradient, but for the kinds that look across the batch (aot, aot_unpaired).
        chosen_mask, rejected_mask: like the log-probs of tokens, True = token of the answer; None = all. Masked tokens are never
            read; gradient 0.
        chosen_cu_seqlens, rejected_cu_seqlens: (B+1,) boundaries of packed answers.
        fused: None = log-probs of tokens in one pass where the kernel of `dpo_loss` covers the kind, else by the formula; False =
            by the formula, which can be differentiated twice; True = in one pass or an error.

    Returns:
        PreferenceOutput(loss, chosen_rewards, rejected_rewards): a scalar, 0 without pairs, and (B,) beta x what the (first)
        kind compares: log-ratio or log-prob. kto sums the terms of both answers, so its loss is twice TRL's mean over answers.

    Raises:
        TypeError, ValueError: wrong kind, dtype, shape, device or range, an argument the kind does not read; names it.
    """
    mixture = _mixture(kind)
    rules = [KINDS[name] for name in mixture]
    beta = _check.number(OP, "beta", beta, 0.0, open_low=True)
    _divergence(mixture, divergence)
    options = _options(
        mixture,
        divergence,
        label_smoothing=label_smoothing,
        gamma=gamma,
        delta=delta,
        penalty=penalty,
        nll_coef=nll_coef,
        length_coef=length_coef,
        tau=tau,
        alpha=alpha,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    _check.floating(OP, "chosen_logprobs", chosen_logprobs)
    if chosen_logprobs.dim() == 2 or chosen_cu_seqlens is not None:
        sides = (
            answers(OP, "chosen", chosen_logprobs, ref_chosen_logprobs, chosen_mask, chosen_cu_seqlens),
            answers(OP, "rejected", rejected_logprobs, ref_rejected_logprobs, rejected_mask, rejected_cu_seqlens),
        )
        check_pairs(OP, *sides)
        _refuse("None with log-probs of tokens", chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
        curve = _curve(mixture, divergence, beta, options)
        _covered(fused, curve, mixture)
        if curve is not None and fused is not False:
            _references(mixture, chosen_logprobs, ref_chosen_logprobs, rejected_logprobs, ref_rejected_logprobs)
            _kl(mixture, kl_logratios, chosen_logprobs)
            return pair_loss(OP, *sides, mask, weights, normalizer, beta, curve, rules[0].per_token)
        (chosen_logprobs, ref_chosen_logprobs, chosen_lengths), rest = map(_whole, sides)
        rejected_logprobs, ref_rejected_logprobs, rejected_lengths = rest
        if not any(r.per_token or r.lengths for r in rules):
            chosen_lengths = rejected_lengths = None
    elif chosen_logprobs.dim() == 1:
        masks = {"chosen_mask": chosen_mask, "rejected_mask": rejected_mask}
        _refuse("None with log-probs of whole answers", **masks, rejected_cu_seqlens=rejected_cu_seqlens)
        _covered(fused, None, mixture)
    else:
        shape = f"shape {tuple(chosen_logprobs.shape)}"
        raise _check.error(ValueError, OP, "chosen_logprobs", shape, "(B,), or (B, T) of tokens")
    _check.like(OP, "rejected_logprobs", rejected_logprobs, chosen_logprobs, "chosen_logprobs")
    _references(mixture, chosen_logprobs, ref_chosen_logprobs, chosen_logprobs, ref_rejected_logprobs)
    mask = _check.mask_like(OP, mask, chosen_logprobs, "chosen_logprobs")
    if mask is None:
        mask = torch.ones_like(chosen_logprobs, dtype=torch.bool)
    lengths = _lengths(mixture, chosen_lengths, rejected_lengths, chosen_logprobs)
    if weights is not None:
        _check.like(OP, "weights", weights, chosen_logprobs, "chosen_logprobs")
        if any(r.across for r in rules):
            raise _check.error(ValueError, OP, "weights", "a tensor", f"None: {_names(mixture)} pairs answers by rank")

    chosen, rejected, *constants = _check.common_wide(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights
    )
    assert chosen is not None and rejected is not None
    policy_chosen, policy_rejected = chosen.where(mask, 0.0), rejected.where(mask, 0.0)
    ref_chosen, ref_rejected, weights = (None if x is None else x.detach().where(mask, 0.0) for x in constants)
    kl = _kl(mixture, kl_logratios, policy_chosen)
    lengths_w, lengths_l = (None if n is None else n.where(mask, 1).to(policy_chosen.dtype) for n in lengths)

    total: Tensor | None = None
    rewards: list[Tensor] = []
    for name, share in mixture.items():
        compared = [policy_chosen, policy_rejected]
        if KINDS[name].reference:
            assert ref_chosen is not None and ref_rejected is not None
            compared = [policy_chosen - ref_chosen, policy_rejected - ref_rejected]
        if KINDS[name].per_token:
            assert lengths_w is not None and lengths_l is not None
            compared = [compared[0] / lengths_w, compared[1] / lengths_l]
        rewards = rewards or [beta * x.detach() for x in compared]
        if KINDS[name].divergence:
            compared = [DIVERGENCES[divergence](x, alpha or 0.0) for x in compared]
        chosen, rejected = compared
        pairs = Pairs(
            chosen, rejected, policy_chosen, policy_rejected, ref_chosen, ref_rejected, lengths_w, lengths_l, mask, kl, beta,
            **options,
        )  # fmt: skip
        losses = KINDS[name].loss(pairs)
        total = share * losses if total is None else total + share * losses
    assert total is not None
    if weights is not None:
        total = total * weights
    return PreferenceOutput(mean_over(OP, total, mask, normalizer), *rewards)


def _references(
    mixture: Mapping[str, float],
    chosen: Tensor,
    ref_chosen: Tensor | None,
    rejected: Tensor,
    ref_rejected: Tensor | None,
) -> None:
    for side, x, like in (("chosen", ref_chosen, chosen), ("rejected", ref_rejected, rejected)):
        name = f"ref_{side}_logprobs"
        if any(KINDS[kind].reference for kind in mixture):
            _check.like(OP, name, x, like, "chosen_logprobs" if like is chosen else "rejected_logprobs")
        elif x is not None:
            raise _check.error(ValueError, OP, name, "a tensor", f"None: {_names(mixture)} takes no reference")


def _refuse(expected: str, **given: Tensor | None) -> None:
    for name, x in given.items():
        if x is not None:
            raise _check.error(ValueError, OP, name, "a tensor", expected)


def _covered(fused: bool | None, curve: Curve | None, mixture: Mapping[str, float]) -> None:
    if fused and curve is None:
        raise _check.error(
            ValueError, OP, "fused", True, f"None or False: no kernel covers {_names(mixture)} with these arguments"
        )


def _curve(mixture: Mapping[str, float], divergence: str, beta: float, options: Mapping[str, Any]) -> Curve | None:
    """What the kernel of `dpo_loss` computes, or None where it does not cover the call."""
    (name, share), *others = mixture.items()
    if others or share != 1 or divergence != "reverse_kl" or not KINDS[name].fused:
        return None
    return CURVES[KINDS[name].loss](beta, options["label_smoothing"], options["gamma"])


def _whole(x: Answers) -> tuple[Tensor, Tensor | None, Tensor]:
    """(log-probs, reference, lengths) of whole answers from those of their tokens."""
    found, ref = sequence_logprobs(x.logprobs, x.mask, cu_seqlens=x.cu_seqlens), None
    if x.ref_logprobs is not None:
        ref = sequence_logprobs(x.ref_logprobs.detach(), x.mask, cu_seqlens=x.cu_seqlens).logprobs
    return found.logprobs, ref, found.lengths


def mean_over(op: str, losses: Tensor, mask: Tensor, normalizer: Tensor | float | None) -> Tensor:
    """Sum of the real losses over their number, or over a checked `normalizer`; 0 where that is 0."""
    if normalizer is None:
        count = mask.sum().to(losses.dtype)
    elif isinstance(normalizer, Tensor):
        count = scalar(op, normalizer, losses)
    else:
        count = losses.new_full((), _check.number(op, "normalizer", normalizer, 0.0, open_low=True))
    total = losses.where(mask, 0.0).sum()
    return torch.where(count > 0, total / count.where(count > 0, 1.0), 0.0)


@torch.no_grad()
def running_delta(delta: Tensor, seen: Tensor, rewards: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(delta, answers seen), 0-d each, after one more batch: the running mean of all implicit rewards that bco subtracts.

    Jung et al. 2024 (arXiv 2404.04656). Start from zeros. rewards: (...) beta x log-ratios of chosen and rejected answers, as
    `preference_loss` returns them; TRL counts a batch before its loss. mask: like rewards, False = not counted, never read.

    Raises TypeError or ValueError naming the argument.
    """
    _check.floating("running_delta", "rewards", rewards)
    mask = _check.mask_like("running_delta", mask, rewards, "rewards")
    real = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    total = seen + real.sum()
    return delta + (rewards - delta).where(real, 0.0).sum() / total.clamp(min=1), total


@torch.no_grad()
def update_reference(reference: Iterable[Tensor], policy: Iterable[Tensor], alpha: float = 0.6) -> None:
    """reference <- alpha policy + (1 - alpha) reference, in place (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656).

    alpha 1 is a hard update. TRL takes alpha 0.6 every 512 steps.

    Raises ValueError when the two do not hold as many tensors of the same shapes, before any is changed.
    """
    alpha = _check.number("update_reference", "alpha", alpha, 0.0, 1.0)
    targets, sources = list(reference), list(policy)
    if [x.shape for x in targets] != [x.shape for x in sources]:
        raise _check.error(
            ValueError, "update_reference", "policy", f"{len(sources)} tensors", f"the {len(targets)} shapes of the reference"
        )  # fmt: skip
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source.to(target.device, target.dtype), alpha)


def _names(mixture: Mapping[str, float]) -> str:
    return " + ".join(mixture)


def _mixture(kind: str | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(kind, Mapping):
        _check.choice(OP, "kind", kind, tuple(KINDS))
        return {kind: 1.0}
    if not kind:
        raise _check.error(ValueError, OP, "kind", "an empty mapping", "at least one kind")
    for name in kind:
        _check.choice(OP, "kind", name, tuple(KINDS))
    return {name: _check.number(OP, f"kind[{name!r}]", weight) for name, weight in kind.items()}


def _divergence(mixture: Mapping[str, float], divergence: str) -> None:
    _check.choice(OP, "divergence", divergence, tuple(DIVERGENCES))
    if divergence != "reverse_kl" and not any(KINDS[name].divergence for name in mixture):
        readers = ", ".join(name for name, rules in KINDS.items() if rules.divergence)
        raise _check.error(
            ValueError, OP, "divergence", repr(divergence), f"'reverse_kl' with kind {_names(mixture)} (only {readers} read it)"
        )  # fmt: skip


def _options(mixture: Mapping[str, float], divergence: str, **given: Any) -> dict[str, Any]:
    """The options, each a number in its range (delta also a 0-d tensor); none is set that no kind of the mixture reads."""
    read = {option for name in mixture for option in KINDS[name].options}
    if divergence == "alpha":
        read.add("alpha")
    defaults = preference_loss.__kwdefaults__ or {}
    for option, value in given.items():
        if isinstance(value, Tensor) and option == "delta":
            if value.dim() != 0:
                raise _check.error(ValueError, OP, option, f"shape {tuple(value.shape)}", "a number or a 0-d tensor")
            given[option], changed = value.detach(), True
        elif value is None and option == "alpha":
            if "alpha" in read:
                raise _check.error(
                    ValueError, OP, "alpha", None, f"a number with {_names(mixture)} and divergence {divergence!r}"
                )
            changed = False
        else:
            given[option] = _check.number(OP, option, value, *_RANGES[option])
            changed = value != defaults[option]
        if changed and option not in read:
            readers = ", ".join(name for name, rules in KINDS.items() if option in rules.options)
            raise _check.error(
                ValueError, OP, option, value, f"{defaults[option]} with kind {_names(mixture)} (only {readers} read it)"
            )  # fmt: skip
    if "exo" in mixture and given["label_smoothing"] == 0:
        raise _check.error(ValueError, OP, "label_smoothing", 0.0, "a number in (0, 0.5) with kind exo")
    return given


def _lengths(
    mixture: Mapping[str, float], chosen: Tensor | None, rejected: Tensor | None, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    read = any(KINDS[name].per_token or KINDS[name].lengths for name in mixture)
    for name, x in {"chosen_lengths": chosen, "rejected_lengths": rejected}.items():
        if not read:
            if x is not None:
                readers = ", ".join(k for k, r in KINDS.items() if r.per_token or r.lengths)
                raise _check.error(
                    ValueError, OP, name, "a tensor", f"None with kind {_names(mixture)} (only {readers} read it)"
                )
            continue
        if x is None:
            raise _check.error(ValueError, OP, name, None, f"a tensor (B,): {_names(mixture)} reads the lengths")
        _check.integer(OP, name, x)
        _check.shape(OP, name, x, like.shape, "chosen_logprobs")
        _check.device(OP, name, x, like, "chosen_logprobs")
    return None if chosen is None else chosen.clamp(min=1), None if rejected is None else rejected.clamp(min=1)


def _kl(mixture: Mapping[str, float], logratios: Tensor | None, like: Tensor) -> Tensor | None:
    if "kto" in mixture:
        return kl_baseline(OP, logratios, like)
    if logratios is not None:
        raise _check.error(
            ValueError, OP, "kl_logratios", "a tensor", f"None with kind {_names(mixture)} (only kto reads it)"
        )
    return None


def kl_baseline(op: str, logratios: Tensor | None, like: Tensor) -> Tensor:
    """z0 of KTO, 0-d: the mean of the mismatched log-ratios, at least 0; 0 without any."""
    _check.floating(op, "kl_logratios", logratios)
    assert logratios is not None
    if logratios.dim() != 1:
        raise _check.error(ValueError, op, "kl_logratios", f"shape {tuple(logratios.shape)}", "(M,)")
    _check.device(op, "kl_logratios", logratios, like, "the log-probs")
    return (logratios.detach().to(like.dtype).sum() / max(1, logratios.numel())).clamp(min=0)
