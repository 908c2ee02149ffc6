"""The losses that `preference_loss` knows by name: one function of a pair's log-probs and one line in KINDS each.

`python -m rlhf_fast.tables preference` prints the table with its formulas and sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.ops.dpo_loss import Curve

EXPONENT = 80.0
"""Largest argument of an exp whose value grows with a log-ratio; e^80 leaves fp32 room for a product (TRL's bound)."""


@dataclass(frozen=True)
class Pairs:
    """Checked inputs of a loss, (B,) each and 0 where masked, with the settings that some of the kinds read."""

    chosen: Tensor
    """What the kind compares: log-ratio policy / reference, or log-prob; a mean per token where the kind says so."""
    rejected: Tensor
    policy_chosen: Tensor
    """Log-probs of whole answers."""
    policy_rejected: Tensor
    ref_chosen: Tensor | None
    """Constants."""
    ref_rejected: Tensor | None
    chosen_lengths: Tensor | None
    """Tokens, at least 1."""
    rejected_lengths: Tensor | None
    mask: Tensor
    kl: Tensor | None
    """0-d, z0 of kto."""
    beta: float
    label_smoothing: float
    gamma: float
    delta: float | Tensor
    penalty: float
    nll_coef: float
    length_coef: float
    tau: float
    alpha: float | None
    desirable_weight: float
    undesirable_weight: float

    @property
    def logits(self) -> Tensor:
        """beta D."""
        return self.beta * (self.chosen - self.rejected)


def _smoothed(p: Pairs, logits: Tensor) -> Tensor:
    """Cross-entropy of a label that is flipped with probability e."""
    if p.label_smoothing == 0:
        return -logsigmoid(logits)
    return -(1 - p.label_smoothing) * logsigmoid(logits) - p.label_smoothing * logsigmoid(-logits)


def _dpo(p: Pairs) -> Tensor:
    return _smoothed(p, p.logits)


def _robust(p: Pairs) -> Tensor:
    flipped = -(1 - p.label_smoothing) * logsigmoid(p.logits) + p.label_smoothing * logsigmoid(-p.logits)
    return flipped / (1 - 2 * p.label_smoothing)


def _ipo(p: Pairs) -> Tensor:
    return (p.chosen - p.rejected - 1 / (2 * p.beta)).square()


def _hinge(p: Pairs) -> Tensor:
    return torch.relu(1 - p.logits)


def _exo(p: Pairs) -> Tensor:
    """The logs of q come from logsigmoid, so that a sure pair stays finite."""
    q, log_q, log_rest = torch.sigmoid(p.logits), logsigmoid(p.logits), logsigmoid(-p.logits)
    return q * (log_q - math.log1p(-p.label_smoothing)) + (1 - q) * (log_rest - math.log(p.label_smoothing))


def _nca(p: Pairs) -> Tensor:
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco(p: Pairs) -> Tensor:
    return -logsigmoid(p.beta * p.chosen - p.delta) - logsigmoid(-(p.beta * p.rejected - p.delta))


def _apo_zero(p: Pairs) -> Tensor:
    return torch.sigmoid(-p.beta * p.chosen) + torch.sigmoid(p.beta * p.rejected)


def _apo_down(p: Pairs) -> Tensor:
    return torch.sigmoid(p.beta * p.chosen) + torch.sigmoid(-p.logits)


def _sppo(p: Pairs) -> Tensor:
    return (p.chosen - 1 / (2 * p.beta)).square() + (p.rejected + 1 / (2 * p.beta)).square()


def _aot(p: Pairs) -> Tensor:
    assert p.ref_chosen is not None and p.ref_rejected is not None
    return _by_rank(p, p.policy_chosen - p.policy_rejected, p.ref_chosen - p.ref_rejected)


def _aot_unpaired(p: Pairs) -> Tensor:
    return _by_rank(p, p.chosen, p.rejected)


def _by_rank(p: Pairs, high: Tensor, low: Tensor) -> Tensor:
    """The k-th smallest `high` against the k-th smallest `low`; pairs left out sort last in both."""
    order, other = (x.masked_fill(~p.mask, torch.inf).argsort(stable=True) for x in (high, low))
    losses = _smoothed(p, p.beta * (high[order] - low[other]))
    return torch.zeros_like(losses).scatter(0, order, losses)


def _discopop(p: Pairs) -> Tensor:
    x = p.logits
    gate = x / p.tau
    return -torch.sigmoid(-gate) * logsigmoid(x) + torch.exp(logsigmoid(gate) - x)


def _dpop(p: Pairs) -> Tensor:
    assert p.ref_chosen is not None
    return _smoothed(p, p.logits - p.beta * p.penalty * torch.relu(p.ref_chosen - p.policy_chosen))


def _rdpo(p: Pairs) -> Tensor:
    """The sign that follows from the reward r - a |y|: its optimum is beta log-ratio + a |y|, so a longer answer owes less."""
    assert p.chosen_lengths is not None and p.rejected_lengths is not None
    return _smoothed(p, p.logits + p.length_coef * (p.chosen_lengths - p.rejected_lengths))


def _sft(p: Pairs) -> Tensor:
    assert p.chosen_lengths is not None
    return -p.policy_chosen / p.chosen_lengths


def _rpo(p: Pairs) -> Tensor:
    return _dpo(p) + p.nll_coef * _sft(p)


def _wpo(p: Pairs) -> Tensor:
    assert p.chosen_lengths is not None and p.rejected_lengths is not None
    means = p.policy_chosen / p.chosen_lengths + p.policy_rejected / p.rejected_lengths
    return _dpo(p) * means.detach().clamp(max=0).exp()


def _kto(p: Pairs) -> Tensor:
    assert p.kl is not None
    desirable, undesirable = kto_terms(p.chosen, p.rejected, p.kl, p.beta)
    return p.desirable_weight * desirable + p.undesirable_weight * undesirable


def kto_terms(desirable: Tensor, undesirable: Tensor, kl: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Losses of desirable and of undesirable answers from their log-ratios (Ethayarajh et al. 2024, arXiv 2402.01306)."""
    return torch.sigmoid(-beta * (desirable - kl)), torch.sigmoid(-beta * (kl - undesirable))


def _slic(p: Pairs) -> Tensor:
    return torch.relu(p.gamma - p.logits) - p.nll_coef * p.policy_chosen


def _simpo(p: Pairs) -> Tensor:
    return _smoothed(p, p.logits - p.gamma)


def _alpha_po(p: Pairs) -> Tensor:
    assert p.alpha is not None
    return _smoothed(p, p.beta * (_power(p.chosen, p.alpha) - _power(p.rejected, p.alpha)) - p.gamma)


def _cpo(p: Pairs) -> Tensor:
    return _smoothed(p, p.logits) - p.nll_coef * p.policy_chosen


def _orpo(p: Pairs) -> Tensor:
    odds = p.chosen - p.rejected - (_log1mexp(p.chosen) - _log1mexp(p.rejected))
    return -p.nll_coef * p.chosen - p.beta * logsigmoid(odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0 (Maechler 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931472
    return torch.where(
        near, torch.log(-torch.expm1(x.where(near, -0.5))), torch.log1p(-torch.exp(x.where(~near, -1.0)))
    )


def _power(x: Tensor, alpha: float) -> Tensor:
    """(1 - e^(-alpha x)) / alpha, which is x at alpha 0; constant where -alpha x passes EXPONENT."""
    return x if alpha == 0 else -torch.expm1((-alpha * x).clamp(max=EXPONENT)) / alpha


DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda x, alpha: x,
    "forward_kl": lambda x, alpha: _power(x, 1.0),
    "js": lambda x, alpha: logsigmoid(x),
    "alpha": _power,
}
"""f'(u) of a log-ratio x = log u, up to a constant (Wang et al. 2023, arXiv 2309.16240): D is a difference of them."""


CURVES: dict[Callable[[Pairs], Tensor], Callable[[float, float, float], Curve]] = {
    _dpo: lambda beta, e, gamma: Curve(beta, win=1 - e, lose=e),
    _robust: lambda beta, e, gamma: Curve(beta, win=(1 - e) / (1 - 2 * e), lose=-e / (1 - 2 * e)),
    _ipo: lambda beta, e, gamma: Curve(1.0, 1 / (2 * beta), "square"),
    _hinge: lambda beta, e, gamma: Curve(beta, name="hinge"),
    _simpo: lambda beta, e, gamma: Curve(beta, gamma, win=1 - e, lose=e),
}
"""Losses that depend on D alone, as the kernel of `dpo_loss` takes them, from beta, label_smoothing and gamma."""


@dataclass(frozen=True)
class Kind:
    """One loss, and how it reads its pairs."""

    loss: Callable[[Pairs], Tensor]
    formula: str
    """x = b D; s is the sigmoid; w, l the log-probs of the answers, r_w, r_l their log-ratios, a_w, a_l means per token."""
    source: str
    options: tuple[str, ...] = ()
    """Keywords of preference_loss that it reads besides beta."""
    reference: bool = True
    """False: compares log-probs, not log-ratios, and reads no reference."""
    per_token: bool = False
    """What it compares is divided by the lengths."""
    lengths: bool = False
    """Reads the lengths otherwise."""
    divergence: bool = False
    """A function of D that `divergence` may reshape."""
    across: bool = False
    """Looks across the pairs of the call: micro-batches do not add up to the batch."""

    @property
    def fused(self) -> bool:
        """Whether the kernel of `dpo_loss` computes it from the log-probs of tokens."""
        return self.loss in CURVES


_E = ("label_smoothing",)

KINDS: dict[str, Kind] = {
    "dpo": Kind(_dpo, "-(1-e) log s(x) - e log s(-x)", "Rafailov et al. 2023, arXiv 2305.18290, eq. 7", _E, divergence=True),
    "cdpo": Kind(_dpo, "dpo, by the name of its smoothing", "Mitchell 2023, ericmitchell.ai/cdpo.pdf, eq. 3", _E, divergence=True),
    "robust": Kind(_robust, "(-(1-e) log s(x) + e log s(-x)) / (1-2e)", "Ray Chowdhury et al. 2024, arXiv 2403.00409", _E, divergence=True),
    "ipo": Kind(_ipo, "(D - 1/(2b))^2", "Azar et al. 2023, arXiv 2310.12036, eq. 17; on sums, as in OpenRLHF"),
    "ipo_norm": Kind(_ipo, "(r_w/|w| - r_l/|l| - 1/(2b))^2", "the same on means per token, as in TRL", per_token=True),
    "hinge": Kind(_hinge, "max(0, 1 - x)", "Liu et al. 2023, arXiv 2309.06657 (hinge-norm)", divergence=True),
    "exo": Kind(_exo, "q log(q/(1-e)) + (1-q) log((1-q)/e), q = s(x)", "Ji et al. 2024, arXiv 2402.00856, eq. 16", _E, divergence=True),
    "nca": Kind(_nca, "-log s(b r_w) - log s(-b r_w)/2 - log s(-b r_l)/2", "Chen et al. 2024, arXiv 2402.05369"),
    "bco": Kind(_bco, "-log s(b r_w - delta) - log s(-(b r_l - delta))", "Jung et al. 2024, arXiv 2404.04656", ("delta",)),
    "apo_zero": Kind(_apo_zero, "1 - s(b r_w) + s(b r_l)", "D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7"),
    "apo_down": Kind(_apo_down, "s(b r_w) + 1 - s(x)", "D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8"),
    "sppo": Kind(_sppo, "(r_w - 1/(2b))^2 + (r_l + 1/(2b))^2", "Wu et al. 2024, arXiv 2405.00675, eq. 4.7 with P in {0, 1}"),
    "aot": Kind(_aot, "dpo of sort(w - l) - sort(ref_w - ref_l)", "Melnyk et al. 2024, arXiv 2406.05882 (paired)", _E, across=True),
    "aot_unpaired": Kind(_aot_unpaired, "dpo of sort(r_w) - sort(r_l)", "Melnyk et al. 2024, arXiv 2406.05882 (unpaired)", _E, across=True),
    "discopop": Kind(_discopop, "-(1-g) log s(x) + g exp(-x), g = s(x/tau)", "Lu et al. 2024, arXiv 2406.08414, eq. 5", ("tau",), divergence=True),
    "dpop": Kind(_dpop, "dpo of x - b penalty max(0, ref_w - w)", "Pal et al. 2024, arXiv 2402.13228, eq. 3", (*_E, "penalty")),
    "sigmoid_norm": Kind(_dpo, "dpo of b (r_w/|w| - r_l/|l|)", "Lambert et al. 2024, arXiv 2411.15124", _E, per_token=True),
    "rdpo": Kind(_rdpo, "dpo of x + length_coef (|w| - |l|)", "Park et al. 2024, arXiv 2403.19159, eq. 9", (*_E, "length_coef"), lengths=True, divergence=True),
    "rpo": Kind(_rpo, "dpo - nll_coef a_w", "Pang et al. 2024, arXiv 2404.19733", (*_E, "nll_coef"), lengths=True, divergence=True),
    "wpo": Kind(_wpo, "dpo min(1, exp(a_w + a_l)), the weight a constant", "Zhou et al. 2024, arXiv 2406.11827, eq. 2", _E, lengths=True, divergence=True),
    "kto": Kind(_kto, "desirable_weight (1 - s(b(r_w - z0))) + undesirable_weight (1 - s(b(z0 - r_l)))", "Ethayarajh et al. 2024, arXiv 2402.01306", ("desirable_weight", "undesirable_weight")),
    "slic": Kind(_slic, "max(0, gamma - b (w - l)) - nll_coef w", "Zhao et al. 2023, arXiv 2305.10425", ("gamma", "nll_coef"), reference=False),
    "simpo": Kind(_simpo, "dpo of b (a_w - a_l) - gamma", "Meng et al. 2024, arXiv 2405.14734, eq. 6", (*_E, "gamma"), reference=False, per_token=True),
    "alpha_po": Kind(_alpha_po, "simpo with (1 - exp(-alpha a)) / alpha for a", "Gupta et al. 2025, arXiv 2501.03884", (*_E, "gamma", "alpha"), reference=False, per_token=True),
    "cpo": Kind(_cpo, "dpo of b (w - l), - nll_coef w", "Xu et al. 2024, arXiv 2401.08417, eq. 3", (*_E, "nll_coef"), reference=False),
    "orpo": Kind(_orpo, "-nll_coef a_w - b log s(o_w - o_l), o = a - log(1 - exp(a))", "Hong et al. 2024, arXiv 2403.07691, eqs. 4 and 7", ("nll_coef",), reference=False, per_token=True),
    "sft": Kind(_sft, "-a_w", "the generation loss of mixtures: Wang et al. 2024, arXiv 2411.10442", reference=False, lengths=True),
}  # fmt: skip
