from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import rlhf_fast
from rlhf_fast.integrations import slime, status
from rlhf_fast.losses import RECIPES, policy_loss

UTILS = "slime.utils.ppo_utils"


def both(call, symbol):
    before = call()
    rlhf_fast.patch("slime", quiet=True)
    return before, call(), next(r for r in status("slime") if r.symbol == symbol)


@pytest.mark.parametrize("entropy", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_entropy(entropy, dtype, framework):
    x, tokens = torch.randn(7, 13, dtype=dtype, requires_grad=True), torch.randint(0, 13, (7,))
    path = f"{UTILS}.calculate_log_probs_and_entropy"
    get = framework("slime")

    def call():
        logps, found = get(path)(x, tokens, None, with_entropy=entropy[0], with_entropy_grad=entropy[1])
        total = logps.sum() if found is None else (logps[:, 0] + 2 * found).sum()
        return logps, found, torch.autograd.grad(total, x)[0]

    before, after, counts = both(call, path)
    torch.testing.assert_close(after[2], before[2], **({} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-3}))
    torch.testing.assert_close(after[0], before[0])
    assert (after[1] is None) == (before[1] is None) and counts.reached == 1
    if after[1] is not None:
        torch.testing.assert_close(after[1], before[1])
    get(path)(x, tokens, SimpleNamespace(rank=lambda: 0, size=lambda: 2))
    get(path)(x, tokens, None, log_prob_keep_mask=torch.ones(7, 13, dtype=torch.bool))
    assert sorted(status()[0].fell_through) == [
        "a vocabulary that is split over ranks", "log-probs over the kept tokens of a nucleus",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
def test_kl(kind, framework):
    new, ref = torch.randn(9), torch.randn(9)
    new[0] = -8.0  # beyond the bound that low_var_kl alone has
    new.requires_grad_()
    path = f"{UTILS}.compute_approx_kl"
    get = framework("slime")
    call = lambda: (found := get(path)(new, ref, kind), torch.autograd.grad((found * torch.arange(9)).sum(), new)[0])
    before, after, counts = both(call, path)
    torch.testing.assert_close(after, before)
    assert counts.reached == 1 and (after[0].max() > 10) is not (kind == "low_var_kl")
    get(path)(new, ref, kind, importance_ratio=torch.rand(9))
    assert list(status()[1].fell_through) == ["an importance ratio, which slime applies before the bound"]


@pytest.mark.parametrize("name", ["vanilla_gae", "chunked_gae"])
def test_gae(name, framework):
    rewards, values = torch.randn(3, 11), torch.randn(3, 11)
    get = framework("slime")
    before, after, counts = both(lambda: get(f"{UTILS}.{name}")(rewards, values, 0.97, 0.9), f"{UTILS}.{name}")
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert counts.reached == 1


def test_advantages_by_dotted_path(framework):
    get = framework("slime")
    lengths = [4, 1, 6]
    values, kl = ([torch.randn(n) for n in lengths] for _ in range(2))
    data = {"values": values, "kl": kl, "rewards": [1.0, -0.5, 2.0], "loss_masks": [torch.ones(n) for n in lengths]}
    args = SimpleNamespace(kl_coef=0.2, gamma=0.97, lambd=0.9)
    function = getattr(importlib.import_module("rlhf_fast.integrations.slime"), "gae_advantages")  # noqa: B009  as slime loads it
    assert function(args, data) is None
    for i, n in enumerate(lengths):
        rewards = -0.2 * kl[i]
        rewards[-1] += data["rewards"][i]
        expected = get(f"{UTILS}.vanilla_gae")(rewards[None], values[i][None], 0.97, 0.9)
        for name, wanted in zip(("advantages", "returns"), expected, strict=True):
            assert data[name][i].shape == (n,)
            torch.testing.assert_close(data[name][i], wanted[0], rtol=1e-6, atol=1e-6)


@pytest.fixture
def training(framework):
    framework("slime")
    lengths, totals = [3, 5, 2], [5, 6, 4]
    tokens = [torch.randint(0, 11, (n,)) for n in totals]
    masks = [torch.ones(n) for n in lengths]
    masks[1][2] = 0
    batch = {
        "unconcat_tokens": tokens, "total_lengths": totals, "response_lengths": lengths, "loss_masks": masks,
        "advantages": [torch.randn(n) for n in lengths],
        "log_probs": [-2.4 + 0.3 * torch.randn(n) for n in lengths],
        "ref_log_probs": [-2.4 + 0.3 * torch.randn(n) for n in lengths],
    }  # fmt: skip
    args = SimpleNamespace(
        eps_clip=0.1,
        eps_clip_high=0.2,
        eps_clip_c=None,
        entropy_coef=0.01,
        use_kl_loss=True,
        kl_loss_coef=0.3,
        kl_loss_type="k3",
    )
    logits = torch.randn(1, sum(totals), 11, requires_grad=True)
    return args, batch, logits


def sample_mean(batch):
    def reduce(x):
        parts = zip(x.split(batch["response_lengths"]), batch["loss_masks"], strict=True)
        return sum((p * m).sum() / m.sum().clamp(min=1) for p, m in parts)

    return reduce


def test_losses_by_dotted_path(training):
    args, batch, logits = training
    loss, reported = slime.policy_loss_ppo(args, batch, logits, sample_mean(batch))
    read = sys.modules["slime.backends.megatron_utils.loss"].get_log_probs_and_entropy
    found = read(
        logits,
        args=args,
        with_entropy=True,
        **{k: batch[k] for k in ("unconcat_tokens", "total_lengths", "response_lengths")},
    )[1]
    new, entropy = torch.cat(found["log_probs"]), torch.cat(found["entropy"])
    old, ref, A = (torch.cat(batch[k]) for k in ("log_probs", "ref_log_probs", "advantages"))
    reduce, ratio = sample_mean(batch), (new - old).exp()
    policy = reduce(-torch.min(ratio * A, ratio.clamp(0.9, 1.2) * A))
    x = ref - new
    expected = {"pg_loss": policy, "entropy_loss": reduce(entropy), "kl_loss": reduce(x.exp() - x - 1)}
    expected["loss"] = policy - 0.01 * expected["entropy_loss"] + 0.3 * expected["kl_loss"]
    assert reported.keys() == expected.keys() and not reported["loss"].requires_grad
    for name, wanted in expected.items():
        torch.testing.assert_close(reported[name], wanted.detach())
    grads = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, expected["loss"]))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("recipe", [recipe for recipe, rules in RECIPES.items() if not rules.needs])
