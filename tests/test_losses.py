from __future__ import annotations

import math
import re

import pytest
import tolerances
import torch
from parity import assert_parity, double

from rlhf_fast.denominators import Denominators
from rlhf_fast.losses import RECIPES, policy_loss
from rlhf_fast.ops import kl_estimate, linear_token_logprobs, token_logprobs
from rlhf_fast.reference import ppo_loss as sample_source


def batch(shape=(6, 41), dtype=torch.float32, seed=0):
    kwargs = sample_source.sample(shape, dtype=dtype, seed=seed)
    return {k: kwargs[k] for k in ("logprobs", "old_logprobs", "advantages", "mask", "ref_logprobs")}


def run(recipe, kwargs, **options):
    leaf = kwargs["logprobs"].clone().requires_grad_()
    out = policy_loss(recipe, **{**kwargs, "logprobs": leaf}, **options)
    return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0], out.stats


def single(ratios, advantage, recipe, **options):
    """One sequence with the given log-ratios: (loss, gradient, stats)."""
    log_ratio = torch.tensor([ratios], dtype=torch.float64)
    kwargs = {
        "logprobs": log_ratio,
        "old_logprobs": torch.zeros_like(log_ratio),
        "advantages": torch.full_like(log_ratio, advantage),
        "mask": torch.ones_like(log_ratio, dtype=torch.bool),
    }
    return run(recipe, kwargs, **options)


FUSED = [name for name, recipe in RECIPES.items() if recipe.fused]


def test_the_hot_recipes_have_a_kernel():
    assert {"ppo", "grpo", "dapo", "cispo", "cispo_cap", "gspo", "gspo_token", "luspo", "rloo"} <= set(FUSED)


def layouts(recipe, dtype):
    """A batch with every term and NaN behind the mask, as it is, packed, and as a part of a step with other counts."""
    g = torch.Generator().manual_seed(5)
    kwargs = batch(dtype=dtype)
    lengths = torch.tensor([41, 0, 17, 1, 41, 30])
    inside = torch.arange(41) < lengths[:, None]
    kwargs["mask"] &= inside
    kwargs["entropy"] = torch.rand(6, 41, generator=g).to(dtype)
    if RECIPES[recipe].correction is not None:
        kwargs["rollout_logprobs"] = kwargs["old_logprobs"] - 0.1 * torch.randn(6, 41, generator=g).to(dtype)
    kwargs = {k: v if k == "mask" else v.where(kwargs["mask"], float("nan")) for k, v in kwargs.items()}
    counts = Denominators.of(torch.ones(9, 50, dtype=torch.bool))
    shared = {} if RECIPES[recipe].local else {"denominators": counts}
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    yield kwargs, {}
    yield kwargs, shared
    yield {k: v[inside] for k, v in kwargs.items()}, {"cu_seqlens": cu_seqlens, **shared}


def compare(recipe, kwargs, **options):
    """The kernel against the formula in fp64: loss, gradient and statistics; (kernel's, formula's)."""
    fused, plain = run(recipe, kwargs, **options, fused=True), run(recipe, kwargs, **options, fused=False)
    truth = run(recipe, double(kwargs), **options, fused=False)
    one_sign = {**double(kwargs), "advantages": -double(kwargs)["advantages"].abs()}
    sizes = run(recipe, one_sign, **options, fused=False)  # of the terms, which cancel
    size = 1 + sizes[2]["policy_loss"].abs().item()
    assert_parity(fused[0], truth[0], plain[0], "loss", size)
    assert_parity(fused[1], truth[1], plain[1], "gradient", sizes[1].abs().max().item())
    for name in plain[2]:
        scale = (size if name == "policy_loss" else 1.0) + truth[2][name].item()
        assert_parity(fused[2][name], truth[2][name], plain[2][name], name, scale)
    return fused, plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", FUSED)
def test_the_kernel_and_the_formula_of_a_recipe_agree(recipe, dtype):
    for kwargs, options in layouts(recipe, dtype):
        options |= {"entropy_coef": 0.01, "kl_coef": 0.1, "kl_kind": "k3"}
        fused, _ = compare(recipe, kwargs, **options)
        assert not fused[1][~kwargs["mask"]].any()
        default = run(recipe, kwargs, **options)
        assert torch.equal(default[0], fused[0]) and torch.equal(default[1], fused[1])


