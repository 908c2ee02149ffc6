"""verl's own policy losses, each served by a recipe of ours."""

from __future__ import annotations

import sys

import pytest
import torch
from integrations.fakes import VerlConfig
from integrations.test_verl import ALGOS, DENOMINATORS, MODES, batch, with_gradients

import rlhf_fast
from rlhf_fast.integrations import status
from rlhf_fast.integrations.verl_losses import REPLACED

NAMES = (*REPLACED, "reinforce")


def inputs(scale, dtype=torch.float32):
    """old, new, advantages (one per sequence) and mask; row 1 has no real token."""
    (new, noise, advantages, weights), mask = batch((6, 12), dtype)
    new = (new - 2).requires_grad_()
    old = new.detach() + scale * noise
    return (old, new, advantages[:, :1].expand(6, 12).contiguous(), mask), weights.abs()


def called(function, arguments, *rest):
    """Loss, metrics and gradient, and the random number that comes next."""
    torch.manual_seed(3)
    (loss, metrics), (gradient,) = with_gradients(function, [arguments[1]], *arguments, *rest)
    return loss, metrics, gradient, torch.rand(1)


def reached(name):
    return next(r for r in status("verl") if r.symbol == f"{ALGOS}.compute_policy_loss_{name}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", ["0.9.1", "0.10.0"])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_value_gradient_metrics_and_random_numbers_are_verls(name, version, scale, framework):
    get = framework("verl", version)
    path = f"{ALGOS}.compute_policy_loss_{name}"
    for dtype in (torch.float32, torch.float64):
        arguments, weights = inputs(scale, dtype)
        calls = [
            (arguments, mode, VerlConfig(clip, clip_ratio_high=0.28, **given), w)
            for mode in MODES
            for given in DENOMINATORS
            for clip in (0.2, 3e-4)
            for w in (None, weights)
        ]
        before = [called(get(path), *each) for each in calls]
        rlhf_fast.patch("verl", quiet=True)
        for each, wanted in zip(calls, before, strict=True):
            found = called(get(path), *each)
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)
            assert all(type(x) is float for x in found[1].values())
        assert reached(name).reached == len(calls) and not reached(name).fell_through
        rlhf_fast.unpatch("verl")


@pytest.mark.parametrize("name", REPLACED)
def test_the_registry_has_ours_while_patched(name, framework):
    framework("verl")
    registry = sys.modules[ALGOS].POLICY_LOSS_REGISTRY
    original = registry[name]
    rlhf_fast.patch("verl", quiet=True)
    assert registry[name] is getattr(sys.modules[ALGOS], f"compute_policy_loss_{name}") is not original
    rlhf_fast.unpatch("verl")
    assert registry[name] is original


@pytest.mark.parametrize("name", NAMES)
def test_what_is_masked_does_no_harm(name, framework):
    """verl's products with the mask leave NaN where it hid one."""
    get = framework("verl")
    (old, new, advantages, mask), _ = inputs(0.3)
    rlhf_fast.patch("verl", quiet=True)
    call = lambda *x: called(get(f"{ALGOS}.compute_policy_loss_{name}"), x, "seq-mean-token-mean", VerlConfig())
    clean = call(old, new, advantages, mask)
    dirty = [x.detach().where(mask != 0, torch.nan) for x in (old, new, advantages)]
    torch.testing.assert_close(call(dirty[0], dirty[1].requires_grad_(), dirty[2], mask), clean)


def test_cispo_without_a_lower_bound(framework):
    """verl's examples say clip_ratio_low=10."""
    get = framework("verl")
    arguments, _ = inputs(3.0)
    path, config = f"{ALGOS}.compute_policy_loss_cispo", VerlConfig(10.0, clip_ratio_high=0.2)
    before = called(get(path), arguments, "token-mean", config)
    rlhf_fast.patch("verl", quiet=True)
    torch.testing.assert_close(called(get(path), arguments, "token-mean", config), before)
    assert reached("cispo").reached == 1


def test_what_verl_keeps(framework):
    """Where the numbers would differ the call is verl's, and draws no random number twice."""
    get = framework("verl")
    (old, new, advantages, mask), _ = inputs(0.3)
    mask[0, 0] = 1
    far = old.clone()
    far[0, 0] = new.detach()[0, 0] - 25.0
    per_token = advantages * torch.rand_like(advantages)
    wide, free = VerlConfig(1.5), VerlConfig()
    free.policy_loss.ppo_kl_coef = 0.0
    cases = {
        "gspo": ((far, new, advantages, mask), VerlConfig(), "a log-ratio beyond 20"),
        "geo_mean": ((old, new, per_token, mask), VerlConfig(), "advantages that differ within a sequence"),
        "clip_cov": ((old, new, advantages, mask), wide, "argument 'clip'"),
        "kl_cov": ((old, new, advantages, mask), free, "options['penalty']"),
        "sapo": ((old, new, advantages.clone().requires_grad_(), mask), VerlConfig(), "advantages has a gradient"),
        "cispo": ((old, new, advantages, mask * 0.5), VerlConfig(), "weights other than 0 and 1"),
    }
    call = lambda name: called(get(f"{ALGOS}.compute_policy_loss_{name}"), cases[name][0], "token-mean", cases[name][1])
    before = {name: call(name) for name in cases}
    rlhf_fast.patch("verl", quiet=True)
    for name, (*_, reason) in cases.items():
        torch.testing.assert_close(call(name), before[name], rtol=0, atol=0)
        (given,) = reached(name).fell_through
        assert reason in given and reached(name).reached == 0
    with pytest.raises(AttributeError):  # verl's own answer to a missing config
        get(f"{ALGOS}.compute_policy_loss_gpg")(old, new, advantages, mask)
