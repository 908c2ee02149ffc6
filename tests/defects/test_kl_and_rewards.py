"""KL estimators, and where score and KL go: how the frameworks differ, as options, and what ours does without one.

| framework and line | test |
| --- | --- |
| TRL, slime k3: no bound; verl: log-ratio of k3 +-20, estimate +-10; OpenRLHF, AReaL: every estimate +-10; NeMo: both, configurable; ROLL: k3's estimate +-10 | test_bounds_of_the_estimates |
| slime low_var_kl +-10; open-instruct: log-ratio +-40; AReaL's apply_clamp=False | test_bounds_by_hand |
| verl's suffix + | tests/defects/test_formulas.py: straight-through k3 |
| TRL use_bias_correction_kl, NeMo's score-function term: times pi / pi_old; slime: before the bound | test_the_ratio_times_the_estimate |
| TRL: the KL term comes after the importance weights | test_importance_weights_leave_the_kl_term_alone |
| AReaL: KL in the reward alone; ROLL: k3 in the loss alone | options of one call: `advantages(kl_kind=)`, `policy_loss(kl_kind=)` |
| TRL: score on the slot after the end, KL exactly 0 beyond it; the others: last token | test_the_slot_of_the_score |
| TRL: missing_eos_penalty is subtracted; OpenAI, N+: the score is replaced | test_an_answer_without_an_end |
| TRL whiten_rewards: without shift of the mean, over one slot more | test_reward_whitening_keeps_the_mean |
| verl: controller fed with means per token, over sequences | test_the_controller_takes_sums_over_tokens |
| OpenRLHF: the score is clipped after the group's baseline | test_clipping_after_the_baseline |
| OpenRLHF: KL stays on masked slots, masked in GAE | test_kl_on_masked_slots_moves_nothing |
| slime: score and KL ignore the loss mask | test_the_loss_mask_and_the_response_mask |
| AReaL: slot seqlen - 2 of rolled rows; clip after scale and bias; a value where the end is missing | test_rolled_rows, test_scores_are_clipped_after_their_scaling, tests/defects/test_advantages.py |
| ROLL: token rewards are clipped; DeepSpeed-Chat: scores +-5 | test_clips_of_the_caller |
"""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast import advantages, group_advantages, kl_estimate, policy_loss, whiten
from rlhf_fast.config import KLConfig, RolloutConfig
from rlhf_fast.integrations.slime_losses import compute_approx_kl
from rlhf_fast.train.rewards import KLController, apply_missing_eos

FAR = torch.tensor([[30.0, -30.0, -12.0, 2.0]], dtype=torch.float64)
"""Log-ratios policy / reference beyond every bound, on both sides."""
ALL = torch.ones(1, 4, dtype=torch.bool)


def schulman(d, kind, inner=math.inf, outer=math.inf):
    x = (-d).clamp(-inner, inner)
    found = {"k1": -x, "k2": x.square() / 2, "k3": x.exp() - 1 - x}[kind]
    return found.clamp(-outer, outer)


def kl_of(dialect, kind):
    zeros = torch.zeros_like(FAR)
    return advantages(zeros, zeros, ALL, logprobs=FAR, ref_logprobs=zeros, kl_kind=kind, dialect=dialect).kl


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize(
    ("dialect", "bounds"),
    [
        ("trl", {}),
        ("verl", {"k3": (20.0, 10.0)}),
        ("openrlhf", dict.fromkeys(("k1", "k2", "k3"), (math.inf, 10.0))),
        ("nemo", dict.fromkeys(("k1", "k2", "k3"), (20.0, 10.0))),
        ("slime", {}),
        ("areal", dict.fromkeys(("k1", "k2", "k3"), (math.inf, 10.0))),
        ("roll", {"k3": (math.inf, 10.0)}),
    ],
)
def test_bounds_of_the_estimates(dialect, bounds, kind):
    """Ours has none: a bound on k1 or k2 makes the price of the KL stop where the policy has left furthest."""
    torch.testing.assert_close(kl_of(dialect, kind), schulman(FAR, kind, *bounds.get(kind, ())))
    torch.testing.assert_close(kl_of("rlhf_fast", kind), schulman(FAR, kind))


