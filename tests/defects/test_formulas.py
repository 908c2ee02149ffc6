"""Defects and clashes of public code: what ours does, and the option that gives theirs where somebody relies on it.

Found in verl, TRL, OpenRLHF, slime, ROLL, rlox, rl-triton and the RLHF book; the comparison with the frameworks' own functions is
in tests/integrations, their conventions loss by loss in the other files of this folder.

| defect or clash | test |
| --- | --- |
| verl's k3+ raised | test_straight_through_k3_is_k3_with_the_gradient_of_k2 |
| verl's seq-mean-token-sum-norm grows with the batch | test_the_loss_over_the_horizon_does_not_grow_with_the_batch |
| the RLHF book's k1 and k3 | test_the_estimators_have_the_mean_of_the_kl_and_its_sign |
| rlox's KL of sampled tokens | test_a_sampled_token_is_not_weighted_by_its_probability_again |
| OpenRLHF's seq-mask-tis says clamp | test_sequence_weights_outside_the_bounds_are_dropped_and_inside_left_alone |
| TRL's PPO statistics over padding, token mean per micro-batch | test_padding_changes_no_statistic, test_micro_batches_do_not_weigh_a_token_by_its_company |
| missing end: replaced or subtracted | tests/defects/test_kl_and_rewards.py |
| IPO on sums or means; CISPO's cap; Bessel's deviation or not | test_ipo_on_sums_and_on_means, test_cispo_with_a_relative_and_with_an_absolute_cap, test_group_deviations_over_n_minus_one_and_over_n |
| TRL's bco_pair in its documentation | tests/defects/test_values_and_preferences.py |
| rl-triton's bootstrap | test_the_value_after_the_end_counts_once |
| Gao's two laws, swapped in secondary pages | no function here computes either |
"""

from __future__ import annotations

import math

import pytest
import torch

import rlhf_fast
from rlhf_fast import Denominators, gae, group_advantages, kl_estimate, policy_loss, ppo_loss, preference_loss

P, Q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
KL = 0.0252672  # KL(P || Q) in nats
NAN = float("nan")


def expected_under_p(kind):
    return float((P * kl_estimate(P.log(), Q.log(), kind=kind)).sum())


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_estimators_have_the_mean_of_the_kl_and_its_sign(kind):
    """The RLHF book's k3 takes the log-ratio the other way round, which estimates another divergence; its k1 has the other sign."""
    assert expected_under_p(kind) == pytest.approx(KL, abs=1e-7)
    backwards = float((P * kl_estimate(Q.log(), P.log(), kind=kind)).sum())
    assert backwards != pytest.approx(KL, rel=0.01)


def test_a_sampled_token_is_not_weighted_by_its_probability_again():
    """rlox multiplies log p - log q of a sampled token by p of that token: the mean over samples is no longer the KL."""
    theirs = float((P * P * (P.log() - Q.log())).sum())
    assert expected_under_p("k1") == pytest.approx(KL, abs=1e-7) != pytest.approx(theirs, rel=0.1)


def test_straight_through_k3_is_k3_with_the_gradient_of_k2():
    """verl once handed the name on with its plus and raised."""
    logp = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -1.0, -3.0], dtype=torch.float64)
    value = kl_estimate(logp, ref, kind="k3+")
    assert torch.equal(value, kl_estimate(logp, ref, kind="k3"))
    assert torch.allclose(torch.autograd.grad(value.sum(), logp)[0], (logp - ref).detach())


def rows(scale=1):
    """Token losses 1, 2 | 3, 4, 5 | 7: the aggregation example, `scale` times over."""
    values = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [7.0, 0.0, 0.0]]).repeat(scale, 1)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool).repeat(scale, 1)
    return {"logprobs": torch.zeros_like(values), "old_logprobs": None, "advantages": -values, "mask": mask}


def test_the_loss_over_the_horizon_does_not_grow_with_the_batch():
    """verl's seq-mean-token-sum-norm divides by the horizon and not by the sequences."""
    ours = [policy_loss("ppo", **rows(n), reduction="seq-mean-token-sum-norm").loss.item() for n in (1, 4)]
    assert ours == pytest.approx([22 / 9, 22 / 9])
    theirs = [policy_loss("ppo", **rows(n), reduction="token-sum", normalizer=3.0).loss.item() for n in (1, 4)]
    assert theirs == pytest.approx([22 / 3, 4 * 22 / 3])