@pytest.mark.parametrize("recipe", [name for name in FUSED if RECIPES[name].level != "token"])
def test_the_kernel_knows_the_bounds_of_the_ratio_of_a_row(recipe):
    kwargs = batch(dtype=torch.float64)
    kwargs["logprobs"] = kwargs["old_logprobs"] + torch.tensor([0.0, 12.0, 30.0, -30.0, 0.4, 0.001])[:, None]
    kwargs["logprobs"][4, ::3] -= 25  # some tokens beyond the bound of a token
    kwargs["advantages"] = kwargs["advantages"][:, :1].sign() * torch.tensor([1.0, -0.5]).repeat(21)[:41]
    _, (_, grad, _) = compare(recipe, kwargs)
    assert not grad[2].any() and not grad[4, ::3].any() and grad[0].any()


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("grpo", {"ratio_cap": 1.25}),
        ("two_sided_clip", {"ratio_cap": 1.31, "clip": (0.1, 0.3)}),
        ("two_sided_clip", {"ratio_cap": 1.4, "dual_clip": 1.3}),
        ("two_sided_clip", {"ratio_cap": 1.4, "dual_clip": 1.6}),
        ("cispo", {"clip": (0.1, 0.05)}),
        ("cispo_cap", {"ratio_cap": 1.05}),
    ],
)
def test_the_kernel_knows_the_bounds_of_a_call(recipe, options):
    compare(recipe, batch(dtype=torch.float64), **options)