def test_bounds_by_hand():
    zeros = torch.zeros_like(FAR)
    slime = kl_estimate(FAR, zeros, "k3", clamp=10.0)
    torch.testing.assert_close(slime, schulman(FAR, "k3", outer=10.0))
    open_instruct = kl_estimate(FAR * 2, zeros, "k3", clamp=(40.0, None))
    torch.testing.assert_close(open_instruct, schulman(FAR * 2, "k3", inner=40.0))
    areal = kl_estimate(FAR, zeros, "k2", clamp=None)
    torch.testing.assert_close(areal, schulman(FAR, "k2"))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_ratio_times_the_estimate(kind):
    """Off-policy, the mean of pi / pi_old times k3 is the KL, with its gradient; slime bounds the product, ours the estimate."""
    new, old, ref = (torch.randn(2, 5, dtype=torch.float64) for _ in range(3))
    new[0, 0], old[0, 0], ref[0, 0] = -1.0, -4.0, 1.5  # a ratio of e^3 and an estimate beyond 10 / e^3
    new.requires_grad_()
    rest = {"advantages": torch.zeros(2, 5).double(), "mask": torch.ones(2, 5, dtype=torch.bool), "ref_logprobs": ref}
    corrected = {"kl_coef": 1.0, "kl_kind": kind, "kl_placement": "corrected", "reduction": "token-sum"}
    ours = policy_loss("ppo", new, old, **rest, **corrected).loss
    wanted = ((new - old).exp() * schulman(new - ref, kind)).sum()
    torch.testing.assert_close(ours, wanted)
    grads = (torch.autograd.grad(x, new, retain_graph=True)[0] for x in (ours, wanted))
    torch.testing.assert_close(*grads)
    plain = policy_loss("ppo", new, old, **rest, **{**corrected, "kl_placement": "loss"}).loss
    torch.testing.assert_close(plain, schulman(new - ref, kind).sum())
    if kind == "k3":
        theirs = compute_approx_kl(new.float(), ref.float(), "low_var_kl", (new - old).exp().float())
        assert theirs[0, 0] == 10.0 < (new - old).exp()[0, 0] * 9.0


def test_importance_weights_leave_the_kl_term_alone():
    new, old, ref, A = (torch.randn(3, 4, dtype=torch.float64) for _ in range(4))
    weights, mask = torch.rand(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.bool)
    out = policy_loss("grpo", new, old, A, mask, ref_logprobs=ref, kl_coef=0.5, importance_weights=weights)
    ratio = (new - old).exp()
    policy = -torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A) * weights
    torch.testing.assert_close(out.loss, (policy + 0.5 * schulman(new - ref, "k3")).mean())


