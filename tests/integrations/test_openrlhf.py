from __future__ import annotations

import pytest
import torch

import rlhf_fast
from rlhf_fast.integrations import status

LOSS, UTILS = "openrlhf.models.loss", "openrlhf.models.utils"
GAE = "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker"
DENOMINATORS = ({}, {"dp_size": 2, "batch_num_tokens": 37.0, "global_batch_size": 9.0})


def batch(shape=(5, 8), mask_dtype=torch.int64):
    mask = (torch.rand(shape) > 0.3).to(mask_dtype)
    mask[1] = 0
    mask[2] = 1
    mask[2, 2:5] = 0
    return [torch.randn(shape) for _ in range(4)], mask


def both(call, symbol):
    before = call()
    rlhf_fast.patch("openrlhf", quiet=True)
    return before, call(), next(r for r in status("openrlhf") if r.symbol == symbol)


@pytest.mark.parametrize("dual_clip", [None, 2.5])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("denominators", range(2))
def test_policy_and_value_loss(dual_clip, token_level, mask_dtype, denominators, framework):
    (new, noise, advantages, _), mask = batch(mask_dtype=mask_dtype)
    old = new + 0.3 * noise
    old[2, 0] += 30.0  # the ratio is clamped, the reported KL is not
    new.requires_grad_()
    get = framework("openrlhf")
    policy = get(f"{LOSS}.PolicyLoss")(0.1, 0.2, dual_clip, token_level)
    values = [get(f"{LOSS}.ValueLoss")(clip, token_level) for clip in (None, 0.3)]

    def call():
        found = policy(new, old, advantages, mask, **DENOMINATORS[denominators])
        losses = [found[0], *(f(new, old, advantages, mask, **DENOMINATORS[denominators]) for f in values)]
        return found, losses, [torch.autograd.grad(loss, new)[0] for loss in losses]

    before, after, counts = both(call, f"{LOSS}.PolicyLoss.forward")
    torch.testing.assert_close(after, before, rtol=2e-5, atol=2e-6)
    assert len(after[0]) == 5 and after[0][3:] == (None, None)
    assert counts.reached == 1 and status("openrlhf")[1].reached == 2


def test_nan_outside_of_the_mask_stays_there(framework):
    (new, old, advantages, _), mask = batch()
    get = framework("openrlhf")
    loss = get(f"{LOSS}.PolicyLoss")()
    expected = loss(new, old, advantages, mask)[0]
    junk = new.where(mask != 0, torch.nan)
    assert loss(junk, old, advantages, mask)[0].isnan()
    rlhf_fast.patch("openrlhf", quiet=True)
    torch.testing.assert_close(loss(new, old, advantages, mask)[0], expected)
    torch.testing.assert_close(loss(junk, old, advantages, mask)[0], expected)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"ipo": True}, {"ipo": True, "label_smoothing": 0.1}]
)
def test_dpo(options, framework):
    logps = [torch.randn(6, requires_grad=n < 2) for n in range(4)]
    loss = framework("openrlhf")(f"{LOSS}.DPOLoss")(0.3, **options)
    call = lambda: (found := loss(*logps), torch.autograd.grad(found[0], logps[:2]))
    before, after, counts = both(call, f"{LOSS}.DPOLoss.forward")
    torch.testing.assert_close(after, before)
    assert counts.reached == 1 and not counts.fell_through


@pytest.mark.parametrize("margin", [False, True])
def test_reward_model(margin, framework):
    scores = [torch.randn(6, 1, requires_grad=True) for _ in range(2)]
    margin = torch.rand(6, 1) if margin else None
    loss = framework("openrlhf")(f"{LOSS}.PairWiseLoss")()
    call = lambda: (found := loss(*scores, margin), torch.autograd.grad(found, scores))
    before, after, counts = both(call, f"{LOSS}.PairWiseLoss.forward")
    torch.testing.assert_close(after, before)
    assert counts.reached == 1


def test_log_probs(framework):
    get = framework("openrlhf")
    x, ids = torch.randn(3, 5, 11, requires_grad=True), torch.randint(0, 11, (3, 5))
    path = f"{UTILS}.log_probs_from_logits"
    call = lambda: (found := get(path)(x, ids), torch.autograd.grad(found.sum(), x)[0])
    before, after, counts = both(call, path)
    torch.testing.assert_close(after, before)
    assert counts.reached == 1
    logits = x.detach().clone()
    get(path)(logits, ids, 2.0)
    torch.testing.assert_close(logits, x.detach() / 2)  # callers go on with the divided logits
    half = x.detach().bfloat16()
    assert get(path)(half, ids).dtype is torch.bfloat16
    assert sorted(next(r for r in status() if r.symbol == path).fell_through) == [
        "a temperature, by which OpenRLHF divides the logits in place",
        "half precision: ours has other bits, patch(..., half_precision=True) takes them",
    ]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_kl(kind, unbiased, framework):
    new, ref = torch.randn(4, 6), torch.randn(4, 6)
    new[0, 0], new[0, 1] = 30.0, -40.0  # beyond the bound on both sides
    new.requires_grad_()
    get = framework("openrlhf")
    path = f"{UTILS}.compute_approx_kl"
    call = lambda: (found := get(path)(new, ref, None, kind, unbiased), torch.autograd.grad(found.sin().sum(), new)[0])
    before, after, counts = both(call, path)
    torch.testing.assert_close(after, before)
    assert counts.reached == 1
    get(path)(new, ref, ref, kind, True)
    assert list(status()[5].fell_through) == ["a KL gradient with importance weights"]


def test_rewards_and_gae_are_equal_where_the_mask_is(framework):
    (kl, values, *_), mask = batch()
    scores = torch.randn(5) * 3
    get = framework("openrlhf")
    maker, real = get(GAE)(), mask.bool()

    def call():
        rewards = get(f"{UTILS}.compute_reward")(scores, 0.3, kl, mask, (-2.0, 2.0))
        return rewards, *maker.get_advantages_and_returns(values, rewards, mask, 0.97, 0.9)

    before, after, counts = both(call, f"{GAE}.get_advantages_and_returns")
    for x, y in zip(after, before, strict=True):
        torch.testing.assert_close(x[real], y[real], rtol=1e-6, atol=1e-6)
        assert x[~real].abs().max() == 0
    assert counts.reached == 1 and counts.places == 1


def test_what_openrlhf_keeps(framework):
    (new, old, advantages, _), mask = batch()
    get = framework("openrlhf")
    rlhf_fast.patch("openrlhf", quiet=True)
    get(f"{LOSS}.PolicyLoss")(policy_loss_type="gspo")(new, old, advantages, mask + (mask.sum(-1, keepdim=True) == 0))
    get(f"{LOSS}.PolicyLoss")(is_correction_level="token")(new, old, advantages, mask)
    get(f"{LOSS}.PolicyLoss")()(new, old, advantages.requires_grad_(), mask)
    assert sorted(status()[0].fell_through) == [
        "a correction of the rollout's log-probs", "advantages has a gradient", "policy_loss_type 'gspo'",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="Unknown kl_estimator"):
        get(f"{UTILS}.compute_approx_kl")(new, old, None, "k4")