def test_a_token_mean_leaves_masked_tokens_out_of_the_sum_as_well():
    """ROLL's does not multiply by the mask."""
    dirty = rows()
    dirty["advantages"] = dirty["advantages"].where(dirty["mask"], -1000.0)
    assert policy_loss("ppo", **dirty, reduction="token-mean").loss.item() == pytest.approx(22 / 6)


def test_padding_changes_no_statistic():
    """TRL's PPO averages its approximate KL and its ratio over padded positions."""
    g = torch.Generator().manual_seed(0)
    x = {k: torch.randn(3, 5, generator=g) for k in ("logprobs", "old_logprobs", "advantages")}
    mask = torch.ones(3, 5, dtype=torch.bool)
    plain = ppo_loss(**x, mask=mask)
    wide = {k: torch.nn.functional.pad(v, (0, 4), value=100.0) for k, v in x.items()}
    padded = ppo_loss(**wide, mask=torch.nn.functional.pad(mask, (0, 4)))
    assert torch.equal(plain.stats.tensor, padded.stats.tensor) and torch.equal(plain.loss, padded.loss)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_what_the_mask_hides_does_no_harm(bad):
    """A product with a mask leaves 0 x inf = NaN (TRL, OpenRLHF, ROLL)."""
    x = rows()
    x["old_logprobs"] = x["logprobs"]
    clean = policy_loss("grpo", **x).loss
    dirty = {k: v if k == "mask" else v.where(x["mask"], bad) for k, v in x.items()}
    leaf = dirty["logprobs"].clone().requires_grad_()
    out = policy_loss("grpo", **{**dirty, "logprobs": leaf})
    assert torch.equal(out.loss.detach(), clean)
    assert torch.autograd.grad(out.loss, leaf)[0].isfinite().all()


def test_a_fully_masked_sequence_is_not_one_of_the_sequences():
    """OpenRLHF and verl count it out, as here; a mean over rows would not."""
    x = {k: v if v is None else torch.cat([v, torch.zeros_like(v[:1])]) for k, v in rows().items()}
    assert policy_loss("ppo", **x, reduction="seq-mean-token-mean").loss.item() == pytest.approx((1.5 + 4 + 7) / 3)


def test_micro_batches_do_not_weigh_a_token_by_its_company():
    """A token mean per micro-batch, averaged (TRL's PPO; the critic of verl before verl#6957), depends on the split."""
    x = rows()
    whole = policy_loss("ppo", **x).loss.item()
    parts = [{k: v if v is None else v[i : i + 1] for k, v in x.items()} for i in range(3)]
    d = Denominators.of(x["mask"])
    assert sum(policy_loss("ppo", **p, denominators=d).loss.item() for p in parts) == pytest.approx(whole)
    means = sum(policy_loss("ppo", **p).loss.item() for p in parts) / 3
    assert means == pytest.approx(25 / 6) != pytest.approx(whole)


def test_sequence_weights_outside_the_bounds_are_dropped_and_inside_left_alone():
    """OpenRLHF's seq-mask-tis says that it clamps and does not; here the two have two names."""
    old = torch.log(torch.tensor([[1.5, 1.0], [3.0, 2.0]]))
    rollout, mask = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool)
    dropped = rlhf_fast.rollout_correction(old, rollout, mask, kind="sequence-mis", bounds=2.0).weights
    clamped = rlhf_fast.rollout_correction(old, rollout, mask, kind="sequence-tis", bounds=2.0).weights
    assert torch.allclose(dropped, torch.tensor([[1.5, 1.5], [0.0, 0.0]]))
    assert torch.allclose(clamped, torch.tensor([[1.5, 1.5], [2.0, 2.0]]))


def test_ipo_on_sums_and_on_means():
    w, l, ref = (torch.tensor([x]).double() for x in (-10.0, -12.0, -11.0))
    lengths = {"chosen_lengths": torch.tensor([5]), "rejected_lengths": torch.tensor([8])}
    assert preference_loss(w, l, ref, ref, kind="ipo").loss.item() == pytest.approx(9.0)
    on_means = (1 / 5 + 1 / 8 - 5) ** 2  # TRL
    assert preference_loss(w, l, ref, ref, kind="ipo_norm", **lengths).loss.item() == pytest.approx(on_means)