def test_the_slot_of_the_score():
    """TRL's score lands on padding, which then is trained in the value loss; a full row has no such slot."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    values, logp = torch.zeros(2, 4), torch.full((2, 4), 2.0)
    call = lambda dialect: (
        advantages(
            torch.tensor([1.0, 1.0]),
            values,
            mask,
            logprobs=logp,
            ref_logprobs=torch.zeros(2, 4),
            kl_coef=0.1,
            whiten=False,
            dialect=dialect,
        ).rewards
    )
    torch.testing.assert_close(call("rlhf_fast"), torch.tensor([[-0.2, 0.8, 0, 0], [-0.2, -0.2, -0.2, 0.8]]))
    torch.testing.assert_close(call("trl"), torch.tensor([[-0.2, -0.2, 1.0, 0], [-0.2, -0.2, -0.2, 0.8]]))


@pytest.mark.parametrize(
    ("rule", "expected"), [("none", [2.0, 3.0]), ("replace", [2.0, -1.0]), ("subtract", [2.0, 2.0])]
)
def test_an_answer_without_an_end(rule, expected):
    scores, finished = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    assert apply_missing_eos(scores, finished, RolloutConfig(missing_eos=rule)).tolist() == expected


def test_reward_whitening_keeps_the_mean():
    rewards, mask = (
        torch.tensor([[1.0, 3.0, 0.0], [5.0, 0.0, 0.0]]),
        torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool),
    )
    one_more = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)  # TRL's padding_mask_p1
    for m in (mask, one_more):
        real = rewards[m]
        wanted = (real - real.mean()) * torch.rsqrt(real.var() + 1e-8) + real.mean()
        torch.testing.assert_close(whiten(rewards, m, shift_mean=False)[m], wanted)
    assert whiten(rewards, mask, shift_mean=False)[mask].mean() == pytest.approx(3.0)
    assert whiten(rewards, mask)[mask].mean() == pytest.approx(0.0, abs=1e-6)


def test_the_controller_takes_sums_over_tokens():
    """Ziegler's target is nats per answer; verl feeds means per token, so that its target is one of another size."""
    kl, mask = torch.tensor([[2.0, 4.0, 0.0], [9.0, 0.0, 0.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    sums = (kl * mask).sum(-1).mean().item()
    means = ((kl * mask).sum(-1) / mask.sum(-1)).mean().item()
    found = {}
    for name, fed in (("sums", sums), ("means", means)):
        controller = KLController(KLConfig(kind="adaptive", coef=0.1, target=7.0, horizon=100))
        controller.update(fed, 2)
        found[name] = controller.coef
    assert found["sums"] == pytest.approx(0.1 * (1 + (7.5 / 7 - 1) * 2 / 100))
    assert found["means"] == pytest.approx(0.1 * (1 + (6.0 / 7 - 1) * 2 / 100))
    assert found["means"] < 0.1 < found["sums"]


def test_clipping_after_the_baseline():
    scores, ids = torch.tensor([40.0, 12.0, 8.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    baseline = group_advantages(scores, ids, "dr_grpo")
    zeros, mask = torch.zeros(4, 1), torch.ones(4, 1, dtype=torch.bool)
    call = lambda x, dialect: advantages(x, zeros, mask, whiten=False, dialect=dialect).rewards[:, 0].tolist()
    assert call(baseline, "openrlhf") == [10.0, -3.0, -7.0, -10.0]
    assert call(scores.clamp(-10, 10), "rlhf_fast") == [10.0, 10.0, 8.0, 0.0]  # before it, two answers become equal
    assert call(baseline, "rlhf_fast") == [25.0, -3.0, -7.0, -15.0]


def test_kl_on_masked_slots_moves_nothing():
    """OpenRLHF's rewards have it there and its GAE multiplies by the mask; ours never has it."""
    kl, values = (torch.randn(2, 5, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    scores = torch.tensor([1.0, -2.0]).double()
    ours = advantages(
        scores,
        values,
        mask,
        logprobs=kl,
        ref_logprobs=torch.zeros_like(kl),
        kl_coef=0.3,
        whiten=False,
        dialect="openrlhf",
    )
    theirs = -0.3 * kl
    theirs[[0, 1], [3, 2]] += scores
    torch.testing.assert_close(ours.rewards[mask], theirs[mask])
    assert not ours.rewards[~mask].any() and theirs[~mask].all()
    running, following, scan = 0.0, 0.0, []
    r, v = theirs * mask, values * mask
    for t in reversed(range(5)):
        running = r[:, t] + following - v[:, t] + 0.95 * running
        following = v[:, t]
        scan.append(running)
    torch.testing.assert_close(ours.advantages[mask], torch.stack(scan[::-1], 1)[mask])


def test_the_loss_mask_and_the_response_mask():
    """slime scans the whole response, tool output and all; with the loss mask the score moves to the last trained token."""
    response, loss = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[1, 1, 1, 0]], dtype=torch.bool)
    kl, zeros = torch.full((1, 4), 0.5), torch.zeros(1, 4)
    call = lambda mask: (
        advantages(
            torch.ones(1), zeros, mask, logprobs=kl, ref_logprobs=zeros, kl_coef=1.0, whiten=False, dialect="slime"
        ).rewards
    )
    torch.testing.assert_close(call(response), torch.tensor([[-0.5, -0.5, -0.5, 0.5]]))
    torch.testing.assert_close(call(loss), torch.tensor([[-0.5, -0.5, 0.5, 0.0]]))


def test_rolled_rows():
    """AReaL rolls its rows left by one, so that a slot predicts the token after it: slot seqlen - 2 is that of the last token."""
    tokens = torch.tensor([[5, 6, 7, 8, 9, 0]])  # a prompt of 2, an answer of 3, padding
    answer = torch.tensor([[0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    rolled = answer.roll(-1, 1)
    seqlen = int((tokens != 0).sum())
    found = advantages(torch.ones(1), torch.zeros(1, 6), rolled, whiten=False, dialect="areal").rewards
    assert found[0].nonzero().tolist() == [[seqlen - 2]]


def test_scores_are_clipped_after_their_scaling():
    mask, zeros = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 1)
    scores = torch.tensor([3.0, -9.0])
    call = lambda dialect: advantages((scores + 1.0) * 5.0, zeros, mask, whiten=False, dialect=dialect).rewards[:, 0]
    assert call("areal").tolist() == [20.0, -20.0] and call("rlhf_fast").tolist() == [20.0, -40.0]


def test_clips_of_the_caller():
    """A bound on the token rewards also bounds the KL: ROLL's is the caller's, on (B, T) rewards; DeepSpeed-Chat's on scores."""
    kl, values, mask = torch.tensor([[0.1, 60.0]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    zeros = torch.zeros(1, 2)
    shaped = advantages(
        torch.tensor([8.0]), values, mask, logprobs=kl, ref_logprobs=zeros, kl_coef=1.0, whiten=False
    ).rewards
    torch.testing.assert_close(shaped, torch.tensor([[-0.1, -52.0]]))
    clipped = advantages(shaped.clamp(-5, 5), values, mask, whiten=False, dialect="roll").rewards
    torch.testing.assert_close(clipped, torch.tensor([[-0.1, -5.0]]))
    chat = advantages(
        torch.tensor([8.0]).clamp(-5, 5), values, mask, logprobs=kl, ref_logprobs=zeros, kl_coef=0.1, whiten=False
    ).rewards
    torch.testing.assert_close(chat, torch.tensor([[-0.01, -1.0]]))
