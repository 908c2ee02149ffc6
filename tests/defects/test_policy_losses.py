"""Policy losses: how the frameworks differ, as options, and what ours does without one.

| framework and line | test |
| --- | --- |
| TRL, NeMo, slime, ROLL: no guard of the ratio; verl, OpenRLHF: log-ratio +-20 | test_a_ratio_that_overflows |
| TRL PPO: token mean of the micro-batch | tests/defects/test_formulas.py: micro-batches |
| TRL GRPO: delta | test_the_upper_cap_of_the_ratio |
| TRL GRPO: grpo and sapo, bnpo, dr_grpo, dapo, cispo, vespo, luspo | test_trl_aggregations, test_trl_aggregations_of_a_step |
| TRL RLOO: ratios of whole answers, symmetric clip | test_the_ratio_of_whole_answers |
| verl: dual clip always on | test_a_dual_clip_that_is_always_on |
| OpenRLHF: GSPO takes the mean per answer whatever is asked | test_gspo_in_openrlhf |
| NeMo: disable_ppo_ratio, forced on-policy ratio; 1e-8 in the denominator | test_without_a_ratio |
| slime: takes old - new; sum of means per sample over the global batch | test_the_other_sign_of_the_log_ratio |
| AReaL: ratio 0 off the mask; dual clip as c abs(A); denominator of before the rejection | test_areal_dual_clip, test_the_denominator_of_a_rejection |
| ROLL: dual clip at 1 + 2 clip; token mean without the mask; no division by the batch | test_roll_dual_clip, tests/defects/test_formulas.py |
| open-instruct: denominators of all ranks, per token or per group | test_denominators_add_up |
| NaN and infinity outside of the mask | tests/defects/test_formulas.py: what the mask hides |
| clip fractions count strictly | tests/defects/test_formulas.py: a ratio on the bound |
| ppo_kl after the clamp (verl), before it (OpenRLHF) | test_the_kl_statistic_and_the_clamp |
| TRL PPO: approxkl without a mask | test_approx_kl_over_padding |
| fully masked rows leave the count (verl); token counts are at least 1 (TRL) | test_rows_without_a_token |
| verl: metrics are Python floats | test_statistics_come_in_one_tensor |
"""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import Denominators, policy_loss, ppo_loss, rollout_correction
from rlhf_fast.losses import RECIPES

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
LENGTHS = MASK.sum(-1)


def batch(scale=0.4):
    """new, old, advantages (one per row), each (4, 4) fp64."""
    new, noise, A = (torch.randn(4, 4, dtype=torch.float64) for _ in range(3))
    return new.requires_grad_(), new.detach() + scale * noise, A[:, :1].expand(4, 4).clone()


def clipped(ratio, A, low=0.2, high=0.2):
    return -torch.min(ratio * A, ratio.clamp(1 - low, 1 + high) * A)


def same(ours, wanted, leaf):
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (ours, wanted)))


