"""Scans, whitening and group baselines: how the frameworks differ, as options, and what ours does without one.

| framework and line | test |
| --- | --- |
| TRL: values to one slot past the end, the rest 0; verl, NeMo: gaps carried; OpenRLHF: gaps decay; ROLL: no mask (ROLL#447): the measured example | tests/ops/test_advantages.py, tests/test_dialects.py |
| ROLL, trlx: critic outputs and whitening over padding | test_padding_in_scan_and_whitening |
| TRL: whitening per local batch | test_whitening_of_a_part_is_another_number |
| verl: returns of unwhitened advantages; whitened leftovers on masked slots; raises for fewer than two tokens (ROLL#475) | test_verl_whitening |
| OpenRLHF: biased variance, floor, not masked again; OpenAI: biased | test_biased_whitening |
| NeMo: two lambdas; lambda by length | test_decoupled_and_length_adaptive_lambda |
| slime: the loss mask is ignored | tests/defects/test_kl_and_rewards.py: the loss mask and the response mask |
| AReaL: the value of the last slot where the end is missing; eps on the deviation | test_a_truncated_answer_goes_on, tests/test_dialects.py |
| DeepSpeed-Chat: no whitening | test_without_whitening |
| TRL: std + 1e-4, batch or no scale, equal scores 0, missing rewards ignored, normalise then sum | test_trl_group_scales, test_rewards_that_are_missing |
| verl: 1e-6, a group of one keeps its score | test_a_group_of_one |
| OpenRLHF: 1e-9 scales rounding up; KL per token, cumulative returns | test_rounding_is_not_a_signal, test_group_scores_with_a_price_on_kl |
| NeMo: leave-one-out over the std, eps where it is not 0 | test_leave_one_out_over_the_deviation |
| slime, ROLL: std or none; AReaL: leave-one-out or not; open-instruct: population std + 1e-8, or centred | test_population_deviation_and_centring |

Not expressed: trlx takes its whitening statistics over ranks: `whiten` is of one process's batch (gather before it).
"""

from __future__ import annotations

import pytest
import torch

from rlhf_fast import advantages, gae, gdpo_advantages, group_advantages, length_adaptive_lambda, whiten
from rlhf_fast.integrations.verl import compute_grpo_outcome_advantage

IDS = torch.tensor([0, 0, 0, 1, 1, 1])
SCORES = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0], dtype=torch.float64)


def loop(r, v, gamma=1.0, lam=0.95, bootstrap=None):
    """One row, every slot real."""
    following, running, found = 0.0 if bootstrap is None else bootstrap, 0.0, []
    for t in reversed(range(len(r))):
        running = r[t] + gamma * following - v[t] + gamma * lam * running
        following = v[t]
        found.append(running)
    return torch.stack(found[::-1])


def test_padding_in_scan_and_whitening():
    rewards, values = torch.zeros(1, 4), torch.tensor([[0.5, 0.6, 9.0, 9.0]])
    rewards[0, 1] = 1.0
    mask = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)
    ours = advantages(rewards, values, mask, whiten=False).advantages
    clean = advantages(rewards, values.where(mask, 0.0), mask, whiten=False).advantages
    assert torch.equal(ours, clean)
    theirs = advantages(rewards, values, mask, whiten=False, dialect="roll").advantages
    torch.testing.assert_close(theirs[mask], loop(rewards[0], values[0])[mask[0]])
    assert not torch.allclose(theirs[mask], ours[mask])
    over_padding, over_tokens = whiten(ours), whiten(ours, mask)
    assert over_tokens[mask].mean() == pytest.approx(0.0, abs=1e-6) and not torch.allclose(
        over_padding[mask], over_tokens[mask]
    )


def test_whitening_of_a_part_is_another_number():
    """TRL's advantage of a token depends on the rows that it is scored with."""
    x, mask = torch.randn(6, 4), torch.ones(6, 4, dtype=torch.bool)
    whole = whiten(x, mask)
    parts = torch.cat([whiten(x[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)])
    for part, rows in ((whole, x), *((parts[i : i + 2], x[i : i + 2]) for i in (0, 2, 4))):
        torch.testing.assert_close(part, (rows - rows.mean()) * torch.rsqrt(rows.var() + 1e-8))
    assert not torch.allclose(whole, parts, atol=1e-2)


def test_verl_whitening():
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)
    raw = advantages(rewards, values, mask, whiten=False, dialect="verl")
    found = advantages(rewards, values, mask, dialect="verl")
    torch.testing.assert_close(found.returns, raw.returns)
    torch.testing.assert_close(raw.returns[mask], (raw.advantages + values)[mask])
    real = raw.advantages[mask]
    leftovers = (raw.advantages - real.mean()) * torch.rsqrt(real.var() + 1e-8)  # what verl leaves on masked slots
    torch.testing.assert_close(found.advantages[mask], leftovers[mask])
    assert leftovers[~mask].all() and not found.advantages[~mask].any()
    one = torch.zeros(3, 5, dtype=torch.bool)
    one[1, 2] = True
    assert not advantages(rewards, values, one).advantages.any()  # verl raises, ROLL gives NaN


