"""Statements of the PPO-RLHF implementation checklists (37 details of PPO; N implementation details of RLHF; arXiv 2403.17031).

The number in a test's name is that of the statement. Those on ops stand in tests/ops, those on rollouts in tests/rollout, those on
the loops in tests/train.
"""

from __future__ import annotations

import pytest
import tolerances
import torch
from models import tiny_llama

import rlhf_fast
from rlhf_fast.batch import Shuffle, cu_seqlens, pack, pad, unpack
from rlhf_fast.config import KLConfig, OptimConfig, PPOUpdateConfig
from rlhf_fast.model import SharedModel
from rlhf_fast.train.loop import learning_rate


@pytest.fixture(scope="module")
def model() -> SharedModel:
    return SharedModel(tiny_llama(), roles=("policy", "reference", "reward"))


def test_item_2_logprobs_do_not_change_with_left_padding(model):
    ids = torch.tensor([[5, 9, 12, 7]])
    wide = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    mask = torch.tensor([[False] * 3 + [True] * 4])
    with torch.no_grad():
        short = model(ids, roles=("policy",)).policy.logits.log_softmax(-1)
        long = model(wide, mask, roles=("policy",)).policy.logits.log_softmax(-1)
    assert float((short - long[:, 3:]).abs().max()) <= 1e-5


def test_item_3_positions_are_the_exclusive_cumulative_sum_of_the_mask(model):
    seen = []
    hook = model.backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        model(torch.tensor([[0, 5, 6, 7, 8]]), torch.tensor([[0, 1, 1, 1, 1]]), roles=("policy",))
    finally:
        hook.remove()
    assert seen[0].tolist() == [[0, 0, 1, 2, 3]]


def test_item_4_what_stands_at_padding_never_matters(model):
    mask = torch.tensor([[False, False, True, True, True]])
    first, second = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[9, 3, 5, 6, 7]])
    with torch.no_grad():
        a, b = (model(ids, mask, roles=("policy", "reward")) for ids in (first, second))
    assert torch.equal(a.policy.hidden, b.policy.hidden) and torch.equal(a.reward.scores, b.reward.scores)


def test_item_9_every_epoch_is_another_permutation_that_follows_from_the_seed():
    epochs = [Shuffle(10, 3).batch(step, 10) for step in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert Shuffle(10, 3).batch(1, 10) == epochs[1] and Shuffle(10, 4).batch(1, 10) != epochs[1]
    small = Shuffle(10, 3)
    assert [i for step in range(5) for i in small.batch(step, 4)] == epochs[0] + epochs[1]


def test_item_22_the_reward_takes_the_k1_estimate_per_token_by_default():
    assert KLConfig().estimator == "k1"
    scores, values = torch.zeros(1), torch.zeros(1, 3)
    mask = torch.ones(1, 3, dtype=torch.bool)
    logprobs, ref = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, -3.0]])
    found = rlhf_fast.advantages(scores, values, mask, logprobs=logprobs, ref_logprobs=ref, kl_coef=0.1, whiten=False)
    torch.testing.assert_close(found.kl, torch.tensor([[0.5, -1.0, 0.0]]))
    torch.testing.assert_close(found.rewards, torch.tensor([[-0.05, 0.1, 0.0]]))


def test_item_27_the_defaults_are_the_papers():
    ppo = PPOUpdateConfig()
    assert (ppo.clip, ppo.value_clip, ppo.value_coef, ppo.epochs, ppo.gamma, ppo.lam) == (0.2, 0.2, 0.1, 4, 1.0, 0.95)


def test_item_28_30_adam_epsilon_and_gradient_norm():
    optim = OptimConfig()
    assert optim.eps == 1e-5 and optim.max_grad_norm == 1.0
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    step = torch.optim.AdamW([p], lr=1.0, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    p.grad = torch.full((1,), 1e-7, dtype=torch.float64)
    step.step()
    # The first step is lr g / (|g| + eps): a gradient of 1e-7 moves 0.0099 lr, with PyTorch's default of 1e-8 it would be 0.91.
    assert float(p) == pytest.approx(-0.009901, abs=tolerances.WORKED)


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("constant", 0.7, 1.0),
        ("linear", 0.0, 1.0),
        ("linear", 0.25, 0.75),
        ("linear", 1.0, 0.0),
        ("cosine", 0.5, 0.5),
        ("cosine", 1.0, 0.0),
    ],
)
def test_item_31_learning_rate_goes_to_0_linearly_or_along_a_cosine(schedule, progress, factor):
    assert learning_rate(OptimConfig(schedule=schedule), progress) == pytest.approx(factor)


def test_item_31_warm_up_rises_from_0():
    optim = OptimConfig(schedule="linear", warmup_ratio=0.2)
    rates = [learning_rate(optim, step / 10) for step in range(10)]
    assert rates[0] < 1e-9 and rates[1] == pytest.approx(0.5) and rates[2] == pytest.approx(1.0)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_item_40_a_policy_with_zero_b_is_the_reference(model):
    out = model(torch.tensor([[5, 9, 12, 7]]), roles=("policy", "reference"))
    assert torch.equal(out.policy.logits, out.reference.logits)


def test_packing_and_unpacking_are_inverse():
    ids, mask = pad([[1, 2, 3], [4], [5, 6]])
    packed, bounds = pack(ids, mask)
    assert packed.tolist() == [1, 2, 3, 4, 5, 6] and bounds.tolist() == [0, 3, 4, 6]
    assert torch.equal(unpack(packed, mask), ids) and torch.equal(cu_seqlens(mask), bounds)
    left, left_mask = pad([[1, 2, 3], [4]], left=True)
    assert left.tolist() == [[1, 2, 3], [0, 0, 4]] and left_mask.tolist() == [[True] * 3, [False, False, True]]