def test_a_ratio_that_overflows():
    new, old, A = torch.zeros(1, 2), torch.tensor([[-100.0, 0.0]]), -torch.ones(1, 2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for dialect in ("trl", "nemo", "slime"):
        assert ppo_loss(new, old, A, mask, dialect=dialect).loss.isinf()
    guarded = ppo_loss(new, old, A, mask)
    assert guarded.loss.item() == pytest.approx((torch.tensor(20.0).exp().item() + 1) / 2, rel=1e-6)
    assert guarded.stats["ratio_clamped"].item() == 1
    for dialect in ("openrlhf", "rlhf_fast"):
        torch.testing.assert_close(ppo_loss(new, old, A, mask, dialect=dialect).loss, guarded.loss)


def test_the_upper_cap_of_the_ratio():
    new, old, A = batch(scale=2.0)
    found = policy_loss("two_sided_clip", new, old, A, MASK, ratio_cap=1.5).loss
    ratio = (new - old).exp()
    losses = -torch.min(ratio.clamp(max=1.5) * A, ratio.clamp(0.8, 1.2) * A)
    same(found, losses[MASK].mean(), new)
    plain = policy_loss("ppo", new, old, A, MASK).loss
    assert not torch.allclose(found, plain)  # an advantage below 0 has no other bound


def trl(loss_type, losses, mask, length, steps, items, processes):
    """Loss of one micro-batch in TRL's GRPO, by loss_type."""
    m = mask.double()
    rows = (losses * m).sum(-1)
    if loss_type in ("grpo", "sapo"):
        return (rows / m.sum(-1).clamp(min=1)).mean() / steps
    if loss_type == "bnpo":
        return rows.sum() / m.sum().clamp(min=1) / steps
    if loss_type == "dr_grpo":
        return rows.sum() / (len(m) * length) / steps
    if loss_type == "luspo":
        return (losses[:, 0] * m.sum(-1)).mean() / steps
    return rows.sum() / (items / processes)


TRL = {
    "grpo": ("grpo", {"reduction": "seq-mean-token-mean"}),
    "sapo": ("sapo", {"reduction": "seq-mean-token-mean"}),
    "bnpo": ("bnpo", {}),
    "dr_grpo": ("dr_grpo", {"reduction": "constant"}),
    "dapo": ("dapo", {}),
    "cispo": ("cispo_cap", {}),
    "vespo": ("vespo", {}),
    "luspo": ("luspo", {"reduction": "seq-mean-token-sum"}),
}
"""{loss_type of TRL: recipe and reduction}."""


def token_losses(recipe, new, old, A):
    """The recipe's loss per token: that of packed sequences of one token each would be, for the token ratios."""
    ones, parts = torch.ones(1, 1, dtype=torch.bool), []
    if recipe in ("luspo", "vespo"):
        for i, row in enumerate(MASK):
            rest = (old[i][row][None], A[i][row][None], torch.ones(1, int(row.sum()), dtype=torch.bool))
            whole = policy_loss(recipe, new[i][row][None], *rest, reduction="token-mean").loss
            parts.append(whole.expand(4))
        return torch.stack(parts)
    for i in range(4):
        parts += [
            policy_loss(
                recipe, new[i : i + 1, t : t + 1], old[i : i + 1, t : t + 1], A[i : i + 1, t : t + 1], ones
            ).loss
            for t in range(4)
        ]
    return torch.stack(parts).view(4, 4)


@pytest.mark.parametrize("loss_type", TRL)
def test_trl_aggregations(loss_type):
    """A micro-batch of 2 processes that accumulate over 3 steps, 40 tokens in all, at most 6 per answer."""
    recipe, options = TRL[loss_type]
    new, old, A = batch()
    losses = token_losses(recipe, new, old, A)
    wanted = trl(loss_type, losses, MASK, 6, 3, 40, 2)
    if loss_type in ("dapo", "cispo", "vespo"):
        normalizer: torch.Tensor | float = 40 / 2
    elif loss_type == "dr_grpo":
        normalizer = 4 * 6 * 3.0
    else:
        normalizer = 3.0 * float(MASK.sum() if loss_type == "bnpo" else len(MASK))
    found = policy_loss(recipe, new, old, A, MASK, **options, normalizer=normalizer).loss
    same(found, wanted, new)


@pytest.mark.parametrize("loss_type", [name for name in TRL if name != "bnpo"])
def test_trl_aggregations_of_a_step(loss_type):
    """Two micro-batches of other lengths: with one Denominators they are the loss of the four rows, whatever the split; TRL's local
    denominators weigh a row by its company (its bnpo, by definition, always)."""
    recipe, options = TRL[loss_type]
    new, old, A = batch()
    reduction = options.get("reduction", RECIPES[recipe].reduction)
    d = Denominators.of(MASK, horizon=6)
    whole = policy_loss(recipe, new, old, A, MASK, reduction=reduction, denominators=d).loss
    for cut in (1, 2, 3):
        parts = [
            policy_loss(recipe, new[r], old[r], A[r], MASK[r], reduction=reduction, denominators=d).loss
            for r in (slice(0, cut), slice(cut, 4))
        ]
        same(sum(parts), whole, new)
    halves = [policy_loss("bnpo", new[r], old[r], A[r], MASK[r]).loss for r in (slice(0, 1), slice(1, 4))]
    assert not torch.allclose(sum(halves) / 2, policy_loss("bnpo", new, old, A, MASK).loss)


def test_the_ratio_of_whole_answers():
    new, old, A = batch(scale=0.1)
    found = policy_loss("rloo", new, old, A, MASK, clip=0.2).loss
    ratio = ((new - old) * MASK).sum(-1).exp()
    same(found, clipped(ratio, A[:, 0]).mean(), new)
    assert not torch.allclose(found, policy_loss("ppo", new, old, A, MASK, reduction="seq-mean-token-mean").loss)


def test_a_dual_clip_that_is_always_on():
    new, old, A = batch(scale=3.0)
    ratio = (new - old).clamp(-20, 20).exp()
    plain = clipped(ratio, A)
    verl = torch.where(A < 0, torch.min(-3.0 * A, plain), plain)
    assert (verl != plain)[MASK].any()
    same(ppo_loss(new, old, A, MASK, dialect="verl").loss, verl[MASK].mean(), new)
    same(ppo_loss(new, old, A, MASK).loss, plain[MASK].mean(), new)


def test_gspo_in_openrlhf():
    new, old, A = batch(scale=0.1)
    ratio = (((new - old) * MASK).sum(-1) / LENGTHS).exp()[:, None]
    losses = clipped(ratio, A, 0.1, 0.1)
    per_answer = ((losses * MASK).sum(-1) / LENGTHS).mean()
    same(policy_loss("gspo", new, old, A, MASK, clip=0.1).loss, per_answer, new)
    same(policy_loss("gspo", new, old, A, MASK, clip=0.1, reduction="token-mean").loss, losses[MASK].mean(), new)


def test_without_a_ratio():
    new, old, A = batch()
    total = MASK.sum()
    same(policy_loss("gpg", new, old, A, MASK).loss, -(A * new)[MASK].sum() / (total + 1e-8), new)
    forced = policy_loss("ppo", new, None, A, MASK).loss  # pi / pi: 1, with its gradient
    same(forced, -(A * (new - new.detach()).exp())[MASK].mean(), new)
    assert not policy_loss("gpg", new, old, A, torch.zeros_like(MASK)).loss.detach()


def test_the_other_sign_of_the_log_ratio():
    new, old, A = batch()
    ppo_kl = old - new
    losses = clipped((-ppo_kl).exp(), A)
    total = ((losses * MASK).sum(-1) / LENGTHS).sum() / 16
    same(policy_loss("ppo", new, old, A, MASK, reduction="seq-mean-token-mean", normalizer=16.0).loss, total, new)


def test_areal_dual_clip():
    """min(loss, c abs(A)) and c times -A where A < 0 are the same numbers."""
    new, old, A = batch(scale=3.0)
    losses = torch.min(clipped((new - old).exp(), A), 2.0 * A.sign() * A)
    found = ppo_loss(new, old, A, MASK, dual_clip=2.0).loss
    same(found, losses.where(MASK, 0.0).sum() / MASK.sum(), new)
    junk = new.detach().where(MASK, torch.inf).requires_grad_()
    assert torch.equal(ppo_loss(junk, old, A, MASK, dual_clip=2.0).loss, found)  # a ratio of 0 off the mask is ours too


def test_roll_dual_clip():
    new, old, A = batch(scale=3.0)
    plain = clipped((new - old).exp(), A)
    roll = torch.where(A < 0, -torch.max(-plain, (1 + 2 * 0.2) * A), plain)
    assert (roll != plain)[MASK].any()
    same(ppo_loss(new, old, A, MASK, dialect="roll_dual_clip_loss").loss, roll[MASK].mean(), new)
    same(ppo_loss(new, old, A, MASK, dialect="roll").loss, plain[MASK].mean(), new)  # its default


def test_the_denominator_of_a_rejection():
    new, old, A = batch()
    rollout = old - 1.0 * (torch.rand(4, 4) > 0.5)
    c = rollout_correction(old, rollout, MASK, kind="token-mis", bounds=(0.5, 2.0))
    assert 0 < c.keep.sum() < MASK.sum()
    losses = clipped((new - old).exp(), A) * c.weights
    weighted = policy_loss("ppo", new, old, A, MASK, importance_weights=c.weights).loss
    same(weighted, losses.sum() / MASK.sum(), new)  # AReaL, slime: the tokens of before
    same(policy_loss("ppo", new, old, A, c.keep, importance_weights=c.weights).loss, losses.sum() / c.keep.sum(), new)


def test_denominators_add_up():
    """open-instruct counts over ranks before it divides; so does a sum of Denominators, or their all_reduce."""
    new, old, A = batch()
    ranks = [slice(0, 1), slice(1, 4)]
    d = sum(Denominators.of(MASK[r]) for r in ranks)
    losses = clipped((new - old).exp(), A)
    parts = [policy_loss("ppo", new[r], old[r], A[r], MASK[r], denominators=d).loss for r in ranks]
    same(sum(parts), losses[MASK].mean(), new)
    averaged = [policy_loss("ppo", new[r], old[r], A[r], MASK[r], denominators=d.averaged(2)).loss for r in ranks]
    same(sum(averaged) / 2, losses[MASK].mean(), new)
    groups = [
        policy_loss("ppo", new[r], old[r], A[r], MASK[r]).loss for r in ranks
    ]  # a denominator of each group's own
    same(sum(groups) / 2, (losses[:1][MASK[:1]].mean() + losses[1:][MASK[1:]].mean()) / 2, new)


def test_the_kl_statistic_and_the_clamp():
    new, old = torch.zeros(1, 2), torch.tensor([[-30.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    stats = ppo_loss(new, old, torch.ones(1, 2), mask, ref_logprobs=old, kl_kind="k1").stats
    assert -stats["kl"].item() == pytest.approx((-30 + 1) / 2)  # OpenRLHF: mean of old - new
    assert stats["ratio_clamped"].item() == 1
    verl = (old - new).clamp(-20, 20).mean().item()
    assert verl == pytest.approx((-20 + 1) / 2)
    assert stats["approx_kl"].item() == pytest.approx((20**2 + 1) / 4)  # of the clamped log-ratios


def test_approx_kl_over_padding():
    new, old, A = batch()
    d = (new - old).detach()
    ours = ppo_loss(new, old, A, MASK).stats["approx_kl"]
    torch.testing.assert_close(ours, d[MASK].square().mean() / 2)
    theirs = ppo_loss(new, old, A, torch.ones_like(MASK)).stats["approx_kl"]
    torch.testing.assert_close(theirs, d.square().mean() / 2)
    assert abs(ours - theirs) > 1e-3


def test_rows_without_a_token():
    new, old, A = batch()
    mask = MASK.clone()
    mask[1] = False
    losses = clipped((new - old).exp(), A)
    rows = (losses * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    same(policy_loss("ppo", new, old, A, mask, reduction="seq-mean-token-mean").loss, rows.sum() / 3, new)
    trl_grpo = policy_loss("ppo", new, old, A, mask, reduction="seq-mean-token-mean", normalizer=4.0).loss
    same(trl_grpo, rows.mean(), new)
    nothing = torch.zeros_like(MASK)
    for reduction in ("token-mean", "seq-mean-token-mean", "constant"):
        out = policy_loss("ppo", new, old, A, nothing, reduction=reduction)
        assert out.loss == 0 and not torch.autograd.grad(out.loss, new)[0].any()


def test_statistics_come_in_one_tensor():
    new, old, A = batch()
    stats = ppo_loss(new, old, A, MASK).stats
    assert stats.tensor.dim() == 1 and not stats.tensor.requires_grad
    found = stats.floats()
    assert list(found) == list(stats) and all(type(x) is float for x in found.values())
    assert found["clip_fraction"] == stats["clip_fraction"].item()