def test_cispo_with_a_relative_and_with_an_absolute_cap():
    logp = torch.full((1, 1), math.log(6.0), requires_grad=True)
    x = {"old_logprobs": torch.zeros(1, 1), "advantages": torch.ones(1, 1), "mask": torch.ones(1, 1, dtype=torch.bool)}
    for recipe, options, weight in (
        ("cispo", {"clip": (1.0, 3.0)}, 4.0),  # MiniMax, verl: at most 1 + 3
        ("cispo_cap", {"ratio_cap": 3.0}, 3.0),  # TRL: at most 3
    ):
        out = policy_loss(recipe, logp, **x, **options)
        assert torch.autograd.grad(out.loss, logp)[0].item() == pytest.approx(-weight)


def test_group_deviations_over_n_minus_one_and_over_n():
    scores, ids = torch.tensor([1.0, 0, 0, 1, 1]), torch.zeros(5, dtype=torch.int64)
    bessel = group_advantages(scores, ids, eps=1e-12)  # verl, TRL
    population = group_advantages(scores, ids, unbiased=False, eps=1e-12)  # RL-Kernel, rlox
    assert bessel[:2].tolist() == pytest.approx([0.7303, -1.0954], abs=1e-4)
    assert population[:2].tolist() == pytest.approx([0.8165, -1.2247], abs=1e-4)


def test_a_group_of_one_and_a_group_of_equals_carry_no_signal():
    """verl takes a mean of 0 and a deviation of 1 for a group of one, and so trains on its raw score."""
    scores, ids = torch.tensor([3.0, 2.0, 2.0]), torch.tensor([7, 9, 9])
    assert not group_advantages(scores, ids).any()


def test_the_value_after_the_end_counts_once():
    """rl-triton before 0.1.2 added the bootstrap twice."""
    r, v = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.7]])
    a, returns = gae(r, v, gamma=1.0, lam=1.0, bootstrap=torch.tensor([0.8]))
    assert returns[0].tolist() == pytest.approx([1.8, 1.8, 1.8])
    assert a[0].tolist() == pytest.approx([1.3, 1.2, 1.1])


def test_values_on_masked_slots_do_not_leak_into_the_advantages():
    """ROLL#447, verl#2337: an observation inside the answer is skipped; "decay" lets it take a step of time."""
    mask = torch.tensor([[1, 0, 1]], dtype=torch.bool)
    r, v = torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([[0.5, 99.0, 0.7]])
    carried, _ = gae(r, v, mask, gamma=1.0, lam=0.5)
    assert carried[0].tolist() == pytest.approx([0.7 - 0.5 + 0.5 * 0.3, 0.0, 0.3])
    decayed, _ = gae(r, v, mask, gamma=1.0, lam=0.5, gap="decay")
    assert decayed[0].tolist() == pytest.approx([-0.5 + 0.5 * (0.7 + 0.5 * 0.3), 0.0, 0.3])


def test_half_of_the_squared_error_of_the_critic_and_slimes_whole():
    x = {**rows(), "advantages": torch.zeros(3, 3)}
    x["old_logprobs"] = x["logprobs"]
    critic = {"values": torch.zeros(3, 3), "returns": torch.full((3, 3), 2.0), "value_coef": 1.0}
    ours = ppo_loss(**x, **critic).loss.item()
    assert ours == pytest.approx(2.0)
    assert ppo_loss(**x, **critic, dialect="slime").loss.item() == pytest.approx(2 * ours)


@pytest.mark.parametrize("side", [1, -1])
def test_a_ratio_on_the_bound_is_not_clipped(side):
    bound = torch.tensor([[1.0 + side * 0.25]]).log()
    x = {"old_logprobs": torch.zeros(1, 1), "mask": torch.ones(1, 1, dtype=torch.bool), "clip": 0.25}
    for beyond, share in ((0.0, 0.0), (side * 1e-3, 1.0)):
        out = ppo_loss(bound + beyond, advantages=torch.full((1, 1), float(side)), **x)
        assert out.stats["clip_fraction"].item() == share
