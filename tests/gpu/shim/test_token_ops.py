"""The per-token ops: parity of results and gradients with the reference, and the bits of a row in any batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gpu.shim.cells import cuda_cells
from parity import assert_parity, double
from torch import Tensor

import rlhf_fast
from rlhf_fast.dialects import DIALECTS
from rlhf_fast.ops.kl_estimate import ALL_KINDS
from rlhf_fast.reference import advantages, gae, group_advantages, kl_estimate, ppo_loss, reward_loss, whiten
from rlhf_fast.reference._reduce import REDUCTIONS
from rlhf_fast.reference.group_advantages import KINDS

# 1: alone; 6: a vector and a rest; 1025: a second tile of a row; 4100: a second part of an array.
LENGTHS = [1, 6, 1025, 4100]


def evaluate(function, kwargs, leaves, options):
    """{name: result or gradient} of a public function, upstream gradients drawn once."""
    inputs = {k: v.clone().requires_grad_() if k in leaves and v is not None else v for k, v in kwargs.items()}
    out = function(**inputs, **options)
    stats = {}
    if isinstance(out, Tensor):
        results = {"result": out}
    elif hasattr(out, "stats"):
        results, stats = {"loss": out.loss}, dict(out.stats)
        stats["explained_variance"] = 1 - stats.get("explained_variance", torch.ones(()))
    else:
        names = getattr(out, "_fields", ("advantages", "returns"))
        results = dict(zip(names, out, strict=True))
    g = torch.Generator().manual_seed(3)
    total = sum(
        (x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum() for x in results.values()
    )
    given = [k for k in leaves if inputs.get(k) is not None]
    grads = torch.autograd.grad(total, [inputs[k] for k in given])
    return {k: v.detach() for k, v in {**results, **stats}.items()} | {
        f"d {k}": g for k, g in zip(given, grads, strict=True)
    }


def check(function, kwargs, leaves, shifted=(), **options):
    """Parity of everything. shifted: sums of terms of both signs, compared at the size of a term, 1."""
    got = evaluate(function, kwargs, leaves, options)
    with rlhf_fast.use_backend("reference"):
        truth = evaluate(function, double(kwargs), leaves, options)
        plain = evaluate(function, kwargs, leaves, options)
    for name, value in got.items():
        shift = 1.0 if name in shifted else 0.0
        assert_parity(value + shift, truth[name] + shift, plain[name] + shift, name)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_kl_estimate(cuda, n, kind):
    kwargs = kl_estimate.sample((n,))
    for clamp in (None, (2.0, 1.0)):
        check(rlhf_fast.kl_estimate, kwargs, ("logprobs", "ref_logprobs"), kind=kind, clamp=clamp)
    check(rlhf_fast.kl_estimate, {**kwargs, "mask": None}, ("logprobs", "ref_logprobs"), kind=kind)


@pytest.mark.parametrize("T", [1, 6, 1025, 2050])
@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_gae(cuda, T, gap):
    kwargs = gae.sample((3, T))
    for mask in (kwargs["mask"], None):
        check(
            rlhf_fast.gae, {**kwargs, "mask": mask}, ("rewards", "values", "bootstrap"), gap=gap, gamma=0.99, lam=0.97
        )


@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_gae_of_packed_rows_is_that_of_padded_rows_to_the_bit(cuda, gap):
    kwargs = gae.sample((6, 2100))
    lengths = torch.tensor([2100, 0, 1023, 1, 1024, 1027])
    inside = torch.arange(2100)[None] < lengths[:, None]
    kwargs["mask"] &= inside
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    padded = rlhf_fast.gae(**kwargs, gap=gap, gamma=0.99)
    packed = rlhf_fast.gae(
        *(kwargs[k][inside] for k in ("rewards", "values", "mask")),
        bootstrap=kwargs["bootstrap"], cu_seqlens=cu_seqlens, gap=gap, gamma=0.99,
    )  # fmt: skip
    for a, b in zip(padded, packed, strict=True):
        assert torch.equal(a[inside], b) and not a[~inside].any()
    for i in range(6):
        alone = rlhf_fast.gae(
            *(kwargs[k][i : i + 1].clone() for k in ("rewards", "values", "mask")),
            bootstrap=kwargs["bootstrap"][i : i + 1].clone(), gap=gap, gamma=0.99,
        )  # fmt: skip
        assert all(torch.equal(a[i], b[0]) for a, b in zip(padded, alone, strict=True))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(cuda, n, shift_mean):
    kwargs = whiten.sample((n,))
    for mask in (kwargs["mask"], None):
        for unbiased in (True, False):
            check(rlhf_fast.whiten, {**kwargs, "mask": mask}, ("x",), shift_mean=shift_mean, unbiased=unbiased)


def test_whiten_of_equal_numbers_and_of_more_parts_than_a_block_has_threads(cuda):
    assert not rlhf_fast.whiten(torch.full((3000,), 0.1)).any()
    assert not rlhf_fast.whiten(torch.ones(50), torch.zeros(50, dtype=torch.bool)).any()
    check(rlhf_fast.whiten, whiten.sample((300 * 1024 + 5,)), ("x",))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("token_scores", [False, True])
def test_advantages(cuda, dialect, token_scores):
    leaves = ("scores", "values", "logprobs", "ref_logprobs", "bootstrap")
    for shape in ((5, 7), (2, 1030)):
        kwargs = advantages.sample(shape, token_scores=token_scores)
        for whitened in (True, False):
            check(
                rlhf_fast.advantages, kwargs, leaves, kl_coef=0.3, kl_kind="k3", gamma=0.97, dialect=dialect, whiten=whitened
            )  # fmt: skip


def test_advantages_without_a_reference_of_packed_rows_and_of_many(cuda):
    kwargs = advantages.sample((6, 30))
    for k in ("logprobs", "ref_logprobs", "bootstrap"):
        kwargs[k] = None
    lengths = torch.tensor([30, 0, 7, 1, 12, 0])
    inside = torch.arange(30)[None] < lengths[:, None]
    kwargs["mask"] &= inside
    packed = {k: kwargs[k][inside] for k in ("values", "mask")} | {"scores": kwargs["scores"]}
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for dialect in ("rlhf_fast", "trl"):
        check(rlhf_fast.advantages, kwargs, ("scores", "values"), dialect=dialect)
        check(rlhf_fast.advantages, packed, ("scores", "values"), dialect=dialect)
    check(rlhf_fast.advantages, advantages.sample((2050, 2)), ("values",), kl_coef=0.1)  # rows share parts


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ppo_loss(cuda, reduction):
    leaves, shifted = ("logprobs", "entropy", "values"), ("loss", "policy_loss", "kl")
    options = {"entropy_coef": 0.01, "kl_coef": 0.1, "reduction": reduction, "dual_clip": 1.5}
    for shape in ((1, 1), (5, 7), (3, 1025), (300, 5)):
        kwargs = ppo_loss.sample(shape)
        kwargs["mask"][0, 1:] = False
        check(rlhf_fast.ppo_loss, kwargs, leaves, shifted, **options)
        core = {k: kwargs[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")}
        check(rlhf_fast.ppo_loss, core, leaves, shifted, reduction=reduction, normalizer=7.0)
    flat = {k: v[kwargs["mask"].any(1)].reshape(-1) for k, v in kwargs.items()}
    n = flat["mask"].numel()
    flat["cu_seqlens"] = torch.tensor([0, 3, 3, 700, n - 1, n])
    check(rlhf_fast.ppo_loss, flat, leaves, shifted, normalizer=torch.tensor(3.5), **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cispo(cuda, reduction):
    kwargs = {k: v for k, v in ppo_loss.sample((3, 1025)).items() if "values" not in k and k != "returns"}
    kwargs["old_logprobs"][0, ::5] -= 30.0  # beyond the clamp of the log-ratio, which stops no gradient
    cispo = partial(rlhf_fast.policy_loss, "cispo", clip=(0.2, 0.1), entropy_coef=0.01, kl_coef=0.1)
    before = cuda.configure()
    check(cispo, kwargs, ("logprobs", "entropy"), ("loss", "policy_loss", "kl"), reduction=reduction)
    assert cuda.configure() == before + 1


@pytest.mark.parametrize("kl_kind", ALL_KINDS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_ppo_loss_with_every_penalty_and_dialect(cuda, kl_kind, dialect):
    kwargs = ppo_loss.sample((4, 33))
    kwargs["old_values"] = None
    kwargs["old_logprobs"][1, ::5] -= 30.0  # beyond the clamp of the log-ratio
    kwargs["importance_weights"][1, ::5] = 0.0
    check(
        rlhf_fast.ppo_loss, kwargs, ("logprobs", "values"), ("loss", "policy_loss", "kl"),
        kl_coef=0.1, kl_kind=kl_kind, dialect=dialect, value_clip=None,
    )  # fmt: skip


def test_losses_without_a_token_are_0(cuda):
    for shape in ((3, 0), (0, 5), (2, 4)):
        kwargs = ppo_loss.sample(shape)
        kwargs["mask"][:] = False
        for reduction in REDUCTIONS:
            out = evaluate(
                rlhf_fast.ppo_loss, kwargs, ("logprobs", "values"), {"reduction": reduction, "normalizer": None}
            )
            assert not any(v.any() for k, v in out.items() if k != "explained_variance"), reduction
    kwargs = ppo_loss.sample((0,)) | {"cu_seqlens": torch.tensor([0])}
    for reduction in REDUCTIONS:
        out = evaluate(rlhf_fast.ppo_loss, kwargs, ("logprobs", "values"), {"reduction": reduction})
        assert not any(v.any() for k, v in out.items() if k != "explained_variance"), reduction
    for n in (0, 5):
        kwargs = {**reward_loss.sample(n), "mask": torch.zeros(n, dtype=torch.bool)}
        out = evaluate(rlhf_fast.reward_loss, kwargs, ("chosen_scores", "rejected_scores"), {"center_coef": 0.1})
        assert not any(v.any() for k, v in out.items() if k != "explained_variance")


@pytest.mark.parametrize("n", LENGTHS)
def test_reward_loss(cuda, n):
    kwargs, leaves = reward_loss.sample(n), ("chosen_scores", "rejected_scores")
    kwargs["mask"][0] = True
    shifted = ("loss", "margin", "chosen_score", "rejected_score")
    check(rlhf_fast.reward_loss, kwargs, leaves, shifted, center_coef=0.1, label_smoothing=0.2)
    check(rlhf_fast.reward_loss, {**kwargs, "mask": None, "margin": None}, leaves, shifted)


@pytest.mark.parametrize("n", [0, 1, 2, 24, 600])
@pytest.mark.parametrize("kind", KINDS)
def test_group_advantages(cuda, n, kind):
    kwargs = group_advantages.sample(n)
    if n == 600:  # without ties, where the gradient of a maximum is a matter of taste
        kwargs["scores"] = torch.randn(n)
        kwargs["group_ids"] = torch.randint(-(2**62), 2**62, (120,))[torch.randint(0, 120, (n,))]
    if n == 0:
        assert rlhf_fast.group_advantages(**kwargs, kind=kind).shape == (0,)
        rlhf_fast.whiten(torch.ones(3))
        return
    for mask in (kwargs["mask"], None):
        check(rlhf_fast.group_advantages, {**kwargs, "mask": mask}, ("scores",), kind=kind)


def test_masked_tokens_are_not_looked_at(cuda):
    kwargs = ppo_loss.sample((3, 70))
    clean = evaluate(rlhf_fast.ppo_loss, kwargs, ("logprobs", "values"), {"kl_coef": 0.1})
    dirty = {k: v if k == "mask" else v.masked_fill(~kwargs["mask"], float("nan")) for k, v in kwargs.items()}
    again = evaluate(rlhf_fast.ppo_loss, dirty, ("logprobs", "values"), {"kl_coef": 0.1})
    assert all(torch.equal(clean[k], again[k]) for k in clean)
    kwargs = advantages.sample((3, 70))
    clean = rlhf_fast.advantages(**kwargs, kl_coef=0.1)
    dirty = {
        k: v.masked_fill(~kwargs["mask"], float("nan")) if k != "mask" and v.dim() == 2 else v
        for k, v in kwargs.items()
    }
    assert all(torch.equal(a, b) for a, b in zip(clean, rlhf_fast.advantages(**dirty, kl_coef=0.1), strict=True))


def test_results_do_not_depend_on_the_order_of_blocks(cuda):
    kwargs = ppo_loss.sample((7, 2000))
    path = advantages.sample((40, 300))
    results = []
    for seed in (1, 2):
        with cuda_cells(seed, multiprocessors=132):
            out = evaluate(rlhf_fast.ppo_loss, kwargs, ("logprobs", "values"), {"kl_coef": 0.1})
            results.append([*out.values(), *rlhf_fast.advantages(**path, kl_coef=0.1)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_loss_is_one_launch_and_leaves_its_counters_as_it_found_them(cuda, monkeypatch):
    """A captured graph replays with the counters that the run before has left."""
    counters = torch.zeros(4, dtype=torch.int64)
    for file in ("ppo_loss", "reward_loss"):
        monkeypatch.setattr(f"rlhf_fast.cuda.{file}.counters_for", lambda x: counters)
    calls = {
        "ppo_loss": (rlhf_fast.ppo_loss, ppo_loss.sample((5, 900)), ("logprobs", "entropy", "values")),
        "reward_loss": (rlhf_fast.reward_loss, reward_loss.sample(4500), ("chosen_scores", "rejected_scores")),
    }
    for name, (function, kwargs, leaves) in calls.items():
        before = cuda.configure()
        first, again = (evaluate(function, kwargs, leaves, {}) for _ in range(2))
        assert cuda.configure() == before + 2, name
        assert all(torch.equal(first[k], again[k]) for k in first) and not counters.any()


def test_a_spread_far_from_zero_costs_no_digits_and_none_is_exactly_none(cuda):
    """Variances are of deviations from the mean, not differences of squares."""
    kwargs = ppo_loss.sample((4, 1100))
    kwargs["returns"] = 1000 + torch.randn(4, 1100)
    kwargs["values"] = kwargs["returns"] + 0.1 * torch.randn(4, 1100)
    check(rlhf_fast.ppo_loss, kwargs, ("logprobs", "values"), ("loss", "policy_loss", "kl"))
    kwargs["returns"] = torch.full((4, 1100), 0.1)
    assert rlhf_fast.ppo_loss(**kwargs).stats["explained_variance"] == 0
