from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

import rlhf_fast
from rlhf_fast.integrations import status

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
    old = torch.randn(9)
    old[0] = -10.0  # a ratio that takes the estimate beyond the bound

    def corrected():
        found = get(path)(new, ref, kind, importance_ratio=(new - old).exp())
        return found, torch.autograd.grad((found * torch.arange(9)).sum(), new)[0]

    rlhf_fast.unpatch("slime")
    before, after, counts = both(corrected, path)
    torch.testing.assert_close(after, before)
    assert counts.reached == 1
    with pytest.raises(KeyError):
        get(path)(new, ref, "k4")
    assert list(counts.fell_through) == [] and list(status()[1].fell_through) == ["kl_loss_type 'k4'"]


def test_stale_answers(framework):
    get = framework("slime")
    path = f"{UTILS}.compute_opsm_mask"
    lengths, args = [3, 4, 2, 5], SimpleNamespace(opsm_delta=0.1)
    masks = [torch.ones(n) for n in lengths]
    masks[1][2], masks[3][:] = 0, 0
    old = [torch.randn(n) for n in lengths]
    new = [x - shift for x, shift in zip(old, (0.5, 0.2, -0.3, 1.0), strict=True)]  # two stale, one without real tokens
    advantages = [torch.tensor([-1.0, 2.0, -0.5]), -torch.ones(4), -torch.ones(2), -torch.ones(5)]
    before, after, counts = both(lambda: get(path)(args, new, old, advantages, masks), path)
    torch.testing.assert_close(after, before)
    assert counts.reached == 1 and after[0].tolist() == [0.0, 1.0, 0.0, *[0.0] * 4, *[1.0] * 7]


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