def test_biased_whitening():
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)
    for dialect, scale in (
        ("openrlhf", lambda x: x.var(unbiased=False).clamp(min=1e-8).rsqrt()),
        ("openai", lambda x: torch.rsqrt(x.var(unbiased=False) + 1e-8)),
    ):
        raw = advantages(rewards, values, mask, whiten=False, dialect=dialect).advantages[mask]
        found = advantages(rewards, values, mask, dialect=dialect).advantages
        torch.testing.assert_close(found[mask], (raw - raw.mean()) * scale(raw))
        assert not found[~mask].any()
        bessel = advantages(rewards, values, mask, gap="decay").advantages[mask]
        torch.testing.assert_close(bessel, found[mask] * (1 - 1 / mask.sum()) ** 0.5)
    tiny = torch.tensor([[0.0, 1e-5, 2e-5]])  # OpenRLHF's floor is under the variance, not added to it
    for dialect, std in (("openrlhf", 1e-4), ("openai", (2e-10 / 3 + 1e-8) ** 0.5)):
        found = advantages(tiny, torch.zeros(1, 3), torch.ones(1, 3).bool(), gamma=0.0, dialect=dialect).advantages
        torch.testing.assert_close(found, (tiny - 1e-5) / std)


def test_decoupled_and_length_adaptive_lambda():
    """VAPO in NeMo: the critic's returns with lambda 1, the actor's advantages with one lambda per length."""
    rewards, values = torch.randn(2, 60), torch.randn(2, 60)
    lengths = torch.tensor([60, 25])
    mask = torch.arange(60) < lengths[:, None]
    lam = length_adaptive_lambda(lengths, 0.05)
    torch.testing.assert_close(lam, torch.tensor([1 - 1 / 3.0, 1 - 1 / 1.25]))
    actor, _ = gae(rewards, values, mask, lam=lam)
    _, critic = gae(rewards, values, mask, lam=1.0)
    for i, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(actor[i, :n], loop(rewards[i, :n], values[i, :n], lam=float(lam[i])))
        torch.testing.assert_close(critic[i, :n], rewards[i, :n].flip(0).cumsum(0).flip(0), rtol=1e-5, atol=1e-5)


def test_a_truncated_answer_goes_on():
    rewards, values, after = torch.zeros(2, 3), torch.tensor([[0.1, 0.2, 0.3]] * 2), torch.tensor([0.8, 0.0])
    for dialect in ("areal", "rlhf_fast"):
        mask, cut = torch.ones(2, 3, dtype=torch.bool), torch.tensor([True, False])
        found = advantages(
            rewards, values, mask, bootstrap=torch.full((2,), 0.8), truncated=cut, whiten=False, dialect=dialect
        ).advantages
        for row, value in zip(found, after, strict=True):
            torch.testing.assert_close(row, loop(rewards[0], values[0], bootstrap=value))
    assert torch.equal(gae(rewards, values)[0][1], found[1]) and not torch.allclose(found[0], found[1])


def test_without_whitening():
    rewards, values, mask = torch.randn(1, 6), torch.randn(1, 6), torch.ones(1, 6, dtype=torch.bool)
    raw = advantages(rewards, values, mask, whiten=False).advantages
    torch.testing.assert_close(raw[0], loop(rewards[0], values[0]))
    assert not torch.allclose(raw, advantages(rewards, values, mask).advantages)


def test_trl_group_scales():
    groups = SCORES.view(2, 3)
    centred = groups - groups.mean(1, keepdim=True)
    group = group_advantages(SCORES, IDS, eps=1e-4)
    torch.testing.assert_close(group, (centred / (groups.std(1, keepdim=True) + 1e-4)).reshape(-1))
    batch = group_advantages(SCORES, IDS, "lite_ppo", eps=1e-4)
    torch.testing.assert_close(batch, (centred / (SCORES.std() + 1e-4)).reshape(-1))
    torch.testing.assert_close(group_advantages(SCORES, IDS, "dr_grpo"), centred.reshape(-1))
    assert not group[3:].any() and not batch[3:].any()


