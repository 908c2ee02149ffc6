"""Per-token KL estimators from the log-probs of sampled tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("k1", "k2", "k3", "abs")
"""The named estimators; a trailing "+" keeps the value and takes the gradient of k2."""

TAYLOR = 0.25
"""Below this |log-ratio| k3 is a series: e^x - 1 - x cancels (by 232 % in fp32 at x = 1e-4)."""


def k3_of(x: Tensor) -> Tensor:
    """e^x - 1 - x without cancellation."""
    small = x.clamp(-TAYLOR, TAYLOR)  # the branch not taken must stay finite, or its zero gradient turns into NaN
    series = torch.full_like(small, 1 / math.factorial(12))
    for n in range(11, 1, -1):
        series = series * small + 1 / math.factorial(n)
    return torch.where(x.abs() < TAYLOR, series * small * small, torch.expm1(x) - x)


def estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str, clamp_in: float, clamp_out: float) -> Tensor:
    """One value per token, x = ref - logp: -x (k1), x^2 / 2 (k2), e^x - 1 - x (k3), |x| (abs)."""
    x = (ref_logprobs - logprobs).clamp(-clamp_in, clamp_in)
    name = kind.removesuffix("+")
    value = {"k1": lambda: -x, "k2": lambda: x * x / 2, "k3": lambda: k3_of(x), "abs": x.abs}[name]()
    value = value.clamp(-clamp_out, clamp_out)
    if kind == name:
        return value
    k2 = (ref_logprobs - logprobs).square() / 2
    return value.detach() + (k2 - k2.detach())


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, kind: str, clamp_in: float, clamp_out: float
) -> Tensor:
    """Schulman, "Approximating KL divergence"; the "+" forms are verl's straight-through estimators.

    clamp_in bounds the log-ratio, clamp_out the estimate; infinity for none.
    """
    if mask is not None:
        logprobs, ref_logprobs = logprobs.where(mask, 0.0), ref_logprobs.where(mask, 0.0)
    return estimate(logprobs, ref_logprobs, kind, clamp_in, clamp_out)


def sample(shape: tuple[int, ...] = (4, 33), *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of ops.kl_estimate: log-ratios from 1e-7 to 10."""
    g = torch.Generator().manual_seed(seed)
    ref = -3 * torch.rand(shape, generator=g, dtype=torch.float64)
    scale = 10.0 ** (torch.rand(shape, generator=g, dtype=torch.float64) * 7 - 6)
    return {
        "logprobs": (ref + torch.randn(shape, generator=g, dtype=torch.float64).clamp(-1, 1) * scale).to(dtype),
        "ref_logprobs": ref.to(dtype),
        "mask": torch.rand(shape, generator=g) > 0.2,
    }