@pytest.mark.parametrize(("recipe", "cap"), [("two_sided_clip", 1.1), ("cispo_cap", 0.9)])
def test_caps_that_no_kernel_covers_are_left_to_the_formula(recipe, cap):
    kwargs = batch(dtype=torch.float64)
    assert torch.equal(run(recipe, kwargs, ratio_cap=cap)[1], run(recipe, kwargs, ratio_cap=cap, fused=False)[1])
    with pytest.raises(ValueError, match=f"no kernel covers {recipe}"):
        run(recipe, kwargs, ratio_cap=cap, fused=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_no_kernel_covers_is_computed_by_the_formula(recipe):
    kwargs = {k: torch.ones(2, 3, dtype=torch.bool) for k in ("mask", "selected")}
    kwargs |= {
        k: -torch.rand(2, 3) for k in ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
    }
    kwargs = {k: v for k, v in kwargs.items() if k not in {"selected", "rollout_logprobs"} - set(RECIPES[recipe].needs)}
    uncovered = {"kl_coef": 0.1, "kl_kind": "k3", "kl_placement": "corrected"}
    assert (
        policy_loss(recipe, **kwargs, **uncovered).loss == policy_loss(recipe, **kwargs, **uncovered, fused=False).loss
    )
    with pytest.raises(
        ValueError, match=f"'fused' got True, expected None or False: no kernel covers {re.escape(recipe)}"
    ):
        policy_loss(recipe, **kwargs, **uncovered, fused=True)


def test_worked_values_of_sequence_ratios():
    ratios = [0.1, -0.2, 0.3]
    assert single(ratios, 1.0, "gspo", clip=(0.5, 0.5))[0].item() == pytest.approx(-1.0689391, abs=6e-8)
    assert single(ratios, 1.0, "rloo", clip=(0.5, 0.5))[0].item() == pytest.approx(-1.2214028, abs=6e-8)
    assert single(ratios, 1.0, "gmpo", clip=0.2)[0].item() == pytest.approx(-1.0338951, abs=6e-8)
    assert single(ratios, -1.0, "gmpo", clip=0.2)[0].item() == pytest.approx(1.0689391, abs=6e-8)


def test_worked_values_of_surrogates():
    log = math.log
    assert single([log(1.5)], 1.0, "dapo")[0].item() == pytest.approx(-1.28)
    assert single([log(5.0)], -1.0, "ppo_dual_clip")[0].item() == pytest.approx(3.0)
    assert single([log(5.0)], -1.0, "ppo")[0].item() == pytest.approx(5.0)
    loss, grad, _ = single([0.0], 1.0, "sapo")
    assert loss.item() == pytest.approx(-2.0) and grad.item() == pytest.approx(-1.0)  # value 2 / tau, slope 1
    assert single([0.0], -1.0, "sapo")[0].item() == pytest.approx(2 / 1.05)


def test_cispo_caps_the_weight_relative_to_one_and_keeps_every_gradient():
    _, grad, stats = single([2.0], 1.0, "cispo")
    assert grad.item() == pytest.approx(-5.0) and stats["clip_fraction"] == 1
    assert single([2.0], 1.0, "cispo", clip=(0.2, 0.2))[1].item() == pytest.approx(-1.2)
    assert single([-2.0], 1.0, "cispo")[1].item() == pytest.approx(-math.exp(-2.0))  # no lower cap by default


def test_worked_values_of_the_aggregations():
    token_loss = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [7.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    zeros = torch.zeros(3, 3)
    for recipe, expected in (
        ("ppo", 3.6667),
        ("bnpo", 3.6667),
        ("dapo", 3.6667),
        ("grpo", 4.1667),
        ("dr_grpo", 2.4444),
    ):
        got = policy_loss(recipe, zeros, None, -token_loss, mask).loss.item()
        assert got == pytest.approx(expected, abs=tolerances.WORKED4), recipe
    for options, expected in (
        ({"reduction": "seq-mean-token-sum"}, 7.3333),
        ({"reduction": "seq-mean-token-sum-norm"}, 2.4444),  # verl: the line above over the horizon
        ({"reduction": "token-sum", "normalizer": 3.0}, 7.3333),  # verl before it divided by the batch: sum / horizon
        ({"reduction": "constant"}, 2.4444),
        ({"reduction": "constant", "denominators": Denominators.of(mask, horizon=10)}, 22 / 30),
        ({"reduction": "seq-mean-token-sum-norm", "denominators": Denominators.of(mask, horizon=10)}, 22 / 30),
        ({"reduction": "token-mean", "denominators": Denominators.of(mask).averaged(2)}, 2 * 3.6667),
    ):
        got = policy_loss("ppo", zeros, None, -token_loss, mask, **options).loss.item()
        assert got == pytest.approx(expected, abs=2 * tolerances.WORKED4), options


def test_a_fully_masked_row_counts_as_a_slot_but_not_as_a_sequence():
    token_loss, mask = torch.ones(2, 4), torch.tensor([[True] * 4, [False] * 4])
    for reduction, expected in (
        ("constant", 4 / 8), ("seq-mean-token-sum-norm", 4 / 4), ("seq-mean-token-sum", 4), ("token-mean", 1),
    ):  # fmt: skip
        got = policy_loss("ppo", torch.zeros(2, 4), None, -token_loss, mask, reduction=reduction).loss.item()
        assert got == expected, reduction


def test_the_kl_term_is_the_estimator_reduced_like_the_policy_term():
    kwargs = batch(dtype=torch.float64)
    for kind in ("k1", "k2", "k3", "k3+", "abs"):
        kl = kl_estimate(kwargs["logprobs"], kwargs["ref_logprobs"], kind, clamp=(20.0, 10.0), mask=kwargs["mask"])
        added = run("ppo", kwargs, kl_coef=0.3, kl_kind=kind, kl_clamp=(20.0, 10.0))[0] - run("ppo", kwargs)[0]
        torch.testing.assert_close(added, 0.3 * kl.sum() / kwargs["mask"].sum())


def test_the_corrected_kl_has_the_gradient_of_the_reverse_kl_off_policy():
    # Over all tokens of a distribution, weighted by the old policy that would have drawn them.
    g = torch.Generator().manual_seed(3)
    new, old, ref = torch.randn(3, 9, generator=g, dtype=torch.float64).log_softmax(1)
    logits = new.clone().requires_grad_()
    policy = logits.log_softmax(0)
    expected = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits)[0]
    logits = new.clone().requires_grad_()
    policy = logits.log_softmax(0)
    one = lambda x: x.view(1, 1)
    options = {"kl_coef": 1.0, "kl_placement": "corrected"}
    zero, mask = torch.zeros(1, 1).double(), torch.ones(1, 1).bool()
    terms = [
        policy_loss("grpo", one(policy[i]), one(old[i]), zero, mask, ref_logprobs=one(ref[i]), **options).loss
        * old[i].exp()
        for i in range(9)
    ]
    torch.testing.assert_close(torch.autograd.grad(sum(terms), logits)[0], expected)
    torch.testing.assert_close(sum(terms).detach(), (new.exp() * (new - ref)).sum())


def test_the_entropy_bonus_is_reduced_like_the_policy_term():
    kwargs, entropy = batch(dtype=torch.float64), torch.rand(6, 41, dtype=torch.float64)
    with_bonus = run("ppo", kwargs, entropy=entropy, entropy_coef=0.2)
    mean = (entropy * kwargs["mask"]).sum() / kwargs["mask"].sum()
    torch.testing.assert_close(with_bonus[0], run("ppo", kwargs)[0] - 0.2 * mean)
    torch.testing.assert_close(with_bonus[2]["entropy"], mean)


def test_ratio_cap_is_trls_delta():
    log = math.log
    assert single([log(5.0)], -1.0, "grpo", ratio_cap=4.0)[0].item() == pytest.approx(4.0)
    assert single([log(5.0)], -1.0, "grpo", ratio_cap=4.0)[1].item() == 0.0
    assert single([log(5.0)], 1.0, "grpo", ratio_cap=4.0)[0].item() == pytest.approx(-1.2)
    assert single([log(9.0)], 1.0, "cispo_cap", ratio_cap=2.5)[1].item() == pytest.approx(-2.5)


def test_both_conventions_of_cispo_agree_where_their_caps_do():
    kwargs = batch(dtype=torch.float64)
    relative, absolute = run("cispo", kwargs, clip=(1.0, 0.1)), run("cispo_cap", kwargs, ratio_cap=1.1)
    assert torch.equal(relative[1], absolute[1]) and relative[2]["clip_fraction"] > 0.1
    assert not torch.allclose(run("cispo", kwargs, clip=(0.1, 0.1))[1], absolute[1])  # a lower bound is verl's alone


def test_options_reach_the_surrogate():
    assert single([0.0], 1.0, "sapo", options={"tau_positive": 4.0})[0].item() == pytest.approx(-0.5)
    w, k, lam = math.exp(0.3), 1.5, 0.7
    expected = -(w**k) * math.exp(lam * (1 - w))
    _, grad, _ = single([0.3], 1.0, "vespo", options={"k_positive": k, "lambda_positive": lam})
    assert grad.item() == pytest.approx(expected)
    selected = {"selected": torch.ones(1, 1, dtype=torch.bool)}
    assert single([0.3], 0.0, "kl_cov", options={"penalty": 2.0}, **selected)[0].item() == pytest.approx(0.6)


def test_decoupled_ppo_is_ppo_around_the_proximal_policy_times_its_weight():
    kwargs = batch(dtype=torch.float64)
    rollout = kwargs["old_logprobs"] + 0.3 * torch.randn(6, 41, dtype=torch.float64)
    weights = (kwargs["old_logprobs"] - rollout).exp()
    got = run("decoupled_ppo", kwargs, rollout_logprobs=rollout)
    expected = run("ppo", kwargs, importance_weights=weights)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    capped = run("decoupled_ppo", kwargs, rollout_logprobs=rollout, correction="token-tis", correction_bounds=1.1)
    torch.testing.assert_close(capped[1], run("ppo", kwargs, importance_weights=weights.clamp(max=1.1))[1])


@pytest.mark.parametrize("recipe", ["dapo", "gspo", "cispo"])
def test_the_gradient_reaches_the_hidden_states_without_logits(recipe):
    g = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    hidden, weight = draw(3, 7, 16), 0.3 * draw(50, 16)
    ids, mask = torch.randint(0, 50, (3, 7), generator=g), torch.rand(3, 7, generator=g) > 0.2
    advantages, ref = draw(3), -draw(3, 7).abs() - 3
    old = token_logprobs(hidden @ weight.T, ids).logprobs + 0.2 * draw(3, 7)

    def through(stats_of):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        s = stats_of(*leaves)
        loss = policy_loss(
            recipe,
            s.logprobs,
            old,
            advantages,
            mask,
            ref_logprobs=ref,
            kl_coef=0.1,
            entropy=s.entropy,
            entropy_coef=0.1,
        ).loss
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    got = through(lambda h, w: linear_token_logprobs(h, w, ids, mask=mask))
    expected = through(lambda h, w: token_logprobs(h @ w.T, ids, mask=mask))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not got[1][~mask].any() and got[1].any()


@pytest.mark.parametrize("recipe", ["grpo", "dr_grpo", "decoupled_ppo", "gspo", "gmpo", "vespo", "sapo"])
def test_a_whole_loss_compiles_into_one_graph(recipe):
    kwargs = batch()
    if "rollout_logprobs" in RECIPES[recipe].needs:
        kwargs["rollout_logprobs"] = kwargs["old_logprobs"] - 0.1 * torch.randn(6, 41)
    counts = Denominators.of(torch.ones(9, 41, dtype=torch.bool))
    compiled = torch.compile(policy_loss, backend="aot_eager", fullgraph=True)
    leaf = kwargs["logprobs"].clone().requires_grad_()
    loss = compiled(recipe, **{**kwargs, "logprobs": leaf}, kl_coef=0.1, denominators=counts).loss
    expected = run(recipe, kwargs, kl_coef=0.1, denominators=counts)
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected[1])


