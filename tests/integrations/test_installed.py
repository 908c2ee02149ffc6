"""The frameworks themselves, where they are installed: every call is served by ours, agrees with the original and warns of nothing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
import torch

import rlhf_fast
from rlhf_fast.integrations import status
from rlhf_fast.integrations.verl_losses import REPLACED

ALGOS = "verl.trainer.ppo.core_algos"
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


@pytest.fixture(autouse=True)
def no_trace():
    """In the place of that of the stand-ins: a framework that was imported stays, its patch does not."""
    yield
    for name in ("verl", "openrlhf"):
        rlhf_fast.unpatch(name)


@pytest.fixture(scope="module")
def installed():
    """verl's core_algos and ActorConfig; what the stand-ins left in sys.modules is out of the way."""
    before = {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition(".")[0] == "verl"}
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is an extra")
    try:
        algos = importlib.import_module(ALGOS)
        config = importlib.import_module("verl.workers.config")
    except ImportError as error:
        pytest.skip(f"verl lacks what it imports: {error}")
    yield algos, config
    for name in [n for n in sys.modules if n.partition(".")[0] == "verl"]:
        del sys.modules[name]
    sys.modules.update(before)


def policy_config(config, mode, given):
    options = config.PolicyLossConfig(clip_cov_ratio=0.1, clip_cov_lb=0.1, kl_cov_ratio=0.1)
    made = config.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_high=0.28, loss_agg_mode=mode,
        policy_loss=options,
    )  # fmt: skip
    made.global_batch_info.update(given)
    return made


@pytest.mark.parametrize("name", ["vanilla", *REPLACED, "reinforce"])
def test_policy_losses_of_verl(name, installed):
    algos, config = installed
    function = f"compute_policy_loss_{name}"
    new = (torch.randn(6, 11) - 2).requires_grad_()
    old, A = new.detach() + 0.3 * torch.randn(6, 11), torch.randn(6, 1).expand(6, 11).contiguous()
    mask = (torch.rand(6, 11) > 0.3).long()
    mask[1] = 0
    denominators = {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9, "loss_scale_factor": 50}

    def calls():
        found = []
        for mode in MODES:
            for given in ({}, denominators):
                for weights in (None, torch.arange(66.0).reshape(6, 11) / 66):
                    torch.manual_seed(1)
                    made = policy_config(config, mode, given)
                    loss, metrics = getattr(algos, function)(old, new, A, mask, mode, made, weights)
                    found.append((loss.detach(), metrics, torch.autograd.grad(loss, new)[0], torch.rand(1)))
        return found

    before = calls()
    rlhf_fast.patch("verl", quiet=True)
    after = calls()
    for found, wanted in zip(after, before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)
    (row,) = (r for r in status("verl") if r.symbol == f"{ALGOS}.{function}")
    assert (row.state, row.reached, row.fell_through) == ("checked", len(before), {})


@pytest.fixture
def openrlhf_losses():
    """openrlhf.models.loss without the rest of its package, which needs deepspeed and flash_attn."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        pytest.skip("openrlhf is not installed")
    before = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in ("openrlhf", "deepspeed")}
    package = types.ModuleType("openrlhf.models")
    package.__path__ = [f"{spec.submodule_search_locations[0]}/models"]
    sys.modules |= {"openrlhf.models": package, "deepspeed": types.ModuleType("deepspeed")}
    yield importlib.import_module("openrlhf.models.loss")
    rlhf_fast.unpatch("openrlhf")
    for name in [n for n in sys.modules if n.partition(".")[0] in ("openrlhf", "deepspeed")]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("dual_clip", [None, 2.5])
def test_losses_of_openrlhf(kind, dual_clip, openrlhf_losses):
    new = (torch.randn(6, 9) - 2).requires_grad_()
    old, A = new.detach() + 0.3 * torch.randn(6, 9), torch.randn(6, 9)
    rollout, mask = old + 0.2 * torch.randn(6, 9), (torch.rand(6, 9) > 0.3).long()
    later = "is_correction_level" in openrlhf_losses.PolicyLoss.__init__.__code__.co_varnames
    corrections = [{}]
    if later:
        corrections += [
            {"is_correction_level": level, "is_correction_mode": mode, "is_correction_threshold": (0.8, 1.2)}
            for level, mode in (("token", "clip"), ("token", "mask"), ("seq", "mask"))
        ]
    else:
        corrections += [
            {"enable_vllm_is_correction": True, "vllm_is_correction_type": c, "vllm_is_truncated_threshold": [0.8, 1.2]}
            for c in ("tis", "icepop", "seq-mask-tis")
        ]

    def calls():
        found = []
        for correction in corrections:
            loss = openrlhf_losses.PolicyLoss(0.1, 0.2, dual_clip, True, kind, **correction)
            for given in ({}, {"dp_size": 2, "batch_num_tokens": 37.0, "global_batch_size": 9.0}):
                results = loss(new, old, A, mask, rollout, **given)
                found.append((*results, torch.autograd.grad(results[0], new)[0]))
        return found

    before = calls()
    rlhf_fast.patch("openrlhf", quiet=True)
    torch.testing.assert_close(calls(), before, rtol=2e-5, atol=2e-6)
    (row,) = (r for r in status("openrlhf") if r.symbol.endswith("PolicyLoss.forward"))
    assert (row.state, row.reached, row.fell_through) == ("checked", len(before), {})
