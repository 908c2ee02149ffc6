from __future__ import annotations

import json

import pytest
import torch
from loss_batches import B, T, batch, packed

from rlhf_fast import EntropyController, covariance_mask, policy_loss, top_entropy_mask

NAN = float("nan")


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_top_entropy_is_the_quantile_of_the_real_tokens(fraction, dtype):
    entropy = torch.rand(5, 9).to(dtype)
    mask = torch.rand(5, 9) > 0.3
    threshold = torch.quantile(entropy[mask].double(), 1 - fraction).to(entropy.float().dtype)
    got = top_entropy_mask(entropy.where(mask, NAN), mask, fraction=fraction)
    wide = entropy.double() if dtype is torch.float64 else entropy.float()
    assert torch.equal(got, mask & (wide >= threshold)) and got.any()
    assert fraction < 1 or torch.equal(got, mask)


def test_top_entropy_worked_value_and_ties():
    entropy, mask = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0, 9.0]]), torch.tensor([[True] * 5 + [False]])
    # Five real tokens: the 0.8 quantile of 1..5 is 4.2, the 0.6 quantile 3.4.
    assert top_entropy_mask(entropy, mask).tolist() == [[True, False, False, False, False, False]]
    assert top_entropy_mask(entropy, mask, fraction=0.4).tolist() == [[True, False, True, False, False, False]]
    assert top_entropy_mask(torch.ones(1, 6), mask).tolist() == mask.tolist()  # at the threshold, so kept
    assert not top_entropy_mask(entropy, torch.zeros_like(mask)).any()
    big = torch.arange(2**24 + 100, dtype=torch.float64)  # torch.quantile refuses more than 2^24 numbers
    assert top_entropy_mask(big, torch.ones_like(big, dtype=torch.bool), fraction=1e-6).sum() == 17


def test_a_factor_leaves_the_denominators_and_a_mask_does_not():
    tensors = batch("grpo")
    mask = tensors["mask"]
    top = top_entropy_mask(tensors["entropy"], mask, fraction=0.4)
    factor = policy_loss("dapo", **tensors, importance_weights=top.double()).loss
    masked = policy_loss("dapo", **{**tensors, "mask": top}).loss
    torch.testing.assert_close(factor * mask.sum(), masked * top.sum())


def covariances(tensors):
    logp, A = tensors["logprobs"][tensors["mask"]], tensors["advantages"][tensors["mask"]]
    out = torch.zeros(B, T, dtype=torch.float64)
    out[tensors["mask"]] = (A - A.mean()) * (logp - logp.mean())
    return out


def test_kl_cov_takes_the_tokens_with_the_largest_covariance():
    tensors = batch("grpo")
    mask, cov = tensors["mask"], covariances(tensors)
    given = [tensors[k].where(mask, NAN) for k in ("logprobs", "advantages")]
    for fraction, n in ((2e-4, 1), (0.2, int(0.2 * mask.sum())), (1.0, int(mask.sum()))):
        got = covariance_mask(*given, mask, kind="kl_cov", fraction=fraction)
        assert got.sum() == n and not (got & ~mask).any()
        assert n == mask.sum() or cov[got].min() > cov[mask & ~got].max()
    # By hand: A = 1, 1, -2 and logp = -1, -2, -3: cov = 1, 0, 2.
    got = covariance_mask(
        torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[1.0, 1.0, -2.0]]), torch.ones(1, 3).bool(), kind="kl_cov"
    )
    assert got.tolist() == [[False, False, True]]


def test_clip_cov_draws_among_the_tokens_between_the_bounds():
    tensors = batch("grpo")
    mask, cov = tensors["mask"], covariances(tensors)
    given = [tensors[k].where(mask, NAN) for k in ("logprobs", "advantages")]
    candidates = mask & (cov > 0.05) & (cov < 1.0)
    seen = torch.zeros_like(mask)
    for seed in range(60):
        g = lambda seed=seed: torch.Generator().manual_seed(seed)
        draw = lambda g: covariance_mask(*given, mask, kind="clip_cov", fraction=0.1, bounds=(0.05, 1.0), generator=g)
        got = draw(g())
        assert torch.equal(got, draw(g())) and got.sum() == int(0.1 * mask.sum()) and not (got & ~candidates).any()
        seen |= got
    assert torch.equal(seen, candidates)
    few = covariance_mask(*given, mask, kind="clip_cov", fraction=1.0, bounds=(0.05, 1.0))
    assert torch.equal(few, candidates)  # fewer than asked for
    assert not covariance_mask(*given, mask, kind="clip_cov", bounds=(1e3, 2e3)).any()


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_covariance_masks_of_packed_and_of_empty_batches(kind):
    tensors = batch("grpo")
    tensors["advantages"] = tensors["advantages"][:, :1].repeat(1, T)
    flat, cu_seqlens = packed(tensors, list(range(B)))
    whole = {"kind": kind, "fraction": 1.0, "bounds": (0.1, 0.9)}
    once = covariance_mask(flat["logprobs"], tensors["advantages"][:, 0], flat["mask"], cu_seqlens=cu_seqlens, **whole)
    padded = covariance_mask(tensors["logprobs"], tensors["advantages"], tensors["mask"], **whole)
    assert torch.equal(once, packed({"x": padded}, list(range(B)))[0]["x"]) and once.any()
    nothing = covariance_mask(tensors["logprobs"], tensors["advantages"], torch.zeros(B, T).bool(), kind=kind)
    assert nothing.shape == (B, T) and not nothing.any()


def test_the_controller_follows_skywork_or1():
    control = EntropyController(1.0)
    assert control.coef == 0.0  # nothing measured yet
    for entropy, coef in ((0.8, 0.015), (1.2, 0.0), (0.9, 0.015), (1.0, 0.02), (float("nan"), 0.02)):
        control.update(entropy)
        assert control.coef == pytest.approx(coef)
    for _ in range(10):
        control.update(2.0)
    control.update(0.5)
    assert control.coef == pytest.approx(0.005)  # it fell to 0, no further
    for _ in range(300):
        control.update(0.5)
    assert control.coef == 1.0
    again = EntropyController(1.0)
    again.put(json.loads(json.dumps(control.get())))
    assert again.get() == control.get() and again.coef == 1.0


Z, ONES = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_entropy_mask(Z, ONES, fraction=1.5), "top_entropy_mask: argument 'fraction' got 1.5"),
        (lambda: top_entropy_mask(Z, Z), "'mask' got torch.float32"),
        (lambda: top_entropy_mask(Z.long(), ONES), "'entropy' got torch.int64"),
        (lambda: covariance_mask(Z, Z, ONES, kind="cov"), "covariance_mask: argument 'kind' got 'cov'"),
        (lambda: covariance_mask(Z, Z, ONES, kind="kl_cov", fraction=0.0), "'fraction' got 0.0"),
        (lambda: covariance_mask(Z, torch.zeros(3), ONES, kind="kl_cov"), "'advantages' got shape"),
        (lambda: covariance_mask(Z, Z, Z, kind="kl_cov"), "'mask' got torch.float32"),
        (lambda: EntropyController(-1.0), "EntropyController: argument 'target' got -1.0"),
        (lambda: EntropyController(1.0, coef=2.0), "'coef' got 2.0"),
        (lambda: EntropyController(1.0, low=0.5, high=0.1), "'high' got 0.1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
