"""Policy losses by name, as data over four axes: ratio level, surrogate, KL term, aggregation.

A new recipe is one line in RECIPES; a new surrogate or ratio level is one function and one line. Everything is plain PyTorch
on (N,)-sized tensors; the hot recipe, ppo, also has a fused twin in `rlhf_fast.ppo_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._types import LossOutput, PreferenceOutput, Stats
from rlhf_fast.ops.kl_estimate import ALL_KINDS, Clamp, bounds
from rlhf_fast.ops.ppo_loss import clip_range, scalar
from rlhf_fast.preference import preference_loss
from rlhf_fast.reference._reduce import REDUCTIONS, per_sequence, token_weights
from rlhf_fast.reference.kl_estimate import estimate, k3_of

__all__ = ["RECIPES", "LossOutput", "PreferenceOutput", "Recipe", "policy_loss", "preference_loss"]

STATS = (
    "policy_loss",
    "kl",
    "clip_fraction",
    "approx_kl",
    "approx_kl_k3",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "tokens",
)
"""policy_loss is reduced like the loss; tokens is a count; the rest are means (extremes) over the real tokens, 0 without any.
The ratio is the one the surrogate sees; approx_kl and approx_kl_k3 are of the token log-ratios."""

RATIO_CLAMP = 20.0
SEQUENCE_CLAMP = 10.0
"""Bound of a sequence log-ratio from above (verl)."""


@dataclass(frozen=True)
class Batch:
    """Checked inputs of a surrogate: masked tokens are 0, constants are detached."""

    logprobs: Tensor
    log_ratio: Tensor
    """logprobs - old_logprobs per token, clamped to +-20."""
    advantages: Tensor
    mask: Tensor
    lengths: Tensor
    """Real tokens of the token's sequence, at least 1."""
    cu_seqlens: Tensor | None

    def sequence_sum(self, x: Tensor) -> Tensor:
        """Sum over the token's sequence, at every token."""
        total, index = per_sequence(x, self.cu_seqlens)
        return total[index]


def _token(b: Batch, low: float, high: float) -> Tensor:
    return b.log_ratio.exp()


def _sequence(b: Batch, low: float, high: float) -> Tensor:
    """GSPO (2507.18071): geometric mean over the sequence, in the form whose gradient arrives token by token."""
    mean = b.sequence_sum(b.log_ratio.detach()) / b.lengths
    return (mean + b.log_ratio - b.log_ratio.detach()).clamp(max=SEQUENCE_CLAMP).exp()


def _product(b: Batch, low: float, high: float) -> Tensor:
    """RLOO as in TRL: the likelihood ratio of the whole sequence."""
    return b.sequence_sum(b.log_ratio).clamp(-RATIO_CLAMP, RATIO_CLAMP).exp()


def _geometric(b: Batch, low: float, high: float) -> Tensor:
    """GMPO (2507.20673): geometric mean of the token ratios, each clipped on the side that would help too much."""
    clipped = b.log_ratio.clamp(-low, high)
    helpful = torch.where(b.advantages > 0, torch.minimum(b.log_ratio, clipped), torch.maximum(b.log_ratio, clipped))
    return (b.sequence_sum(helpful) / b.lengths).exp()


LEVELS: dict[str, Callable[[Batch, float, float], Tensor]] = {
    "token": _token,
    "sequence": _sequence,
    "product": _product,
    "geometric": _geometric,
}


