from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch
from integrations.fakes import VerlConfig

import rlhf_fast
from rlhf_fast.integrations import status
from rlhf_fast.losses import RECIPES

ALGOS, TORCH = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
DENOMINATORS = (
    {},
    {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9, "loss_scale_factor": 50},
    {
        "dp_size": 4,
        "batch_num_tokens": torch.tensor(37),
        "global_batch_size": torch.tensor(9),
        "loss_scale_factor": None,
    },
)


def batch(shape=(6, 9), dtype=torch.float32, mask_dtype=torch.int64):
    mask = (torch.rand(shape) > 0.3).to(mask_dtype)
    mask[1] = 0
    mask[2, 3:6] = 0  # an observation between real tokens
    return [torch.randn(shape, dtype=dtype) for _ in range(4)], mask


def both(get, path, call, **options):
    """call(function) before and after the patch, and the counters of the function."""
    before = call(get(path))
    rlhf_fast.patch("verl", quiet=True, **options)
    return before, call(get(path)), next(r for r in status("verl") if r.symbol == path)


def with_gradients(function, leaves, *args, weigh=torch.sin):
    """Results of a call, and the gradients of a weighted sum of its differentiable ones."""
    found = function(*args)
    tensors = [
        x for x in (found if isinstance(found, tuple) else (found,)) if isinstance(x, torch.Tensor) and x.requires_grad
    ]
    total = sum((x * weigh(torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape) + 1)).sum() for x in tensors)
    return found, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("name", ["logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits(name, dtype, framework):
    x = torch.randn(8, 13, dtype=dtype, requires_grad=True)
    args = (x, torch.randint(0, 13, (8,))) if "labels" in name or "logprobs" in name else (x,)
    before, after, counts = both(framework("verl"), f"{TORCH}.{name}", lambda f: with_gradients(f, [x], *args))
    torch.testing.assert_close(after, before)
    assert counts.reached == 1


def test_half_precision_keeps_verls_bits_and_dtypes(framework, monkeypatch):
    get = framework("verl")
    x, ids = torch.randn(8, 300).bfloat16(), torch.randint(0, 300, (8,))
    paths = [
        f"{TORCH}.{name}"
        for name in ("logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking")
    ]
    call = lambda path: get(path)(x, ids) if "logprobs" in path else get(path)(x)
    before = [call(path) for path in paths]
    rlhf_fast.patch("verl", quiet=True)
    assert all(torch.equal(call(path), y) for path, y in zip(paths[:2], before[:2], strict=True))
    torch.testing.assert_close(call(paths[2]), before[2])  # fp32 inside of verl too
    assert [r.reached for r in status("verl")][:3] == [0, 0, 1]
    rlhf_fast.patch("verl", half_precision=True, quiet=True)
    assert [call(path).dtype for path in paths] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert [r.reached for r in status("verl")][:3] == [1, 1, 2]
    rlhf_fast.unpatch("verl")
    # With flash-attn, verl's log-probs are computed and returned in fp32.
    home = sys.modules[TORCH]
    monkeypatch.setattr(home, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True, raising=False)
    monkeypatch.setattr(
        home, "logprobs_from_logits", lambda logits, labels, inplace_backward=True: before_flash(logits, labels)
    )

    def before_flash(logits, labels):  # its label -100 gives 0
        found = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        return found.where(labels >= 0, 0.0)

    ids[3] = -100
    rlhf_fast.patch("verl", quiet=True)
    assert call(paths[0]).dtype is torch.float32 and status("verl")[0].reached == 1
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    call(paths[0])
    assert status("verl")[0].reached == 1
    rlhf_fast.unpatch("verl")


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
def test_gae_is_equal_where_the_mask_is_and_zero_elsewhere(mask_dtype, framework):
    (rewards, values, *_), mask = batch(mask_dtype=mask_dtype)
    call = lambda f: f(rewards, values, mask, 0.97, 0.9)
    before, after, counts = both(framework("verl"), f"{ALGOS}.compute_gae_advantage_return", call)
    real = mask.bool()
    for x, y in zip(after, before, strict=True):
        torch.testing.assert_close(x[real], y[real], rtol=1e-6, atol=1e-6)
        assert x[~real].abs().max() == 0 < y[~real].abs().max()
    assert counts.reached == 1
    junk = values.where(real, torch.nan)
    assert all(
        x.isfinite().all() for x in sys.modules[ALGOS].compute_gae_advantage_return(rewards, junk, mask, 0.97, 0.9)
    )


@pytest.mark.parametrize("shift", [True, False])
def test_whitening(shift, framework):
    (x, *_), mask = batch()
    x.requires_grad_()
    get = framework("verl")
    call = lambda f: with_gradients(lambda *a: f(*a) * mask, [x], x, mask, shift)
    before, after, counts = both(get, f"{TORCH}.masked_whiten", call)
    torch.testing.assert_close(after, before)
    assert counts.reached == 1
    with pytest.raises(ValueError, match="division by zero"):  # verl's own refusal
        get(f"{TORCH}.masked_whiten")(x, torch.zeros_like(mask))


@pytest.mark.parametrize("name", ["compute_grpo_outcome_advantage", "compute_grpo_vectorized_outcome_advantage"])
@pytest.mark.parametrize("scaled", [True, False])
def test_grpo(name, scaled, framework):
    (rewards, *_), mask = batch((9, 4))
    index = np.array(["b", "a", "b", "c", "a", "b", "c", "one", "c"], dtype=object)
    rewards[index == "c"] = 0.1  # equal scores
    get = framework("verl")
    call = lambda f: f(rewards, mask, index, norm_adv_by_std_in_grpo=scaled)
    before, after, counts = both(get, f"{ALGOS}.{name}", call)
    varied = torch.from_numpy(index != "c")
    torch.testing.assert_close(after[0][varied], before[0][varied])
    assert after[0] is after[1] or torch.equal(*after)
    assert after[0][~varied].abs().max() == 0
    assert counts.reached == 1
    torch.testing.assert_close(get(f"{ALGOS}.{name}")(rewards, mask, torch.arange(9) // 3)[0].shape, (9, 4))


@pytest.mark.parametrize(
    "kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "abs+", "mse+", "k2+", "k3+", "low_var_kl+"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl(kind, dtype, framework):
    new, ref = (torch.randn(5, 7, dtype=dtype) for _ in range(2))
    new[0, 0], ref[0, 0] = -40.0, 3.0  # beyond both bounds of k3
    new.requires_grad_()
    get = framework("verl")
    half = dtype is torch.bfloat16
    call = lambda f: with_gradients(f, [new], new, ref, kind)
    before, after, counts = both(get, f"{ALGOS}.kl_penalty", call, half_precision=half)
    torch.testing.assert_close(after, before, **({"rtol": 2e-2, "atol": 2e-2} if half else {}))
    assert counts.reached == 1
    with pytest.raises(NotImplementedError):
        get(f"{ALGOS}.kl_penalty")(new, ref, "full")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("denominators", range(len(DENOMINATORS)))
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
def test_losses_of_every_mode(mode, denominators, mask_dtype, framework):
    (new, old, advantages, values), mask = batch(mask_dtype=mask_dtype)
    given = DENOMINATORS[denominators]
    new.requires_grad_()
    old = (new.detach() + 0.3 * old).clone()
    old[0, 0] += 30.0  # the log-ratio is clamped
    config, weights = VerlConfig(clip_ratio_high=0.28, **given), torch.rand_like(new)
    get = framework("verl")
    calls = {
        "agg_loss": lambda f: with_gradients(f, [new], new, mask, mode, *given.values()),
        "compute_value_loss": lambda f: with_gradients(
            f, [new], new, advantages, values, mask, 0.3, mode, *given.values()
        ),
        "compute_policy_loss_vanilla": lambda f: with_gradients(
            f, [new], old, new, advantages, mask, mode, config, weights
        ),
    }
    before = {name: call(get(f"{ALGOS}.{name}")) for name, call in calls.items()}
    rlhf_fast.patch("verl", quiet=True)
    for name, call in calls.items():
        after = call(get(f"{ALGOS}.{name}"))
        torch.testing.assert_close(after, before[name], rtol=2e-5, atol=2e-6)
    metrics = get(f"{ALGOS}.compute_policy_loss_vanilla")(old, new, advantages, mask, mode, config)[1]
    assert all(type(x) is float for x in metrics.values())
    assert {r.symbol.rpartition(".")[2]: r.reached for r in status("verl") if r.reached} == {
        "agg_loss": 1, "compute_value_loss": 1, "compute_policy_loss_vanilla": 2,
    }  # fmt: skip


def test_what_verl_keeps(framework):
    (new, old, advantages, _), mask = batch(mask_dtype=torch.float32)
    get = framework("verl")
    rlhf_fast.patch("verl", quiet=True)
    algos = sys.modules[ALGOS]
    algos.compute_policy_loss_vanilla(old, new, advantages.requires_grad_(), mask, "token-mean", VerlConfig())
    algos.agg_loss(new, mask * 0.5, "token-mean")
    algos.agg_loss(new, mask[:1], "token-sum")
    assert not algos.agg_loss(new, mask, "token-mean", 1, 0).isfinite()  # verl divides by what it is given
    with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
        algos.agg_loss(new, mask, "batch-mean")
    reasons = {r.symbol.rpartition(".")[2]: sorted(r.fell_through) for r in status("verl") if r.fell_through}
    assert reasons == {
        "compute_policy_loss_vanilla": ["advantages has a gradient"],
        "agg_loss": [
            "a denominator of 0",
            "a mask (1, 9) for a loss (6, 9)",
            "loss_agg_mode 'batch-mean'",
            "the mask holds weights other than 0 and 1",
        ],
    }
    assert get(f"{ALGOS}.agg_loss") is algos.agg_loss


@pytest.mark.parametrize(
    ("environment", "acts"),
    [
        ({}, False),
        ({"VERL_USE_EXTERNAL_PLUGINS": "auto"}, False),
        ({"VERL_USE_EXTERNAL_PLUGINS": "other"}, False),
        ({"VERL_USE_EXTERNAL_PLUGINS": "other, rlhf_fast"}, True),
        ({"VERL_USE_EXTERNAL_MODULES": "rlhf_fast.integrations.verl_plugin"}, True),
    ],
)
def test_the_plugin_acts_when_it_is_named(environment, acts, framework, monkeypatch):
    framework("verl")
    for name in ("VERL_USE_EXTERNAL_PLUGINS", "VERL_USE_EXTERNAL_MODULES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sys.modules.pop("rlhf_fast.integrations.verl_plugin", None)
    importlib.import_module("rlhf_fast.integrations.verl_plugin")
    registry = sys.modules[ALGOS].POLICY_LOSS_REGISTRY
    assert bool(status("verl")) is acts
    assert (
        {f"rlhf_fast_{recipe}" for recipe, rules in RECIPES.items() if not rules.needs} <= set(registry)
        if acts
        else not any(name.startswith("rlhf_fast") for name in registry)
    )


def test_the_entry_point_names_the_plugin():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["verl.plugins"] == {"rlhf_fast": "rlhf_fast.integrations.verl_plugin"}


def test_registered_recipes_take_verls_clips_modes_and_denominators(framework):
    framework("verl")
    from rlhf_fast.integrations.verl_losses import register_policy_losses

    recipes = [recipe for recipe, rules in RECIPES.items() if not rules.needs]
    assert register_policy_losses() == [f"rlhf_fast_{recipe}" for recipe in recipes]
    algos = sys.modules[ALGOS]
    (new, noise, advantages, _), mask = batch()
    new.requires_grad_()
    old = new.detach() + 0.3 * noise
    ours = algos.POLICY_LOSS_REGISTRY["rlhf_fast_ppo_dual_clip"]
    for mode in MODES:
        for given in DENOMINATORS:
            config = VerlConfig(0.1, clip_ratio_high=0.3, **given)
            found = with_gradients(lambda *a: ours(*a)[0], [new], old, new, advantages, mask, mode, config)
            theirs = lambda *a: algos.compute_policy_loss_vanilla(*a)[0]
            torch.testing.assert_close(found, with_gradients(theirs, [new], old, new, advantages, mask, mode, config))
    for recipe in recipes:
        loss, metrics = algos.POLICY_LOSS_REGISTRY[f"rlhf_fast_{recipe}"](
            old, new, advantages, mask, "token-mean", VerlConfig(), torch.rand_like(new)
        )
        assert loss.requires_grad and all(type(x) is float for x in metrics.values())
