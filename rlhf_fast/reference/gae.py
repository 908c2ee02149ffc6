"""Generalised advantage estimation, step by step."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    decay_gaps: bool,
) -> tuple[Tensor, Tensor]:
    """Schulman et al. 2015 (arXiv 1506.02438), eq. 16, from the last token to the first.

    rewards, values (B, T), or (N,) with cu_seqlens (S+1,); bootstrap (B,) or (S,).
    A masked slot between real tokens is skipped (the next value and the running advantage pass through) or, with
    decay_gaps, is a step of zero reward and zero value. Slots after the last real token are always skipped.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            gae(
                rewards[None, i:j],
                values[None, i:j],
                None if mask is None else mask[None, i:j],
                None if bootstrap is None else bootstrap[s : s + 1],
                None,
                gamma,
                lam,
                decay_gaps,
            )
            for s, (i, j) in enumerate(pairwise(bounds))
        ]
        if not parts:
            return rewards.new_zeros(0), rewards.new_zeros(0)
        return torch.cat([a[0] for a, _ in parts]), torch.cat([r[0] for _, r in parts])

    B, T = rewards.shape
    real = torch.ones(B, T, dtype=torch.bool, device=rewards.device) if mask is None else mask
    rewards = rewards.where(real, 0.0)  # where, not *: a NaN at a masked slot must not spread
    values = values.where(real, 0.0)
    next_value = rewards.new_zeros(B) if bootstrap is None else bootstrap.to(rewards.dtype)
    running = torch.zeros_like(next_value)
    seen = torch.zeros(B, dtype=torch.bool, device=rewards.device)
    steps = []
    for t in reversed(range(T)):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        step = real[:, t] | (seen & decay_gaps)
        running = torch.where(step, delta + gamma * lam * running, running)
        next_value = torch.where(step, values[:, t], next_value)
        seen = seen | real[:, t]
        steps.append(running)
    advantages = torch.stack(steps[::-1], dim=1) if steps else rewards.new_zeros(B, 0)
    advantages = advantages.where(real, 0.0)
    return advantages, (advantages + values).where(real, 0.0)


def sample(
    shape: tuple[int, int] = (4, 33),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gaps: bool = True,
) -> dict[str, Tensor]:
    """Keyword arguments of ops.gae for tests and benchmarks: ragged rows, tool gaps, a bootstrap value."""
    B, T = shape
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, T + 1, (B,), generator=g)
    mask = torch.arange(T)[None] < lengths[:, None]
    if gaps:
        mask &= torch.rand(B, T, generator=g) > 0.2
    return {
        "rewards": torch.randn(B, T, generator=g, dtype=torch.float64).to(dtype),
        "values": torch.randn(B, T, generator=g, dtype=torch.float64).to(dtype),
        "mask": mask,
        "bootstrap": torch.randn(B, generator=g, dtype=torch.float64).to(dtype),
    }