def test_importance_weights_scale_the_policy_term():
    kwargs = batch()
    half = run("grpo", kwargs, importance_weights=torch.full((6, 41), 0.5))
    torch.testing.assert_close(half[0], 0.5 * run("grpo", kwargs)[0])


Z = torch.zeros(2, 3)
ALL = Denominators.of(torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "trpo"}, "'recipe' got 'trpo', expected one of 'ppo', 'ppo_dual_clip', 'clip_higher'"),
        ({"mask": None}, "'mask' got NoneType"),
        ({"mask": Z}, "'mask' got torch.float32"),
        ({"logprobs": torch.zeros(6)}, r"'mask' got shape|'logprobs' got shape"),
        ({"old_logprobs": torch.zeros(3, 2)}, "'old_logprobs' got shape"),
        ({"advantages": torch.zeros(3)}, "'advantages' got shape"),
        ({"clip": -1.0}, "'clip' got -1.0"),
        ({"dual_clip": 0.5}, "'dual_clip' got 0.5"),
        ({"kl_coef": 0.1}, "'ref_logprobs' got None"),
        ({"kl_coef": float("nan")}, "'kl_coef' got nan"),
        ({"kl_kind": "k7"}, "'kl_kind' got 'k7'"),
        ({"reduction": "sum"}, "'reduction' got 'sum', expected one of .*'constant'"),
        ({"normalizer": -1.0}, "'normalizer' got -1.0"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "'logprobs' got shape"),
        ({"recipe": "sapo", "clip": 0.2}, "'clip' got 0.2, expected None: sapo does not read it"),
        ({"recipe": "cispo", "dual_clip": 3.0}, "'dual_clip' got 3.0, expected None: cispo"),
        ({"ratio_cap": 0.0}, "'ratio_cap' got 0.0"),
        ({"recipe": "gpg", "ratio_cap": 2.0}, "'ratio_cap' got 2.0, expected None: gpg"),
        ({"options": {"tau": 1.0}}, "'options' got 'tau', expected none: ppo has no options"),
        ({"recipe": "sapo", "options": {"tau": 1.0}}, "'options' got 'tau', expected only 'tau_positive', 'tau_neg"),
        ({"recipe": "sapo", "options": {"tau_positive": 0.0}}, r"'options\['tau_positive'\]' got 0.0"),
        ({"recipe": "kl_cov"}, "'selected' got None, expected a tensor with recipe 'kl_cov'"),
        ({"recipe": "kl_cov", "selected": Z}, "'selected' got torch.float32"),
        ({"selected": Z.bool()}, "'selected' got a tensor, expected None: ppo does not read it"),
        ({"fused": True, "kl_clamp": 10.0}, "'fused' got True, expected None or False: no kernel covers ppo"),
        ({"recipe": "decoupled_ppo"}, "'rollout_logprobs' got None, expected a tensor with correction='token'"),
        ({"rollout_logprobs": Z}, "'correction' got None, expected a kind"),
        ({"rollout_logprobs": Z, "correction": "tis"}, "'correction' got 'tis', expected one of 'token'"),
        ({"correction_bounds": 2.0}, "'correction_bounds' got 2.0, expected None without correction"),
        (
            {"rollout_logprobs": Z, "correction": "token-mis", "correction_bounds": (3.0, 2.0)},
            r"'correction_bounds' got \(3.0, 2.0\), expected low <= high",
        ),
        ({"rollout_logprobs": torch.zeros(3), "correction": "token"}, "'rollout_logprobs' got shape"),
        ({"entropy_coef": 0.1}, "'entropy' got None, expected a tensor with entropy_coef=0.1"),
        ({"entropy": torch.zeros(2)}, "'entropy' got shape"),
        ({"kl_placement": "reward"}, "'kl_placement' got 'reward', expected one of 'loss', 'corrected'"),
        ({"denominators": 3}, "'denominators' got int, expected rlhf_fast.Denominators"),
        ({"denominators": ALL, "normalizer": 2.0}, "'normalizer' got 2.0, expected None with denominators"),
        ({"recipe": "bnpo", "denominators": ALL}, "'denominators' got a Denominators, expected None: bnpo divides"),
    ],
)
def test_wrong_arguments_of_policy_loss_are_named(change, message):
    kwargs = {
        "recipe": "ppo", "logprobs": Z, "old_logprobs": Z, "advantages": Z, "mask": torch.ones(2, 3, dtype=torch.bool),
        **change,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match="policy_loss: argument " + message):
        policy_loss(**kwargs)
