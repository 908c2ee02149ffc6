"""Value, preference and reward losses: how the frameworks differ, as options, and what ours does without one.

| framework and line | test |
| --- | --- |
| TRL: clip around the old value, half, one slot more, micro-batch mean; verl +-0.5; OpenRLHF +- or none | test_clips_and_the_slot_after_the_end |
| TRL: `get_reward` gives padding the id 0; value before the token; verl, OpenRLHF: shifted by one | test_shifted_values |
| NeMo: the mask is not shifted | test_shifted_values |
| slime: no half; clip fraction is the share of moved predictions | tests/defects/test_formulas.py: half of the squared error; test_what_a_clip_fraction_counts |
| AReaL: fp32 is asserted | test_values_in_half_precision |
| ROLL: mean of the means of the answers | test_the_mean_of_means |
| TRL: ipo and sigmoid_norm on means; OpenRLHF: ipo on sums; AReaL: ipo wants means | tests/defects/test_formulas.py: ipo; test_means_and_sums |
| TRL: margin, centring, weights of several losses; NeMo: no margin; OpenRLHF: margin | test_reward_losses, test_a_list_of_losses |
| OpenRLHF: LogExpLoss without protection | test_log_exp_without_protection |
| NeMo: pairs in even and odd rows | test_interleaved_pairs |
| AReaL: sums of log-probs in fp64 | test_sums_of_long_answers |
| open-instruct: dpo_norm on means | test_means_and_sums |
| DeepSpeed-Chat: token scores from the first divergence | test_token_scores_from_the_first_divergence |
| TRL bco_pair: other formula in the documentation than in the code | test_bco_of_the_code |

Not expressed: AReaL's huber value loss (delta 10) is another loss, not a convention. NeMo's reference log-probs are cut [:, :-1] for
DPO and [:, 1:] for PPO: how tensors of its own are laid out; here log-probs, mask and reference have one layout.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast import ppo_loss, preference_loss, reward_loss, sequence_logprobs

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
ONE_MORE = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
"""TRL's padding_mask_p1."""


def critic(values, returns, mask, old_values=None, **options):
    zeros = torch.zeros_like(returns)
    return ppo_loss(
        zeros, zeros, zeros, mask, values=values, returns=returns, old_values=old_values, value_coef=1.0, **options
    )


def squared(values, returns, old=None, clip=None):
    loss = (values - returns).square()
    if clip is None:
        return loss
    return torch.max(loss, (old + (values - old).clamp(-clip, clip) - returns).square())


def same(ours, wanted, leaf):
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (ours, wanted)))


@pytest.mark.parametrize("clip", [0.2, 0.5, None])
@pytest.mark.parametrize("mask", [MASK, ONE_MORE], ids=["tokens", "one more"])
def test_clips_and_the_slot_after_the_end(clip, mask):
    values, returns, old = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    values.requires_grad_()
    found = critic(values, returns, mask, None if clip is None else old, value_clip=clip)
    same(found.loss, squared(values, returns, old, clip)[mask].mean() / 2, values)
    parts = [critic(values[r], returns[r], mask[r]).loss for r in (slice(0, 1), slice(1, 3))]
    whole = critic(values, returns, mask).loss
    assert not torch.allclose(sum(parts) / 2, whole)  # TRL: a mean of means
    rows = [slice(i, i + 1) for i in range(3)]
    normalized = [critic(values[r], returns[r], mask[r], normalizer=float(mask.sum())).loss for r in rows]
    same(sum(normalized), whole, values)


def test_shifted_values():
    """The value of the state before a token is the critic's output at the token before it; at the token itself, as in NeMo, it has
    seen what it judges."""
    outputs = torch.randn(2, 6, dtype=torch.float64).requires_grad_()  # a prompt of 2, answers of up to 4
    returns, mask = torch.randn(2, 4, dtype=torch.float64), MASK[:2]
    before, at = outputs[:, 1:-1], outputs[:, 2:]
    same(critic(before, returns, mask).loss, squared(before, returns)[mask].mean() / 2, outputs)
    same(critic(at, returns, mask).loss, squared(at, returns)[mask].mean() / 2, outputs)
    (gradient,) = torch.autograd.grad(critic(before, returns, mask).loss, outputs)
    assert gradient[:, 1].all() and not gradient[:, -1].any()
    whatever = outputs.detach().masked_fill(F.pad(~mask, (1, 1)), torch.nan)[:, 1:-1]  # not even id 0 is needed
    assert torch.equal(critic(whatever, returns, mask).loss, critic(before, returns, mask).loss.detach())


def test_what_a_clip_fraction_counts():
    """slime counts the predictions that moved further than the clip; a bound that makes the loss no larger changes no gradient."""
    old, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    values, returns = torch.tensor([[0.5, 0.5, 0.1]]), torch.tensor([[2.0, -2.0, 1.0]])
    found = critic(values, returns, mask, old, value_clip=0.2)
    moved = ((values - old).abs() > 0.2).float().mean()
    assert found.stats["value_clip_fraction"].item() == pytest.approx(1 / 3)
    assert moved.item() == pytest.approx(2 / 3)


def test_values_in_half_precision():
    values, returns = (torch.randn(3, 4).bfloat16() for _ in range(2))
    found = critic(values, returns, MASK)
    assert found.loss.dtype is torch.float32
    torch.testing.assert_close(found.loss, squared(values.float(), returns.float())[MASK].mean() / 2)
    assert found.loss != squared(values, returns)[MASK].mean() / 2  # bf16 has 8 bits


