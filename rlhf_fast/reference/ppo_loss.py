"""PPO and its kin: policy loss, clipped value loss, entropy bonus, KL term, and every statistic."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast._sequences import Layout
from rlhf_fast.reference._reduce import token_weights
from rlhf_fast.reference.kl_estimate import estimate, k3_of
from rlhf_fast.surrogates import LEVELS as RATIOS
from rlhf_fast.surrogates import SURROGATES as TERMS
from rlhf_fast.surrogates import Batch, Terms

LEVELS = ("token", "sequence", "sequence-token", "product")
SURROGATES = ("clip", "cispo", "score")
"""Those of rlhf_fast.surrogates that the kernels know."""

STATS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "kl",
    "clip_fraction",
    "dual_clip_fraction",
    "value_clip_fraction",
    "approx_kl",
    "approx_kl_k3",
    "ratio_mean",
    "ratio_var",
    "ratio_min",
    "ratio_max",
    "ratio_clamped",
    "explained_variance",
    "tokens",
)
"""policy_loss and value_loss are reduced like the loss; ratio_clamped and tokens are counts; the rest are means (extremes)
over the real tokens of the call, 0 when there is none. approx_kl is mean(d^2) / 2 and approx_kl_k3 mean(ratio - 1 - d) with
d = logprobs - old_logprobs after the clamp; the ratio is that of the level."""


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    importance_weights: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    ratio_clamp: float,
    entropy_coef: float,
    kl_coef: float,
    kl_kind: str,
    kl_clamp_in: float,
    kl_clamp_out: float,
    value_clip: float,
    value_coef: float,
    reduction: str,
    divisor: float,
    level: str,
    surrogate: str,
) -> tuple[Tensor, Tensor]:
    """Schulman et al. 2017 (arXiv 1707.06347) eq. 7 and 9; dual clip: Ye et al. 2020 (arXiv 1912.09729) eq. 5.

    level and surrogate: rows of rlhf_fast.surrogates, where the formulas of the others are; dual_clip belongs to "clip".
    Everything but logprobs, entropy and values is a constant. Infinity switches dual_clip, ratio_clamp, the KL clamps and
    value_clip off. Masked tokens are replaced by 0 before any arithmetic, so a NaN there cannot spread.
    """
    keep = lambda x: None if x is None else x.where(mask, 0.0)
    fixed = lambda x: None if x is None else x.detach().where(mask, 0.0)
    weights = token_weights(mask, logprobs.dtype, reduction, normalizer, divisor, cu_seqlens)
    new, old, A = keep(logprobs), fixed(old_logprobs), fixed(advantages)

    difference = new - old
    d = difference.clamp(-ratio_clamp, ratio_clamp)
    batch, terms = Batch(new, d, A, Layout(mask, cu_seqlens), None), Terms((clip_low, clip_high))
    ratio = RATIOS[level].ratio(batch, terms)
    token_loss, clipped = TERMS[surrogate].loss(batch, ratio, terms)
    capped = None
    if surrogate == "clip":
        cap = -dual_clip * A
        capped = (A < 0) & (token_loss > cap)
        token_loss = torch.where(capped, cap.where(capped, 0.0), token_loss)
    if importance_weights is not None:
        token_loss = token_loss * fixed(importance_weights)
    policy = (weights * token_loss).sum()
    loss = policy

    zero = torch.zeros((), dtype=logprobs.dtype, device=logprobs.device)
    value, value_clipped, explained = zero, None, zero
    if values is not None:
        V, R = keep(values), fixed(returns)
        error = (V - R).square()
        if old_values is not None:
            before = fixed(old_values)
            other = (torch.minimum(torch.maximum(V, before - value_clip), before + value_clip) - R).square()
            value_clipped = other > error
            error = torch.maximum(error, other)
        value = 0.5 * (weights * error).sum()
        loss = loss + value_coef * value
        explained = explained_variance(V.detach(), R, mask)
    bonus = None
    if entropy is not None:
        bonus = keep(entropy)
        loss = loss - entropy_coef * (weights * bonus).sum()
    kl = None
    if ref_logprobs is not None:
        kl = estimate(new, fixed(ref_logprobs), kl_kind, kl_clamp_in, kl_clamp_out)
        loss = loss + kl_coef * (weights * kl).sum()

    tokens = mask.sum()
    mean = lambda x: zero if x is None else x.to(zero.dtype).where(mask, 0.0).sum() / tokens.clamp(min=1)
    ratio_mean = mean(ratio)
    extreme = lambda fill, f: torch.where(tokens > 0, f(ratio.where(mask, fill)), 0.0) if mask.numel() else zero
    stats = {
        "policy_loss": policy,
        "value_loss": value,
        "entropy": mean(bonus),
        "kl": mean(kl),
        "clip_fraction": mean(clipped),
        "dual_clip_fraction": mean(capped),
        "value_clip_fraction": mean(value_clipped),
        "approx_kl": mean(d.square()) / 2,
        "approx_kl_k3": mean(k3_of(d)),
        "ratio_mean": ratio_mean,
        "ratio_var": mean((ratio - ratio_mean).square()),
        "ratio_min": extreme(torch.inf, torch.amin),
        "ratio_max": extreme(-torch.inf, torch.amax),
        "ratio_clamped": (difference.abs() > ratio_clamp).sum().to(zero.dtype),
        "explained_variance": explained,
        "tokens": tokens.to(zero.dtype),
    }
    return loss, torch.stack([stats[name].detach() for name in STATS])


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the real tokens; 0 when the returns do not vary."""

    def variance(x: Tensor) -> Tensor:
        mean = x.where(mask, 0.0).sum() / mask.sum().clamp(min=1)
        return (x - mean).where(mask, 0.0).square().sum()

    total = variance(returns)
    return torch.where(total > 0, 1 - variance(returns - values) / total.where(total > 0, 1.0), 0.0)


def sample(shape: tuple[int, ...] = (4, 33), *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of ops.ppo_loss with every optional tensor: ratios on both sides of both clips."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(shape, generator=g, dtype=torch.float64)
    old = -draw().abs()
    values = draw()
    tensors = {
        "logprobs": old + 0.3 * draw(),
        "old_logprobs": old,
        "advantages": draw(),
        "entropy": draw().abs(),
        "ref_logprobs": old + 0.5 * draw(),
        "values": values + 0.3 * draw(),
        "old_values": values,
        "returns": values + draw(),
        "importance_weights": draw().exp().clamp(max=2.0),
    }
    return {**{k: v.to(dtype) for k, v in tensors.items()}, "mask": torch.rand(shape, generator=g) > 0.2}
