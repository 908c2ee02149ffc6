"""Losses on preference pairs by name: one function of the implicit rewards and one line in KINDS each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast import _check
from rlhf_fast._types import PreferenceOutput


@dataclass(frozen=True)
class Pairs:
    """Inputs of a preference loss, (B,) each, with the settings that some of the kinds read."""

    chosen: Tensor
    """Log-ratio policy / reference of the chosen answer (its log-prob without a reference); per token with lengths."""
    rejected: Tensor
    beta: float
    label_smoothing: float
    gamma: float
    delta: float
    penalty: float
    chosen_logprobs: Tensor
    ref_chosen_logprobs: Tensor | None
    mask: Tensor

    @property
    def logits(self) -> Tensor:
        """beta D."""
        return self.beta * (self.chosen - self.rejected)


def _cdpo(p: Pairs) -> Tensor:
    return -(1 - p.label_smoothing) * logsigmoid(p.logits) - p.label_smoothing * logsigmoid(-p.logits)


def _robust(p: Pairs) -> Tensor:
    flipped = -(1 - p.label_smoothing) * logsigmoid(p.logits) + p.label_smoothing * logsigmoid(-p.logits)
    return flipped / (1 - 2 * p.label_smoothing)


def _ipo(p: Pairs) -> Tensor:
    return (p.chosen - p.rejected - 1 / (2 * p.beta)).square()


def _hinge(p: Pairs) -> Tensor:
    return torch.relu(1 - p.logits)


def _exo(p: Pairs) -> Tensor:
    """q log(q / (1 - e)) + (1 - q) log((1 - q) / e); the logs of q from logsigmoid, so that a sure pair stays finite."""
    e = p.label_smoothing
    q, log_q, log_rest = torch.sigmoid(p.logits), logsigmoid(p.logits), logsigmoid(-p.logits)
    return q * (log_q - torch.log1p(torch.full_like(q, -e))) + (1 - q) * (log_rest - torch.full_like(q, e).log())


def _nca(p: Pairs) -> Tensor:
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco(p: Pairs) -> Tensor:
    return -logsigmoid(p.beta * p.chosen - p.delta) - logsigmoid(-(p.beta * p.rejected - p.delta))


def _apo_zero(p: Pairs) -> Tensor:
    return 1 - torch.sigmoid(p.beta * p.chosen) + torch.sigmoid(p.beta * p.rejected)


def _apo_down(p: Pairs) -> Tensor:
    return torch.sigmoid(p.beta * p.chosen) + 1 - torch.sigmoid(p.logits)


def _sppo(p: Pairs) -> Tensor:
    return (p.chosen - 1 / (2 * p.beta)).square() + (p.rejected + 1 / (2 * p.beta)).square()


def _aot(p: Pairs) -> Tensor:
    """The k-th best chosen answer against the k-th best rejected one; pairs left out sort last in both."""
    order, other = (x.masked_fill(~p.mask, torch.inf).argsort(stable=True) for x in (p.chosen, p.rejected))
    losses = -logsigmoid(p.beta * (p.chosen[order] - p.rejected[other]))
    return torch.zeros_like(losses).scatter(0, order, losses)


def _discopop(p: Pairs) -> Tensor:
    x = p.logits
    gate = x / 0.05
    return -torch.sigmoid(-gate) * logsigmoid(x) + torch.exp(logsigmoid(gate) - x)


def _dpop(p: Pairs) -> Tensor:
    assert p.ref_chosen_logprobs is not None
    return -logsigmoid(p.logits - p.beta * p.penalty * torch.relu(p.ref_chosen_logprobs - p.chosen_logprobs))


def _simpo(p: Pairs) -> Tensor:
    return -logsigmoid(p.logits - p.gamma)


def _cpo(p: Pairs) -> Tensor:
    return -logsigmoid(p.logits) - p.chosen_logprobs


def _orpo(p: Pairs) -> Tensor:
    odds = p.chosen - p.rejected - (_log1mexp(p.chosen) - _log1mexp(p.rejected))
    return -p.chosen_logprobs - p.beta * logsigmoid(odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0 (Maechler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931472
    return torch.where(
        near, torch.log(-torch.expm1(x.where(near, -0.5))), torch.log1p(-torch.exp(x.where(~near, -1.0)))
    )


@dataclass(frozen=True)
class Kind:
    """How a loss reads its pairs."""

    loss: Callable[[Pairs], Tensor]
    options: tuple[str, ...] = ()
    """Keywords of preference_loss that it reads besides beta."""
    reference: bool = True
    """False: compares log-probs, not log-ratios, and takes no reference."""
    per_token: bool = False
    """Defined on means per token only, so the lengths are required."""


KINDS: dict[str, Kind] = {
    "dpo": Kind(_cdpo, ("label_smoothing",)),
    "cdpo": Kind(_cdpo, ("label_smoothing",)),
    "robust": Kind(_robust, ("label_smoothing",)),
    "ipo": Kind(_ipo),
    "hinge": Kind(_hinge),
    "exo": Kind(_exo, ("label_smoothing",)),
    "nca": Kind(_nca),
    "bco": Kind(_bco, ("delta",)),
    "apo_zero": Kind(_apo_zero),
    "apo_down": Kind(_apo_down),
    "sppo": Kind(_sppo),
    "aot": Kind(_aot),
    "discopop": Kind(_discopop),
    "dpop": Kind(_dpop, ("penalty",)),
    "simpo": Kind(_simpo, ("gamma",), reference=False, per_token=True),
    "cpo": Kind(_cpo, reference=False),
    "orpo": Kind(_orpo, reference=False, per_token=True),
}

OP = "preference_loss"


def preference_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    *,
    kind: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    gamma: float = 0.0,
    delta: float = 0.0,
    penalty: float = 50.0,
    mask: Tensor | None = None,
) -> PreferenceOutput:
    """Mean loss over pairs of (chosen, rejected) answers; D = (chosen - ref_chosen) - (rejected - ref_rejected).

    dpo / cdpo: -(1-e) log sigmoid(b D) - e log sigmoid(-b D) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); robust
    (2403.00409); ipo: (D - 1/(2b))^2 (2310.12036, eq. 17); hinge (2305.10425); exo (2402.00856); nca (2402.05369); bco
    (2404.04656); apo_zero, apo_down (2408.06266); sppo (2405.00675); aot; discopop; dpop (2402.13228); and without a
    reference simpo (2405.14734, eq. 6), cpo (2401.08417), orpo (2403.07691).

    Args:
        chosen_logprobs, rejected_logprobs: (B,) log-probs of the whole answers (sums over tokens), in nats.
        ref_chosen_logprobs, ref_rejected_logprobs: (B,) the same under the reference, constants. Required by the kinds that
            compare with it, refused by simpo, cpo and orpo.
        kind: one of KINDS.
        beta: > 0.
        label_smoothing: e in [0, 0.5); for dpo, cdpo, robust and exo (there > 0).
        chosen_lengths, rejected_lengths: (B,) tokens per answer; when given, every log-prob is a mean per token (IPO as in
            TRL, length-normalised DPO). Required by simpo and orpo.
        gamma: target margin of simpo, in the units of the loss's logit. delta: reward shift of bco. penalty: weight of dpop.
        mask: (B,) False = pair to leave out (never read, no gradient).

    Returns:
        PreferenceOutput(loss, chosen_rewards, rejected_rewards): a scalar, 0 without pairs, and beta x log-ratio (B,).

    Raises:
        TypeError, ValueError: wrong kind, dtype, shape, device or range, a keyword the kind does not read; names it.
    """
    _check.choice(OP, "kind", kind, tuple(KINDS))
    rules = KINDS[kind]
    beta = _check.number(OP, "beta", beta, 0.0, open_low=True)
    _options(
        kind,
        rules,
        label_smoothing=(label_smoothing, 0.0),
        gamma=(gamma, 0.0),
        delta=(delta, 0.0),
        penalty=(penalty, 50.0),
    )
    _check.floating(OP, "chosen_logprobs", chosen_logprobs)
    if chosen_logprobs.dim() != 1:
        raise _check.error(ValueError, OP, "chosen_logprobs", f"shape {tuple(chosen_logprobs.shape)}", "(B,)")
    _check.like(OP, "rejected_logprobs", rejected_logprobs, chosen_logprobs, "chosen_logprobs")
    for name, x in (
        ("ref_chosen_logprobs", ref_chosen_logprobs),
        ("ref_rejected_logprobs", ref_rejected_logprobs),
    ):
        if rules.reference:
            _check.like(OP, name, x, chosen_logprobs, "chosen_logprobs")
        elif x is not None:
            raise _check.error(ValueError, OP, name, "a tensor", f"None: {kind} takes no reference")
    mask = _check.mask_like(OP, mask, chosen_logprobs, "chosen_logprobs")
    if mask is None:
        mask = torch.ones_like(chosen_logprobs, dtype=torch.bool)
    lengths = _lengths(kind, rules, chosen_lengths, rejected_lengths, chosen_logprobs)

    tensors = _check.common_wide(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    zeroed = [None if x is None else x.where(mask, 0.0) for x in tensors]
    if lengths is not None:
        divisors = (*lengths, *lengths)
        zeroed = [None if x is None else x / n for x, n in zip(zeroed, divisors, strict=True)]
    chosen, rejected, ref_chosen, ref_rejected = zeroed
    assert chosen is not None and rejected is not None
    pairs = Pairs(
        chosen=chosen if ref_chosen is None else chosen - ref_chosen.detach(),
        rejected=rejected if ref_rejected is None else rejected - ref_rejected.detach(),
        beta=beta,
        label_smoothing=label_smoothing,
        gamma=gamma,
        delta=delta,
        penalty=penalty,
        chosen_logprobs=chosen,
        ref_chosen_logprobs=None if ref_chosen is None else ref_chosen.detach(),
        mask=mask,
    )
    loss = rules.loss(pairs).where(mask, 0.0).sum() / mask.sum().clamp(min=1)
    rewards = (beta * x.detach() for x in (pairs.chosen, pairs.rejected))
    return PreferenceOutput(loss, *rewards)


def _options(kind: str, rules: Kind, **given: tuple[float, float]) -> None:
    """Every option is a number in its range, and none is set that the kind does not read."""
    for name, (value, default) in given.items():
        smoothing = name == "label_smoothing"
        _check.number(OP, name, value, 0.0 if smoothing or name == "penalty" else -float("inf"))
        if value != default and name not in rules.options:
            readers = ", ".join(k for k, r in KINDS.items() if name in r.options)
            raise _check.error(ValueError, OP, name, value, f"{default} with kind {kind!r} (only {readers} read it)")
        if smoothing and not value < 0.5:
            raise _check.error(ValueError, OP, name, value, "a number in [0, 0.5)")
        if smoothing and kind == "exo" and value == 0:
            raise _check.error(ValueError, OP, name, value, "a number in (0, 0.5) with kind 'exo'")


def _lengths(
    kind: str, rules: Kind, chosen: Tensor | None, rejected: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor] | None:
    given = {"chosen_lengths": chosen, "rejected_lengths": rejected}
    if chosen is None and rejected is None and not rules.per_token:
        return None
    for name, x in given.items():
        if x is None:
            why = f"{kind} is defined on means per token" if rules.per_token else "the other lengths are given"
            raise _check.error(ValueError, OP, name, None, f"a tensor (B,): {why}")
        _check.integer(OP, name, x)
        _check.shape(OP, name, x, like.shape, "chosen_logprobs")
        _check.device(OP, name, x, like, "chosen_logprobs")
    assert chosen is not None and rejected is not None
    return chosen.clamp(min=1), rejected.clamp(min=1)