def test_every_recipe_by_dotted_path(recipe, training):
    args, batch, logits = training
    args.use_kl_loss, args.entropy_coef = False, 0.0
    loss, _ = getattr(slime, f"policy_loss_{recipe}")(args, batch, logits, sample_mean(batch))
    read = sys.modules["slime.backends.megatron_utils.loss"].get_log_probs_and_entropy
    keys = ("unconcat_tokens", "total_lengths", "response_lengths")
    new = torch.cat(read(logits, args=args, with_entropy=False, **{k: batch[k] for k in keys})[1]["log_probs"])
    cu_seqlens = torch.tensor([0, *batch["response_lengths"]]).cumsum(0)
    mask = torch.cat(batch["loss_masks"]) != 0
    rest = (torch.cat(batch["log_probs"]), torch.cat(batch["advantages"]), mask)
    reduction = {"reduction": "seq-mean-token-mean", "normalizer": 1.0, "cu_seqlens": cu_seqlens}
    clip = {"clip": (0.1, 0.2)} if "clip" in RECIPES[recipe].reads else {}
    torch.testing.assert_close(loss, policy_loss(recipe, new, *rest, **clip, **reduction).loss)


def test_context_parallelism_and_unknown_recipes_raise(training, monkeypatch):
    args, batch, logits = training
    with pytest.raises(AttributeError, match="has no attribute 'policy_loss_best'"):
        slime.policy_loss_best  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'policy_loss_kl_cov'"):
        slime.policy_loss_kl_cov  # noqa: B018
    monkeypatch.setattr(sys.modules["megatron.core"].mpu, "get_context_parallel_world_size", lambda: 2)
    with pytest.raises(ValueError, match="policy_loss_ppo: context parallelism got 2 ranks, expected 1"):
        slime.policy_loss_ppo(args, batch, logits, sample_mean(batch))
    with pytest.raises(ValueError, match="gae_advantages: context parallelism got 2 ranks"):
        slime.gae_advantages(args, {"values": [], "kl": []})
