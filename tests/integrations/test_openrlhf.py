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
    assert counts.reached == 1
    assert {r.symbol.split(".")[-2]: r.reached for r in status("openrlhf") if "ValueLoss" in r.symbol} == {
        "ValueLoss": 2
    }


CORRECTIONS = {
    "0.11.0": [
        {"enable_vllm_is_correction": True, "vllm_is_correction_type": kind, "vllm_is_truncated_threshold": bounds}
        for kind in ("tis", "icepop", "seq-mask-tis")
        for bounds in ([0.5, 5.0], [0.9, 1.1])
    ],
    "0.11.2": [
        {"is_correction_level": level, "is_correction_mode": mode, "is_correction_threshold": bounds}
        for level, mode in (("token", "clip"), ("token", "mask"), ("seq", "mask"))
        for bounds in ((0.5, 5.0), (0.9, 1.1))
    ],
}


@pytest.mark.parametrize(("version", "correction"), [(v, c) for v, found in CORRECTIONS.items() for c in ({}, *found)])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("denominators", range(2))
def test_gspo_and_rollout_corrections(version, correction, kind, denominators, framework):
    (new, noise, advantages, drift), mask = batch()
    old = new + 0.3 * noise
    rollout = (old + 0.2 * drift).detach()
    new.requires_grad_()
    policy = framework("openrlhf", version=version)(f"{LOSS}.PolicyLoss")(0.1, 0.2, None, True, kind, **correction)

    def call():
        found = policy(new, old, advantages, mask, rollout, **DENOMINATORS[denominators])
        return found, torch.autograd.grad(found[0], new)[0]

    before, after, counts = both(call, f"{LOSS}.PolicyLoss.forward")
    torch.testing.assert_close(after, before, rtol=2e-5, atol=2e-6, equal_nan=True)
    assert counts.reached == 1 and not counts.fell_through


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("denominators", range(2))
def test_aggregation(token_level, mask_dtype, denominators, framework):
    (loss, *_), mask = batch(mask_dtype=mask_dtype)
    loss.requires_grad_()
    get = framework("openrlhf")
    path = f"{LOSS}.aggregate_loss"

    def call():
        found = get(path)(loss, mask, token_level, **DENOMINATORS[denominators])
        return found, torch.autograd.grad(found, loss)[0]

    before, after, counts = both(call, path)
    torch.testing.assert_close(after, before)
    assert counts.reached == 1
    with pytest.raises((TypeError, AttributeError)):  # its own answer: the stand-in wants a mask
        get(path)(loss, None)
    assert list(counts.fell_through) == [] and "no action mask" in status("openrlhf")[0].fell_through


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


def test_the_other_reward_loss_does_not_overflow(framework):
    chosen, rejected = (torch.randn(6, 1, requires_grad=True) for _ in range(2))
    loss = framework("openrlhf")(f"{LOSS}.LogExpLoss")()
    call = lambda: (found := loss(chosen, rejected, torch.ones(6, 1)), torch.autograd.grad(found, (chosen, rejected)))
    before, after, counts = both(call, f"{LOSS}.LogExpLoss.forward")
    torch.testing.assert_close(after, before)
    assert counts.reached == 1
    far = torch.zeros(6, 1, requires_grad=True), torch.full((6, 1), 100.0, requires_grad=True), torch.ones(6, 1)
    assert loss(*far).item() == pytest.approx(100.0)
    rlhf_fast.unpatch("openrlhf")
    assert loss(*far).isinf()
    rlhf_fast.patch("openrlhf", quiet=True)  # nothing to compare with: the call is the framework's
    assert loss(*far).isinf()
    assert list(next(r for r in status() if "LogExp" in r.symbol).fell_through) == [
        "not checked yet: the original overflows, ours does not"
    ]


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


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_unbiased_kl_gradient_has_importance_weights(kind, framework):
    new, ref, old = (torch.randn(4, 6) for _ in range(3))
    new[0, 0], new[0, 1] = 30.0, -40.0  # beyond the bounds of the estimate and of the weight
    new.requires_grad_()
    get = framework("openrlhf")
    path = f"{UTILS}.compute_approx_kl"
    call = lambda: (
        found := get(path)(new, ref, old, kind, True),
        torch.autograd.grad(found, new, torch.arange(24.0).reshape(4, 6))[0],
    )
    before, after, counts = both(call, path)
    torch.testing.assert_close(after, before)
    assert counts.reached == 1


def test_rewards_and_gae_are_equal_where_the_mask_is(framework):
    (kl, values, *_), mask = batch()
    scores = torch.randn(5) * 3
    get = framework("openrlhf")
    maker, real = get(GAE)(), mask.bool()

    def call():
        rewards = get(f"{UTILS}.compute_reward")(scores, 0.3, kl, mask, (-2.0, 2.0))
        returns = maker.get_cumulative_returns(rewards, mask, 0.97)
        return rewards, returns, *maker.get_advantages_and_returns(values, rewards, mask, 0.97, 0.9)

    before, after, counts = both(call, f"{GAE}.get_advantages_and_returns")
    for x, y in zip(after, before, strict=True):
        torch.testing.assert_close(x[real], y[real], rtol=1e-6, atol=1e-6)
        assert x[~real].abs().max() == 0
    assert counts.reached == 1 and counts.places == 1


def test_what_openrlhf_keeps(framework):
    (new, old, advantages, _), mask = batch()
    get = framework("openrlhf")
    rlhf_fast.patch("openrlhf", quiet=True)
    policy = get(f"{LOSS}.PolicyLoss")
    far = new.clone()
    far[0, mask[0].argmax()] += 25.0
    policy(policy_loss_type="gspo")(far, new, advantages, mask)
    tv = policy(is_correction_level="token", is_correction_gating="tv", is_correction_threshold=(0, 0.1))
    tv(new, old, advantages, mask, old)
    policy()(new, old, advantages.requires_grad_(), mask)
    assert sorted(status()[1].fell_through) == [
        "a log-ratio that OpenRLHF does not clamp here", "advantages has a gradient", "is_correction_gating 'tv'",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="Unknown kl_estimator"):
        get(f"{UTILS}.compute_approx_kl")(new, old, None, "k4")