def _clip(b: Batch, ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """PPO (1707.06347), eq. 7."""
    plain, clipped = -b.advantages * ratio, -b.advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(plain, clipped), clipped > plain


def _cispo(b: Batch, ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """CISPO (2506.13585): the clipped ratio is a weight without gradient; the cap is relative, [1 - low, 1 + high]."""
    ratio = ratio.detach()
    weight = ratio.clamp(1 - low, 1 + high)
    return -weight * b.advantages * b.logprobs, weight != ratio


def _sapo(b: Batch, ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """SAPO: a sigmoid gate (4 / tau) sigmoid(tau (ratio - 1)) with tau 1 where A > 0 and 1.05 elsewhere."""
    tau = torch.where(b.advantages > 0, 1.0, 1.05).to(ratio.dtype)
    return -b.advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, torch.zeros_like(b.mask)


def _unclipped(b: Batch, ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    return -b.advantages * ratio, torch.zeros_like(b.mask)


def _score(b: Batch, ratio: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """REINFORCE: the score function, no ratio."""
    return -b.advantages * b.logprobs, torch.zeros_like(b.mask)


SURROGATES: dict[str, Callable[[Batch, Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "clip": _clip,
    "cispo": _cispo,
    "sapo": _sapo,
    "unclipped": _unclipped,
    "score": _score,
}


@dataclass(frozen=True)
class Recipe:
    """One named policy loss."""

    level: str = "token"
    surrogate: str = "clip"
    clip: tuple[float, float] = (0.2, 0.2)
    dual_clip: float | None = None
    kl_kind: str = "k3"
    reduction: str = "token-mean"
    """One of the reductions of `ppo_loss`, or "constant": the token sum over the number of slots (rows x padded length)."""


RECIPES: dict[str, Recipe] = {
    "ppo": Recipe(),
    "ppo_dual_clip": Recipe(dual_clip=3.0),
    "grpo": Recipe(reduction="seq-mean-token-mean"),
    "dapo": Recipe(clip=(0.2, 0.28)),
    "bnpo": Recipe(),  # the token mean of the local batch: never give it a global normalizer
    "dr_grpo": Recipe(reduction="constant"),
    "gspo": Recipe(level="sequence", clip=(3e-4, 4e-4), reduction="seq-mean-token-mean"),
    "gmpo": Recipe(level="geometric", surrogate="unclipped", clip=(0.4, 0.4), reduction="seq-mean-token-mean"),
    "cispo": Recipe(surrogate="cispo", clip=(1.0, 4.0)),  # no lower cap, ratio at most 5
    "sapo": Recipe(surrogate="sapo", reduction="seq-mean-token-mean"),
    "reinforce": Recipe(surrogate="score", reduction="seq-mean-token-sum"),
    "rloo": Recipe(level="product", reduction="seq-mean-token-mean"),
}


def policy_loss(
    recipe: str,
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    clip: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_kind: str | None = None,
    kl_clamp: Clamp = None,
    importance_weights: Tensor | None = None,
    reduction: str | None = None,
    normalizer: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
) -> LossOutput:
    """A policy loss by name; keywords left at None take the recipe's value.

    ppo (Schulman et al. 2017, arXiv 1707.06347); ppo_dual_clip (1912.09729); grpo (2402.03300); dapo (2503.14476); bnpo; dr_grpo
    (2503.20783); gspo (2507.18071); gmpo (2507.20673); cispo (2506.13585); sapo; reinforce; rloo (2402.14740).

    Args:
        recipe: one of RECIPES.
        logprobs: (B, T) of the sampled tokens, in nats; (N,) with cu_seqlens.
        old_logprobs: like logprobs, of the policy that sampled; None = logprobs, detached (on-policy).
        advantages: like logprobs, or one per sequence.
        mask: like logprobs, True = real token. Masked tokens are never read; gradient 0.
        ref_logprobs: like logprobs; adds kl_coef kl, per token and reduced like the policy term.
        clip: (low, high) of the ratio (of the log-ratio for gmpo), or one number for both.
        dual_clip: c > 1: where A < 0 the loss is at most -c A.
        kl_kind, kl_clamp: as in `kl_estimate`.
        importance_weights: like logprobs, factor of the policy term.
        reduction: as in `ppo_loss`, or "constant" (token sum over the number of slots).
        normalizer: > 0, replaces the denominator of the reduction.
        cu_seqlens: (S+1,) boundaries of packed sequences.

    Returns:
        LossOutput(loss, stats), differentiable towards logprobs; 0 without a real token.

    Raises:
        TypeError, ValueError: wrong recipe, dtype, shape, device or range; names the argument.
    """
    op = "policy_loss"
    _check.choice(op, "recipe", recipe, tuple(RECIPES))
    rules = RECIPES[recipe]
    low, high = rules.clip if clip is None else clip_range(op, clip)
    dual = rules.dual_clip if dual_clip is None else _check.number(op, "dual_clip", dual_clip, 1.0, open_low=True)
    kind = rules.kl_kind if kl_kind is None else kl_kind
    _check.choice(op, "kl_kind", kind, ALL_KINDS)
    clamp_in, clamp_out = bounds(op, "kl_clamp", kl_clamp)
    kl_coef = _check.number(op, "kl_coef", kl_coef, 0.0)
    reduction = rules.reduction if reduction is None else reduction
    _check.choice(op, "reduction", reduction, (*REDUCTIONS, "constant"))
    if kl_coef and ref_logprobs is None:
        raise _check.error(ValueError, op, "ref_logprobs", None, f"a tensor with kl_coef={kl_coef}")
    b, ref, importance = _batch(logprobs, old_logprobs, advantages, mask, ref_logprobs, importance_weights, cu_seqlens)

    weights = _weights(b, reduction, normalizer)
    ratio = LEVELS[rules.level](b, low, high)
    token_loss, clipped = SURROGATES[rules.surrogate](b, ratio, low, high)
    if dual is not None:
        cap = -dual * b.advantages
        token_loss = torch.where((b.advantages < 0) & (token_loss > cap), cap, token_loss)
    if importance is not None:
        token_loss = token_loss * importance
    policy = (weights * token_loss).sum()
    loss, kl = policy, None
    if ref is not None:
        kl = estimate(b.logprobs, ref, kind, clamp_in, clamp_out)
        loss = loss + kl_coef * (weights * kl).sum()
    return LossOutput(loss, Stats(_stats(b, policy, kl, ratio, clipped), STATS))


def _batch(logprobs, old_logprobs, advantages, mask, ref_logprobs, importance_weights, cu_seqlens):  # type: ignore[no-untyped-def]
    op = "policy_loss"
    _check.floating(op, "logprobs", logprobs)
    _check.boolean(op, "mask", mask)
    mask = _check.mask_like(op, mask, logprobs, "logprobs")
    if cu_seqlens is not None:
        if logprobs.dim() != 1:
            raise _check.error(ValueError, op, "logprobs", f"shape {tuple(logprobs.shape)}", "(N,) with cu_seqlens")
        cu_seqlens = _check.cu_seqlens(op, cu_seqlens, logprobs.shape[0], logprobs)
        per_row: tuple[int, ...] = (cu_seqlens.shape[0] - 1,)
    else:
        if logprobs.dim() != 2:
            raise _check.error(ValueError, op, "logprobs", f"shape {tuple(logprobs.shape)}", "(B, T), or cu_seqlens")
        per_row = (logprobs.shape[0],)
    _check.floating(op, "advantages", advantages)
    if advantages.shape == per_row and advantages.shape != logprobs.shape:
        advantages = (
            advantages[:, None].expand(logprobs.shape)
            if cu_seqlens is None
            else advantages.repeat_interleave(cu_seqlens[1:] - cu_seqlens[:-1], output_size=logprobs.shape[0])
        )
    others = {
        "old_logprobs": logprobs if old_logprobs is None else old_logprobs,
        "advantages": advantages,
        "ref_logprobs": ref_logprobs,
        "importance_weights": importance_weights,
    }
    for name, x in others.items():
        if x is not None:
            _check.like(op, name, x, logprobs, "logprobs")
    logprobs, *constants = _check.common_wide(logprobs, *others.values())
    new = logprobs.where(mask, 0.0)
    old, A, ref, importance = (None if x is None else x.detach().where(mask, 0.0) for x in constants)
    lengths, index = per_sequence(mask.to(new.dtype), cu_seqlens)
    log_ratio = (new - old).clamp(-RATIO_CLAMP, RATIO_CLAMP)
    return Batch(new, log_ratio, A, mask, lengths.clamp(min=1)[index], cu_seqlens), ref, importance


def _weights(b: Batch, reduction: str, normalizer: Tensor | float | None) -> Tensor:
    divisor = 0.0
    if isinstance(normalizer, Tensor):
        normalizer = scalar("policy_loss", normalizer, b.logprobs)
    elif normalizer is not None:
        divisor, normalizer = _check.number("policy_loss", "normalizer", normalizer, 0.0, open_low=True), None
    if reduction == "constant":
        reduction = "token-sum"
        if normalizer is None and divisor == 0:
            divisor = float(b.mask.numel())
    return token_weights(b.mask, b.logprobs.dtype, reduction, normalizer, divisor, b.cu_seqlens)


@torch.no_grad()
def _stats(b: Batch, policy: Tensor, kl: Tensor | None, ratio: Tensor, clipped: Tensor) -> Tensor:
    zero = torch.zeros_like(policy)
    tokens = b.mask.sum()
    mean = lambda x: zero if x is None else x.to(zero.dtype).where(b.mask, 0.0).sum() / tokens.clamp(min=1)
    extreme = lambda fill, f: torch.where(tokens > 0, f(ratio.where(b.mask, fill)), 0.0) if b.mask.numel() else zero
    return torch.stack(
        [
            policy,
            mean(kl),
            mean(clipped),
            mean(b.log_ratio.square()) / 2,
            mean(k3_of(b.log_ratio)),
            mean(ratio),
            extreme(torch.inf, torch.amin),
            extreme(-torch.inf, torch.amax),
            tokens.to(zero.dtype),
        ]
    )
