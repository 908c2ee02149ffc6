"""Advantages of several answers to one prompt, relative to their group."""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPS = 1e-8
KINDS = ("grpo", "dr_grpo", "rloo", "reinforce++", "opo", "remax", "pass@k")


def group_advantages(
    scores: Tensor,
    group_ids: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    greedy_scores: Tensor | None,
    kind: str,
    unbiased: bool,
    eps: float,
) -> Tensor:
    """scores (N,), group_ids (N,) any integers in any order; masked samples belong to no group and give 0.

    grpo (r - mean) / (std + eps); dr_grpo r - mean; rloo r - mean of the others; reinforce++ r - mean, whitened over the
    batch; opo r - sum(length r) / sum(length); remax r - greedy; pass@k: the best sample gets best - second best.
    Groups of one and groups without variance give 0 (remax has no group).
    """
    real = torch.ones_like(group_ids, dtype=torch.bool) if mask is None else mask
    r = scores.where(real, 0.0)
    if kind == "remax":
        assert greedy_scores is not None
        return (r - greedy_scores.where(real, 0.0)).where(real, 0.0)
    ids, index = torch.unique(group_ids, return_inverse=True)
    sums = lambda x: torch.zeros(len(ids), dtype=r.dtype, device=r.device).index_add(0, index, x.where(real, 0.0))
    count = sums(torch.ones_like(r))[index].clamp(min=1)
    if kind == "pass@k":
        lead = [_best_minus_second(r, real, index == index[i], i) for i in range(len(r))]
        return torch.stack(lead) if lead else r
    # Around the lowest score of the group, so that equal scores are zeros and leave no rounding to be scaled up.
    lowest = torch.full((len(ids),), torch.inf, dtype=r.dtype, device=r.device)
    lowest = lowest.scatter_reduce(0, index, r.detach().where(real, torch.inf), "amin")
    r = (r - lowest[index]).where(real, 0.0)
    if kind == "opo":
        assert lengths is not None
        weight = lengths.to(r.dtype).where(real, 0.0)
        total = sums(weight)[index]
        baseline = sums(weight * r)[index] / total.where(total > 0, 1.0)
        return (r - baseline).where(real & (total > 0), 0.0)
    centred = (r - sums(r)[index] / count).where(real, 0.0)
    if kind == "dr_grpo":
        return centred
    if kind == "rloo":
        return torch.where(count > 1, centred * count / (count - 1).clamp(min=1), 0.0)
    if kind == "reinforce++":
        variance = centred.square().sum() / (real.sum() - 1).clamp(min=1)  # the mean over the batch is 0
        return centred * (variance + WHITEN_EPS).rsqrt()
    variance = sums(centred.square())[index] / (count - int(unbiased)).clamp(min=1)
    varies = variance > 0  # sqrt has no derivative at 0
    std = variance.where(varies, 1.0).sqrt()
    return torch.where(varies & real, centred / (std + eps), 0.0)


def _best_minus_second(r: Tensor, real: Tensor, group: Tensor, i: int) -> Tensor:
    """The pass@k advantage of sample i: 0 unless it is the only best of a group of two or more."""
    others = group & real
    others[i] = False
    if not real[i] or not others.any():
        return r[i] * 0.0
    lead = r[i] - r[others].max()
    return lead.where(lead > 0, 0.0)


def sample(n: int = 24, *, dtype: torch.dtype = torch.float32, seed: int = 0, groups: int = 5) -> dict[str, Tensor]:
    """Keyword arguments of ops.group_advantages: unsorted ids (negative and huge ones), a group of one, a constant group."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor([-7, 2**40, 3, 0, 12, 5])[torch.randint(0, groups, (n,), generator=g)]
    scores = torch.randn(n, generator=g, dtype=torch.float64)
    scores[ids == 3] = 0.1
    if n:
        ids[n // 2] = 99
    return {
        "scores": scores.to(dtype),
        "group_ids": ids,
        "lengths": torch.randint(1, 50, (n,), generator=g),
        "greedy_scores": torch.randn(n, generator=g, dtype=torch.float64).to(dtype),
        "mask": torch.rand(n, generator=g) > 0.1,
    }