def test_the_mean_of_means():
    values, returns = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    values.requires_grad_()
    rows = (squared(values, returns) * MASK).sum(-1) / MASK.sum(-1)
    same(critic(values, returns, MASK, reduction="seq-mean-token-mean").loss, rows.mean() / 2, values)
    assert not torch.allclose(critic(values, returns, MASK).loss, rows.mean() / 2)


def pair():
    logps = [torch.randn(5, dtype=torch.float64) - 8 for _ in range(4)]
    lengths = {"chosen_lengths": torch.tensor([3, 9, 5, 7, 4]), "rejected_lengths": torch.tensor([6, 2, 5, 8, 1])}
    return logps, lengths


def test_means_and_sums():
    """The same name on sums and on means: TRL's sigmoid_norm and open-instruct's dpo_norm are dpo on means."""
    (w, l, rw, rl), n = pair()
    d = (w - rw) - (l - rl)
    normed = (w - rw) / n["chosen_lengths"] - (l - rl) / n["rejected_lengths"]
    beta = 0.3
    torch.testing.assert_close(preference_loss(w, l, rw, rl, beta=beta).loss, -F.logsigmoid(beta * d).mean())
    found = preference_loss(w, l, rw, rl, kind="sigmoid_norm", beta=beta, **n).loss
    torch.testing.assert_close(found, -F.logsigmoid(beta * normed).mean())
    areal = preference_loss(w, l, rw, rl, kind="ipo_norm", beta=beta, **n).loss
    torch.testing.assert_close(areal, (normed - 1 / (2 * beta)).square().mean())
    openrlhf = preference_loss(w, l, rw, rl, kind="ipo", beta=beta).loss
    torch.testing.assert_close(openrlhf, (d - 1 / (2 * beta)).square().mean())


def test_a_list_of_losses():
    """TRL adds losses of several names with weights (MPO)."""
    (w, l, rw, rl), n = pair()
    mixed = preference_loss(w, l, rw, rl, kind={"dpo": 0.8, "sft": 1.0}, beta=0.3, **n).loss
    parts = 0.8 * preference_loss(w, l, rw, rl, beta=0.3).loss - (w / n["chosen_lengths"]).mean()
    torch.testing.assert_close(mixed, parts)


def test_reward_losses():
    chosen, rejected = (torch.randn(6, dtype=torch.float64) for _ in range(2))
    margin = torch.rand(6, dtype=torch.float64)
    nemo = -F.logsigmoid(chosen - rejected).mean()
    torch.testing.assert_close(reward_loss(chosen, rejected).loss, nemo)
    openrlhf = -F.logsigmoid(chosen - rejected - margin).mean()
    torch.testing.assert_close(reward_loss(chosen, rejected, margin=margin).loss, openrlhf)
    trl = openrlhf + 0.01 * (chosen + rejected).square().mean()
    torch.testing.assert_close(reward_loss(chosen, rejected, margin=margin, center_coef=0.01).loss, trl)


def test_log_exp_without_protection():
    chosen, rejected = torch.zeros(2), torch.tensor([1.0, 100.0], requires_grad=True)
    theirs = torch.log(1 + torch.exp(rejected - chosen))
    assert theirs[1].isinf() and torch.autograd.grad(theirs[1], rejected)[0].isnan().any()
    found = reward_loss(chosen, rejected).loss
    torch.testing.assert_close(found, F.softplus(torch.tensor([1.0, 100.0])).mean())
    torch.testing.assert_close(torch.autograd.grad(found, rejected)[0], torch.sigmoid(rejected.detach()) / 2)


def test_interleaved_pairs():
    scores = torch.randn(8, dtype=torch.float64).requires_grad_()
    found = reward_loss(scores[0::2], scores[1::2]).loss
    same(found, -F.logsigmoid(scores.view(4, 2) @ torch.tensor([1.0, -1.0]).double()).mean(), scores)


def test_sums_of_long_answers():
    """A margin between two answers of 20,000 tokens has to survive their sums."""
    logprobs = -torch.rand(2, 20_000)
    found = sequence_logprobs(logprobs).logprobs
    truth = logprobs.double().sum(-1)
    naive = torch.zeros(2)
    for column in logprobs.T:
        naive += column
    assert (found - truth).abs().max() <= (naive - truth).abs().max()
    exact = sequence_logprobs(logprobs.double()).logprobs  # AReaL's way, for whoever wants it
    torch.testing.assert_close(exact, truth, rtol=1e-14, atol=0.0)


def test_token_scores_from_the_first_divergence():
    chosen = torch.tensor([[7, 7, 1, 2, 3, 0]])
    rejected = torch.tensor([[7, 7, 4, 5, 0, 0]])
    scores = [torch.randn(1, 6, dtype=torch.float64) for _ in range(2)]
    start, end = int((chosen != rejected)[0].nonzero()[0]), 5  # to the end of the longer answer
    mask = ((torch.arange(6) >= start) & (torch.arange(6) < end))[None]
    wanted = -F.logsigmoid(scores[0][0, start:end] - scores[1][0, start:end]).mean()
    torch.testing.assert_close(reward_loss(*scores, mask=mask).loss, wanted)
    last = reward_loss(scores[0][:, 4], scores[1][:, 3]).loss  # ours: the score of an answer is that of its last token
    torch.testing.assert_close(last, -F.logsigmoid(scores[0][0, 4] - scores[1][0, 3]))


def test_bco_of_the_code():
    (w, l, rw, rl), _ = pair()
    r_w, r_l = 0.3 * (w - rw), 0.3 * (l - rl)
    for delta in (0.0, 0.7):
        found = preference_loss(w, l, rw, rl, kind="bco", beta=0.3, delta=delta).loss
        torch.testing.assert_close(found, (-F.logsigmoid(r_w - delta) - F.logsigmoid(-(r_l - delta))).mean())
