"""Pairs that test_preference_splits.py computes whole and preference_rank.py in parts: keywords of preference_loss for every kind."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import preference_loss
from rlhf_fast.preference_kinds import KINDS

N = 9
LENGTHS = ("chosen_lengths", "rejected_lengths")
LEAVES = ("chosen_logprobs", "rejected_logprobs")
OPTIONS = {
    "label_smoothing": 0.1, "gamma": 0.3, "delta": 0.2, "penalty": 2.0, "nll_coef": 0.5, "length_coef": 0.02, "tau": 0.2,
    "alpha": 0.25, "desirable_weight": 1.3, "undesirable_weight": 0.7,
}  # fmt: skip
"""A value of every option that a kind may read."""
MIXTURE = "a mixture"
MIXED = {"dpo": 0.8, "kto": 0.3, "orpo": 0.2}
CASES = [*KINDS, MIXTURE]


def names(case: str) -> list[str]:
    """The kinds of a case."""
    return list(MIXED) if case == MIXTURE else [case]


def across(case: str) -> bool:
    """Whether it looks across the pairs."""
    return any(KINDS[name].across for name in names(case))


def pairs(case: str) -> dict[str, Tensor]:
    """(N,) tensors: two pairs are masked, and hold NaN."""
    g = torch.Generator().manual_seed(4)
    rules = [KINDS[name] for name in names(case)]
    draw = lambda: -2 - 3 * torch.rand(N, generator=g, dtype=torch.float64)
    found = {name: draw() for name in LEAVES}
    found["mask"] = torch.tensor([True, True, False, True, True, True, False, True, True])
    refs = {f"ref_{name}": draw() for name in LEAVES}
    lengths = {name: torch.randint(1, 9, (N,), generator=g) for name in LENGTHS}
    weights = 0.5 + torch.rand(N, generator=g, dtype=torch.float64)
    if any(r.reference for r in rules):
        found |= refs
    if any(r.per_token or r.lengths for r in rules):
        found |= lengths
    if not across(case):
        found["weights"] = weights
    real = found["mask"]
    return {k: v.where(real, torch.nan) if v.is_floating_point() else v for k, v in found.items()}


def kl_logratios() -> Tensor:
    """For kto: one for every pair."""
    return torch.linspace(-0.5, 1.5, N, dtype=torch.float64)


def across_ranks() -> tuple[Tensor, Tensor, Tensor]:
    """(several rewards of N samples, values of tokens (N, 5), their mask)."""
    g = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return draw(N, 2), draw(N, 5), torch.rand(N, 5, generator=g) > 0.3


def run(case: str, tensors: dict[str, Tensor], **shared: object) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients of the log-probs) of some of the pairs."""
    options = {o: OPTIONS[o] for name in names(case) for o in KINDS[name].options}
    if "kto" in names(case):
        options.setdefault("kl_logratios", kl_logratios())
    leaves = {k: tensors[k].clone().requires_grad_() for k in LEAVES}
    kind = MIXED if case == MIXTURE else case
    loss = preference_loss(**{**tensors, **leaves}, kind=kind, **{**options, **shared}).loss
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return loss.detach(), dict(zip(leaves, grads, strict=True))
