"""Batches for the tests of the policy losses: everything that a recipe reads, in ragged rows with gaps and an empty row."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.losses import RECIPES, policy_loss

B, T = 7, 12
LENGTHS = (12, 5, 0, 1, 12, 9, 3)
LEAVES = ("logprobs", "entropy")
OPTIONS = {"kl_coef": 0.1, "entropy_coef": 0.01}


def batch(recipe: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """(B, T) tensors, keywords of policy_loss; log-ratios on both sides of the clips of every level."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(B, T, generator=g, dtype=torch.float64)
    old = -draw().abs()
    tensors = {
        "logprobs": old + 0.3 * draw(),
        "old_logprobs": old,
        "advantages": draw(),
        "ref_logprobs": old + 0.5 * draw(),
        "entropy": draw().abs(),
        "rollout_logprobs": old + 0.2 * draw(),
    }
    found = {k: v.to(dtype) for k, v in tensors.items()}
    inside = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    found["mask"] = inside & (torch.rand(B, T, generator=g) > 0.2)
    found["selected"] = torch.rand(B, T, generator=g) > 0.7
    if RECIPES[recipe].level == "sequence-token":  # elsewhere the two forms of the ratio differ in value or in gradient
        found["advantages"] = found["advantages"][:, :1].repeat(1, T)
    unread = {"rollout_logprobs", "selected"} - set(RECIPES[recipe].needs)
    return {k: v for k, v in found.items() if k not in unread}


def run(recipe: str, tensors: dict[str, Tensor], **options):
    """(loss, gradients of LEAVES, stats)."""
    leaves = {k: tensors[k].clone().requires_grad_() for k in LEAVES if k in tensors}
    out = policy_loss(recipe, **{**tensors, **leaves}, **options)
    grads = torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)
    named = dict(zip(leaves, grads, strict=True))
    return out.loss.detach(), {k: v for k, v in named.items() if v is not None}, out.stats


def packed(tensors: dict[str, Tensor], rows: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """The rows one after the other without their right padding, and their boundaries."""
    lengths = torch.tensor([LENGTHS[r] for r in rows], dtype=torch.int64)
    inside = torch.arange(T) < lengths[:, None]
    return {k: v[rows][inside] for k, v in tensors.items()}, torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
