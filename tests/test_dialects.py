from __future__ import annotations

import pytest
import tolerances
import torch

from rlhf_fast import advantages, gae, ppo_loss
from rlhf_fast.dialects import DIALECTS

# What the public loops gave on the inputs of tests/ops/test_advantages.py (gamma 1, lambda 0.95, before whitening; the other rows are
# there). ROLL's scan has no mask: its token rewards are masked, and the critic's outputs on gaps and pads, chosen here to give the
# published figures, leak in.
LEAK = [0.9, -0.4147]


@pytest.mark.parametrize(
    ("values", "mask", "score", "expected"),
    [
        (
            [0.0925, 0.1925, 0.3075, 0.41, 0.5, *LEAK],
            [1, 1, 1, 1, 1, 0, 0],
            1.0,
            [0.7841, 0.7254, 0.6478, 0.5793, 0.5203],
        ),
        ([0.085, 0.185, 0.3495, 0.3495, 0.5, *LEAK], [1, 1, 0, 0, 1, 1, 0], 0.97, [0.7315, 0.6700, 0.4370, 0.0443]),
    ],
)
def test_the_measured_example_of_roll(values, mask, score, expected):
    values, mask = torch.tensor([values]), torch.tensor([mask]) == 1
    rewards = -0.005 * mask.float()
    rewards[0, mask[0].nonzero().max()] += score
    found = advantages(rewards, values, torch.ones_like(mask), gamma=1.0, lam=0.95, whiten=False, dialect="roll")
    torch.testing.assert_close(found.advantages[mask], torch.tensor(expected), rtol=0.0, atol=tolerances.WORKED4)
    own = advantages(rewards, values.where(mask, torch.nan), mask, gamma=1.0, lam=0.95, whiten=False)
    assert own.advantages.isfinite().all() and not torch.allclose(
        own.advantages[mask], found.advantages[mask], atol=1e-3
    )


def slime_loop(rewards, values, gamma, lam):
    """slime/utils/ppo_utils.py vanilla_gae, written again: every slot is real."""
    running, found = 0.0, []
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        running = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        found.append(running)
    return torch.stack(found[::-1], dim=1)


def areal_loop(rewards, values, mask, gamma, lam):
    """areal/trainer/ppo/actor.py, written again: tokens outside of the loss mask are skipped, and so are their values."""
    running, following, found = 0.0, 0.0, []
    for t in reversed(range(values.shape[1])):
        real = mask[:, t].float()
        step = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        following = following * (1 - real) + values[:, t] * real
        running = running * (1 - real) + step * real
        found.append(running)
    return torch.stack(found[::-1], dim=1)


def whitened(x, mask):
    """slime's distributed_masked_whiten and ROLL's masked_whiten on one process."""
    real = x[mask]
    return (x - real.mean()) * torch.rsqrt(real.var() + 1e-8)


@pytest.mark.parametrize("dialect", ["slime", "areal", "roll"])
def test_kl_scores_scan_and_whitening_against_the_loops(dialect):
    g = torch.Generator().manual_seed(3)
    values, new, ref = (torch.randn(4, 9, generator=g) for _ in range(3))
    new[0, :2], ref[0, :2] = torch.tensor([20.0, -4.0]), torch.tensor([-20.0, 4.0])  # beyond the bounds of k1 and k3
    mask = torch.ones(4, 9, dtype=torch.bool)
    scores = torch.tensor([30.0, -1.0, 2.0, -25.0])
    if dialect == "areal":
        mask[1, 3:5] = False
    for kind in ("k1", "k2", "k3"):
        d = new - ref
        kl = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() - 1 + d}[kind]
        if dialect == "areal" or (dialect == "roll" and kind == "k3"):
            kl = kl.clamp(-10, 10)
        rewards = torch.where(mask, -0.1 * kl, 0.0)
        rewards[:, -1] += scores.clamp(-20, 20) if dialect == "areal" else scores
        expected = (
            areal_loop(rewards, values, mask, 0.97, 0.9)
            if dialect == "areal"
            else slime_loop(rewards, values, 0.97, 0.9)
        )
        for whiten in (False, True):
            found = advantages(
                scores, values, mask, logprobs=new, ref_logprobs=ref, kl_coef=0.1, kl_kind=kind, gamma=0.97, lam=0.9,
                whiten=whiten, dialect=dialect,
            )  # fmt: skip
            wanted = whitened(expected, mask) if whiten else expected
            torch.testing.assert_close(found.advantages[mask], wanted[mask], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.returns[mask], (expected + values)[mask], rtol=1e-5, atol=1e-5)


def test_slimes_value_loss_lacks_the_half():
    x = {k: torch.randn(3, 5) for k in ("logprobs", "old_logprobs", "advantages", "old_values", "returns")}
    x["mask"] = torch.rand(3, 5) > 0.3
    grads, losses = [], []
    for dialect in ("rlhf_fast", "slime"):
        values = (x["old_values"] + 0.5).requires_grad_()
        found = ppo_loss(
            **{k: v * 0 if k in ("logprobs", "old_logprobs", "advantages") else v for k, v in x.items()},
            values=values,
            value_coef=1.0,
            dialect=dialect,
        )
        losses.append(found.loss.detach())
        grads.append(torch.autograd.grad(found.loss, values)[0])
        torch.testing.assert_close(found.stats["value_loss"], losses[0])
    moved = x["old_values"] + 0.2  # clipped
    squares = torch.maximum((moved - x["returns"]) ** 2, (x["old_values"] + 0.5 - x["returns"]) ** 2)
    torch.testing.assert_close(losses[1], squares[x["mask"]].mean())
    torch.testing.assert_close(grads[1], 2 * grads[0])


@pytest.mark.parametrize("dialect", ["slime", "areal", "roll", "nemo", "trl"])
def test_the_ratio_is_bounded_where_the_framework_bounds_it(dialect):
    """verl, OpenRLHF and our default clamp the log-ratio to +-20, the others do not."""
    new, old, mask = torch.tensor([[-21.0, 0.5]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    ratios = {name: ppo_loss(new, old, old + 1, mask, dialect=name).stats["ratio_min"] for name in (dialect, "verl")}
    logs = torch.stack([ratios[dialect].log(), ratios["verl"].log()])
    torch.testing.assert_close(logs, torch.tensor([-21.0, -20.0]))


def test_our_own_default_is_the_corrected_form():
    """No leak from padding, gaps skipped, the score on the last real token, an unbiased variance, zeros where masked."""
    rules = DIALECTS["rlhf_fast"]
    assert (rules.gap, rules.score_slot, rules.unbiased, rules.value_scale) == ("carry", "last", True, 1.0)
    values, mask = torch.randn(1, 7), torch.tensor([[True] * 5 + [False] * 2])
    junk = values.where(mask, torch.nan)
    clean, dirty = (advantages(torch.ones(1), v, mask, dialect="rlhf_fast", whiten=False) for v in (values, junk))
    assert torch.equal(clean.advantages, dirty.advantages) and clean.advantages[~mask].abs().max() == 0
    expected, _ = gae(torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]), values[:, :5])
    torch.testing.assert_close(clean.advantages[:, :5], expected)
