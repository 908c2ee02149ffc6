"""Two axes of a policy loss: at which level the ratio is taken, and the surrogate that it enters.

A new level or surrogate is one function and one line of its table; `rlhf_fast.losses` names the combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast._sequences import Layout

RATIO_CLAMP = 20.0
SEQUENCE_CLAMP = 10.0
"""Bound of a mean log-ratio from above (verl)."""


@dataclass(frozen=True)
class Batch:
    """Checked inputs of a surrogate: masked tokens are 0, constants are detached."""

    logprobs: Tensor
    log_ratio: Tensor
    """logprobs - old_logprobs per token, clamped to +-20."""
    advantages: Tensor
    at: Layout
    selected: Tensor | None
    """Real tokens that clip_cov and kl_cov treat apart."""


@dataclass(frozen=True)
class Terms:
    """The numbers of a recipe."""

    clip: tuple[float, float] = (0.2, 0.2)
    """(low, high) around a ratio of 1; around a log-ratio of 0 at the geometric level."""
    dual_clip: float | None = None
    ratio_cap: float | None = None
    """Largest ratio, as an absolute value."""
    options: Mapping[str, float] = field(default_factory=dict)
    """What else the surrogate reads, by name."""


class Level(NamedTuple):
    """The ratio that every token sees, from the log-ratios."""

    ratio: Callable[[Batch, Terms], Tensor]
    reads: tuple[str, ...] = ()
    """Fields of Terms that have an effect."""


class Twin(NamedTuple):
    """A surrogate with its numbers, as the kernel of `ppo_loss` takes it."""

    surrogate: str
    clip: tuple[float, float] = (0.2, 0.2)
    dual_clip: float | None = None


def _no_twin(t: Terms) -> Twin | None:
    return None


class Surrogate(NamedTuple):
    """(loss per token, whether a bound took its gradient), from the ratio."""

    loss: Callable[[Batch, Tensor, Terms], tuple[Tensor, Tensor]]
    reads: tuple[str, ...] = ()
    """Fields of Terms that have an effect."""
    needs: tuple[str, ...] = ()
    """Fields of Batch that must not be None."""
    options: Mapping[str, float] = {}
    """Options with their defaults, each > 0."""
    twin: Callable[[Terms], Twin | None] = _no_twin
    """What the kernel of `ppo_loss` calls it with these numbers, or None."""


def _token(b: Batch, t: Terms) -> Tensor:
    return b.log_ratio.exp()


def _sequence(b: Batch, t: Terms) -> Tensor:
    """GSPO (2507.18071): the geometric mean of the token ratios."""
    return b.at.mean(b.log_ratio).clamp(max=SEQUENCE_CLAMP).exp()


def _sequence_token(b: Batch, t: Terms) -> Tensor:
    """GSPO-token (2507.18071): the same value; each token moves it with its own gradient, so advantages may differ."""
    mean = b.at.mean(b.log_ratio.detach())
    return (mean + b.log_ratio - b.log_ratio.detach()).clamp(max=SEQUENCE_CLAMP).exp()


def _product(b: Batch, t: Terms) -> Tensor:
    """The likelihood ratio of the whole sequence (RLOO in TRL, VESPO)."""
    return b.at.sum(b.log_ratio).clamp(-RATIO_CLAMP, RATIO_CLAMP).exp()


def _geometric(b: Batch, t: Terms) -> Tensor:
    """GMPO (2507.20673): geometric mean of the token ratios, each clipped on the side that would help too much."""
    clipped = b.log_ratio.clamp(-t.clip[0], t.clip[1])
    helpful = torch.where(b.advantages > 0, torch.minimum(b.log_ratio, clipped), torch.maximum(b.log_ratio, clipped))
    return b.at.mean(helpful).exp()


LEVELS: dict[str, Level] = {
    "token": Level(_token),
    "sequence": Level(_sequence),
    "sequence-token": Level(_sequence_token),
    "product": Level(_product),
    "geometric": Level(_geometric, ("clip",)),
}


def _none(b: Batch) -> Tensor:
    return torch.zeros_like(b.at.mask)


def _clip(b: Batch, ratio: Tensor, t: Terms) -> tuple[Tensor, Tensor]:
    """PPO (1707.06347), eq. 7; dual_clip: 1912.09729, eq. 5; ratio_cap: the delta of INTELLECT-2 (2505.07291), section 4.1."""
    A, (low, high) = b.advantages, t.clip
    plain = -A * (ratio if t.ratio_cap is None else ratio.clamp(max=t.ratio_cap))
    clipped = -A * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(plain, clipped)
    if t.dual_clip is not None:
        cap = -t.dual_clip * A
        loss = torch.where((A < 0) & (loss > cap), cap, loss)
    return loss, clipped > plain


def _clip_twin(t: Terms) -> Twin | None:
    """A cap of the ratio beyond the clip is a dual clip: where A >= 0 the clip is lower, where A < 0 both end at -cap A."""
    if t.ratio_cap is None:
        return Twin("clip", t.clip, t.dual_clip)
    if t.ratio_cap <= 1 + t.clip[1]:
        return None
    return Twin("clip", t.clip, t.ratio_cap if t.dual_clip is None else min(t.dual_clip, t.ratio_cap))


def _cispo(b: Batch, ratio: Tensor, t: Terms) -> tuple[Tensor, Tensor]:
    """CISPO (2506.13585): the clipped ratio is a weight without gradient; clipped to [1 - low, 1 + high], as in verl."""
    ratio = ratio.detach()
    weight = ratio.clamp(1 - t.clip[0], 1 + t.clip[1])
    return -weight * b.advantages * b.logprobs, weight != ratio


def _cispo_cap(b: Batch, ratio: Tensor, t: Terms) -> tuple[Tensor, Tensor]:
    """CISPO in TRL, whose epsilon_high is the largest weight itself, with nothing below."""
    ratio = ratio.detach()
    weight = ratio.clamp(max=t.ratio_cap)
    return -weight * b.advantages * b.logprobs, weight != ratio


def _cispo_cap_twin(t: Terms) -> Twin | None:
    """No ratio is below 1 - 1."""
    assert t.ratio_cap is not None
    return Twin("cispo", (1.0, t.ratio_cap - 1)) if t.ratio_cap > 1 else None


def _by_sign(name: str, positive: Tensor, t: Terms, like: Tensor) -> Tensor:
    """An option with two values; torch.where of two numbers would be fp32 whatever the rest is."""
    return torch.full_like(like, t.options[f"{name}_negative"]).masked_fill(positive, t.options[f"{name}_positive"])


def _sapo(b: Batch, ratio: Tensor, t: Terms) -> tuple[Tensor, Tensor]:
    """SAPO (2511.20347): a sigmoid gate (4 / tau) sigmoid(tau (ratio - 1)), tau by the sign of the advantage."""
    tau = _by_sign("tau", b.advantages > 0, t, ratio)
    return -b.advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, _none(b)


def _vespo(b: Batch, ratio: Tensor, t: Terms) -> tuple[Tensor, Tensor]:
    """VESPO (2602.10693): weight w^k exp(lambda (1 - w)) without gradient, k and lambda by the sign of the advantage."""
    w = ratio.detach()
    k, lam = (_by_sign(name, b.advantages >= 0, t, w) for name in ("k", "lambda"))
    return -(k * w.log() + lam * (1 - w)).exp() * b.advantages * b.logprobs, _none(b)


def _unclipped(b: Batch, ratio: Tensor, t: Terms) -> tuple[Tensor, Tensor]:
    return -b.advantages * ratio, _none(b)


def _score(b: Batch, ratio: Tensor, t: Terms) -> tuple[Tensor, Tensor]:
    """REINFORCE: the score function, no ratio."""
    return -b.advantages * b.logprobs, _none(b)


def _clip_cov(b: Batch, ratio: Tensor, t: Terms) -> tuple[Tensor, Tensor]:
    """Clip-Cov (2505.22617): PPO without the selected tokens, which still count in the denominator."""
    loss, clipped = _clip(b, ratio, t)
    assert b.selected is not None
    return loss.where(~b.selected, 0.0), clipped | b.selected


def _kl_cov(b: Batch, ratio: Tensor, t: Terms) -> tuple[Tensor, Tensor]:
    """KL-Cov (2505.22617): no clip, and a penalty on the size of the log-ratio of the selected tokens."""
    assert b.selected is not None
    loss, penalty = -b.advantages * ratio, t.options["penalty"] * b.log_ratio.abs()
    return torch.where(b.selected, loss + penalty, loss), _none(b)


SURROGATES: dict[str, Surrogate] = {
    "clip": Surrogate(_clip, ("clip", "dual_clip", "ratio_cap"), twin=_clip_twin),
    "cispo": Surrogate(_cispo, ("clip",), twin=lambda t: Twin("cispo", t.clip)),
    "cispo-cap": Surrogate(_cispo_cap, ("ratio_cap",), twin=_cispo_cap_twin),
    "sapo": Surrogate(_sapo, options={"tau_positive": 1.0, "tau_negative": 1.05}),
    "vespo": Surrogate(
        _vespo, options={"k_positive": 2.0, "lambda_positive": 3.0, "k_negative": 3.0, "lambda_negative": 2.0}
    ),
    "unclipped": Surrogate(_unclipped),
    "score": Surrogate(_score, twin=lambda t: Twin("score")),
    "clip-cov": Surrogate(_clip_cov, ("clip", "dual_clip", "ratio_cap"), ("selected",)),
    "kl-cov": Surrogate(_kl_cov, needs=("selected",), options={"penalty": 1.0}),
}