def test_rewards_that_are_missing():
    """A reward function that returns None for a sample; rewards are normalised before they are added (TRL, GDPO)."""
    rewards = torch.stack([SCORES, torch.tensor([0.0, 1.0, 9.0, 1.0, 0.0, 9.0], dtype=torch.float64)], 1)
    has = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1], [1, 1], [1, 0]], dtype=torch.bool)
    parts = torch.zeros(6, 2, dtype=torch.float64)
    for k in range(2):
        for group in (0, 1):
            rows = (group == IDS) & has[:, k]
            x = rewards[rows, k]
            parts[rows, k] = (x - x.mean()) / (x.std() + 1e-4)
    wanted = whiten(parts @ torch.tensor([1.0, 0.5], dtype=torch.float64))
    found = gdpo_advantages(rewards, IDS, torch.tensor([1.0, 0.5]).double(), mask=has, eps=1e-4)
    torch.testing.assert_close(found, wanted)
    added = group_advantages((rewards * has) @ torch.tensor([1.0, 0.5]).double(), IDS, eps=1e-4)
    assert not torch.allclose(found, whiten(added), atol=1e-2)  # summed first, the larger reward drowns the other


def test_a_group_of_one():
    """verl compares it with a mean of 0 and a deviation of 1; it carries no signal."""
    scores, ids = torch.tensor([3.0, 1.0, 2.0]).double(), torch.tensor([5, 7, 7])
    found = group_advantages(scores, ids, eps=1e-6)
    assert found[0] == 0
    torch.testing.assert_close(found[1:], (scores[1:] - 1.5) / (scores[1:].std() + 1e-6))
    theirs, _ = compute_grpo_outcome_advantage(scores[:, None], torch.ones(3, 1), ids)
    torch.testing.assert_close(theirs[:, 0], torch.tensor([3.0 / (1 + 1e-6), *found[1:].tolist()]).double())


def test_rounding_is_not_a_signal():
    """The mean of equal fp32 scores is off by a bit of the last place, which 1 / 1e-9 takes to a third of a deviation and more."""
    scores, ids = torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64)
    off = scores - torch.nextafter(scores, torch.ones(3))
    theirs = off / ((3 * off[0] ** 2 / 2).sqrt() + 1e-9)
    assert theirs.abs().min() > 0.5
    assert not group_advantages(scores, ids, eps=1e-9).any()
    varied = torch.tensor([1.0, 2.0, 6.0]).double()
    torch.testing.assert_close(
        group_advantages(varied, ids, eps=1e-9), (varied - 3) / (varied.std() + 1e-9), rtol=1e-12, atol=0.0
    )


def test_group_scores_with_a_price_on_kl():
    """OpenRLHF's estimators without a critic: the group's score at the end, the KL on every token, summed from the end."""
    kl, mask = torch.rand(6, 4).double(), torch.arange(4) < torch.tensor([[4], [2], [3], [1], [4], [4]])
    A = group_advantages(SCORES, IDS, "rloo")
    zeros = torch.zeros(6, 4).double()
    found = advantages(
        A, zeros, mask, logprobs=kl, ref_logprobs=zeros, kl_coef=0.1, lam=1.0, whiten=False, dialect="openrlhf"
    )
    rewards = -0.1 * kl * mask
    rewards[torch.arange(6), mask.sum(-1) - 1] += A
    wanted = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found.returns[mask], wanted[mask])
    torch.testing.assert_close(found.advantages, found.returns)


def test_leave_one_out_over_the_deviation():
    groups = SCORES.view(2, 3)
    others = (groups.sum(1, keepdim=True) - groups) / 2
    one_out = group_advantages(SCORES, IDS, "rloo")
    torch.testing.assert_close(one_out, (groups - others).reshape(-1))
    std = groups.std(1, keepdim=True)
    nemo = torch.where(std > 0, (groups - others) / (std + 1e-6), groups - others).reshape(-1)
    torch.testing.assert_close(group_advantages(SCORES, IDS, eps=1e-6) * 3 / 2, nemo)  # G / (G - 1)


def test_population_deviation_and_centring():
    groups = SCORES.view(2, 3)
    centred = groups - groups.mean(1, keepdim=True)
    found = group_advantages(SCORES, IDS, unbiased=False, eps=1e-8)
    torch.testing.assert_close(found, (centred / (groups.std(1, unbiased=False, keepdim=True) + 1e-8)).reshape(-1))
    torch.testing.assert_close(group_advantages(SCORES, IDS, eps=1e-8) * 1.5**0.5, found)
    torch.testing.assert_close(group_advantages(SCORES, IDS, "dr_grpo"), centred.reshape(-1))
