from __future__ import annotations

import math
import re

import pytest
import tolerances
import torch
from parity import assert_parity, double

from rlhf_fast.denominators import Denominators
from rlhf_fast.losses import RECIPES, policy_loss, preference_loss
from rlhf_fast.ops import kl_estimate, linear_token_logprobs, token_logprobs
from rlhf_fast.preference import KINDS
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


@pytest.mark.parametrize("recipe", FUSED)
def test_the_kernel_and_the_formula_of_a_recipe_agree(recipe):
    rules = RECIPES[recipe]
    for dtype in (torch.float64, torch.float32):
        kwargs = batch(dtype=dtype)
        extra = {"entropy": torch.rand(6, 41).to(dtype), "entropy_coef": 0.01, "kl_coef": 0.1, "kl_kind": "k3"}
        if rules.correction is not None:
            extra["rollout_logprobs"] = kwargs["old_logprobs"] - 0.1 * torch.randn(6, 41).to(dtype)
        fused, plain = run(recipe, kwargs, **extra, fused=True), run(recipe, kwargs, **extra, fused=False)
        default = run(recipe, kwargs, **extra)
        assert torch.equal(default[0], fused[0]) and torch.equal(default[1], fused[1])
        truth = run(recipe, double(kwargs), **double(extra), fused=False)
        assert_parity(1 + fused[0], 1 + truth[0], 1 + plain[0])  # at the size of a term: the terms cancel
        assert_parity(fused[1], truth[1], plain[1])
        for name in plain[2]:
            assert_parity(1 + fused[2][name], 1 + truth[2][name], 1 + plain[2][name], name)


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


# logpi_w = -10, logpi_l = -12, reference -11 for both, lengths 5 and 8, beta .1: D = 2.
W, L, REF = torch.tensor([-10.0]).double(), torch.tensor([-12.0]).double(), torch.tensor([-11.0]).double()
LENGTHS = {"chosen_lengths": torch.tensor([5]), "rejected_lengths": torch.tensor([8])}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pair_options(kind):
    """What a kind needs besides the log-probs."""
    return {
        **({"label_smoothing": 0.1} if "label_smoothing" in KINDS[kind].options else {}),
        **(LENGTHS if KINDS[kind].per_token else {}),
    }


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("dpo", {}, 0.5981389),
        ("dpo", {"label_smoothing": 0.1}, 0.6181389),
        ("cdpo", {"label_smoothing": 0.1}, 0.6181389),
        ("robust", {"label_smoothing": 0.1}, (0.9 * 0.5981389 - 0.1 * 0.7981389) / 0.8),
        ("ipo", {}, 9.0),
        ("ipo", LENGTHS, (1 / 5 + 1 / 8 - 5) ** 2),
        ("hinge", {}, 0.8),
        ("nca", {}, -math.log(sigmoid(0.1)) - math.log(sigmoid(-0.1)) / 2 - math.log(sigmoid(0.1)) / 2),
        ("bco", {}, -2 * math.log(sigmoid(0.1))),
        ("bco", {"delta": 0.3}, -math.log(sigmoid(-0.2)) - math.log(sigmoid(0.4))),
        ("apo_zero", {}, 1 - sigmoid(0.1) + sigmoid(-0.1)),
        ("apo_down", {}, sigmoid(0.1) + 1 - sigmoid(0.2)),
        ("sppo", {}, (1 - 5) ** 2 + (-1 + 5) ** 2),
        ("aot", {}, 0.5981389),
        ("dpop", {}, 0.5981389),
        ("simpo", LENGTHS, -math.log(sigmoid(0.1 * (-2 + 1.5)))),
        ("simpo", {**LENGTHS, "gamma": 0.5}, -math.log(sigmoid(0.1 * (-2 + 1.5) - 0.5))),
        ("cpo", {}, 0.5981389 + 10),
    ],
)  # fmt: skip
def test_worked_values_of_preference_losses(kind, options, expected):
    refs = (REF, REF) if KINDS[kind].reference else ()
    assert preference_loss(W, L, *refs, kind=kind, **options).loss.item() == pytest.approx(expected, abs=1e-7)


def test_worked_values_of_exo_orpo_and_discopop():
    q, e = sigmoid(0.2), 0.1
    exo = q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)
    assert preference_loss(W, L, REF, REF, kind="exo", label_smoothing=e).loss.item() == pytest.approx(exo)
    a, b = -2.0, -1.5
    odds = (a - b) - (math.log(1 - math.exp(a)) - math.log(1 - math.exp(b)))
    assert preference_loss(W, L, kind="orpo", **LENGTHS).loss.item() == pytest.approx(2 - 0.1 * math.log(sigmoid(odds)))
    gate = sigmoid(0.2 / 0.05)
    expected = -(1 - gate) * math.log(sigmoid(0.2)) + gate * math.exp(-0.2)
    assert preference_loss(W, L, REF, REF, kind="discopop").loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dpo", math.log(2)),
        ("cdpo", math.log(2)),
        ("robust", math.log(2)),
        ("ipo", 25.0),
        ("hinge", 1.0),
        ("aot", math.log(2)),
    ],
)
def test_item_39_at_the_reference_the_losses_have_their_known_start(kind, expected):
    x = -10 * torch.rand(7)
    assert preference_loss(x, x - 1, x, x - 1, kind=kind).loss.item() == pytest.approx(expected, rel=1e-6)


def test_ipo_differs_between_sums_and_means_per_token():
    # OpenRLHF uses sums, TRL means: here the lengths say which.
    sums = preference_loss(W, L, REF, REF, kind="ipo").loss
    means = preference_loss(W, L, REF, REF, kind="ipo", **LENGTHS).loss
    assert sums.item() == 9.0 and means.item() == pytest.approx(21.855625)


def test_cdpo_without_smoothing_is_dpo_and_dpop_charges_a_falling_chosen_answer():
    w, l, rw, rl = (-5 * torch.rand(9).double() for _ in range(4))
    assert torch.equal(preference_loss(w, l, rw, rl, kind="cdpo").loss, preference_loss(w, l, rw, rl).loss)
    fallen = preference_loss(rw - 1, l, rw, rl, kind="dpop", penalty=2.0).loss
    logits = 0.1 * ((-1 - (l - rl)) - 2.0)
    torch.testing.assert_close(fallen, -torch.nn.functional.logsigmoid(logits).mean())


def test_aot_compares_the_sorted_rewards_and_leaves_masked_pairs_out():
    w, l, zero = torch.tensor([3.0, 1.0, 9.0]), torch.tensor([0.0, 2.0, 9.0]), torch.zeros(3)
    mask = torch.tensor([True, True, False])
    got = preference_loss(w, l, zero, zero, kind="aot", beta=1.0, mask=mask).loss
    expected = -torch.nn.functional.logsigmoid(torch.tensor([1.0 - 0.0, 3.0 - 2.0])).mean()
    torch.testing.assert_close(got, expected)


def test_rewards_are_beta_times_the_log_ratio_and_detached():
    w = W.clone().requires_grad_()
    out = preference_loss(w, L, REF, REF, beta=0.5)
    assert out.chosen_rewards.item() == 0.5 and out.rejected_rewards.item() == -0.5
    assert not out.chosen_rewards.requires_grad and out.loss.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_every_preference_loss(kind):
    g = torch.Generator().manual_seed(1)
    draw = lambda: -3 - torch.rand(5, generator=g, dtype=torch.float64)
    w, l = draw().requires_grad_(), draw().requires_grad_()
    refs = (draw(), draw()) if KINDS[kind].reference else ()
    options = {k: v.expand(5) if isinstance(v, torch.Tensor) else v for k, v in pair_options(kind).items()}
    call = lambda a, b: preference_loss(a, b, *refs, kind=kind, mask=torch.arange(5) != 2, **options).loss
    assert torch.autograd.gradcheck(call, (w, l), **tolerances.GRADCHECK)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_pairs_are_never_read_and_the_order_does_not_matter(kind):
    tensors = [-5 - torch.rand(6) for _ in range(4 if KINDS[kind].reference else 2)]
    mask = torch.tensor([True, False, True, True, False, True])
    options = {k: v.expand(6) if isinstance(v, torch.Tensor) else v for k, v in pair_options(kind).items()}
    clean = preference_loss(*tensors, kind=kind, mask=mask, **options)
    dirty = [x.where(mask, float("nan")).requires_grad_() for x in tensors]
    got = preference_loss(*dirty, kind=kind, mask=mask, **options)
    assert torch.equal(got.loss.detach(), clean.loss) and not got.chosen_rewards[~mask].any()
    got.loss.backward()
    assert dirty[0].grad.isfinite().all() and not dirty[0].grad[~mask].any()
    assert all(x.grad is None for x in dirty[2:])
    order = torch.randperm(6)
    moved = preference_loss(*(x[order] for x in tensors), kind=kind, mask=mask[order], **options)
    torch.testing.assert_close(moved.loss, clean.loss)
    nothing = preference_loss(*tensors, kind=kind, mask=torch.zeros(6, dtype=torch.bool), **options)
    assert nothing.loss == 0


@pytest.mark.parametrize("kind", KINDS)
def test_preference_losses_stay_finite_for_sure_pairs(kind):
    refs = [torch.full((2,), -500.0)] * 2 if KINDS[kind].reference else []
    options = {k: v.expand(2) if isinstance(v, torch.Tensor) else v for k, v in pair_options(kind).items()}
    w = torch.tensor([-1e-8, -1000.0], requires_grad=True)
    loss = preference_loss(w, torch.tensor([-1000.0, -1e-8]), *refs, kind=kind, beta=0.5, **options).loss
    loss.backward()
    assert loss.isfinite() and w.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dpoo"}, "'kind' got 'dpoo', expected one of 'dpo', 'cdpo', 'robust'"),
        ({"beta": 0.0}, "'beta' got 0.0"),
        ({"beta": -0.1}, "'beta' got -0.1"),
        ({"beta": float("nan")}, "'beta' got nan"),
        ({"label_smoothing": 0.5}, "'label_smoothing' got 0.5"),
        (
            {"kind": "ipo", "label_smoothing": 0.1},
            r"'label_smoothing' got 0.1, expected 0.0 with kind 'ipo' \(only dpo, cdpo",
        ),
        ({"kind": "exo"}, "'label_smoothing' got 0.0, expected a number in"),
        ({"gamma": 1.0}, "'gamma' got 1.0"),
        ({"ref_chosen_logprobs": None}, "'ref_chosen_logprobs' got NoneType"),
        ({"kind": "cpo"}, "'ref_chosen_logprobs' got a tensor, expected None: cpo takes no reference"),
        ({"kind": "simpo", "ref_chosen_logprobs": None, "ref_rejected_logprobs": None}, "'chosen_lengths' got None"),
        ({"chosen_lengths": torch.tensor([5])}, "'rejected_lengths' got None, .* the other lengths are given"),
        ({"rejected_logprobs": torch.zeros(2)}, r"'rejected_logprobs' got shape \(2,\), expected \(1,\)"),
        ({"chosen_logprobs": torch.zeros(1, 1)}, r"'chosen_logprobs' got shape \(1, 1\)"),
        ({"mask": torch.ones(1)}, "'mask' got torch.float32"),
    ],
)
def test_wrong_arguments_of_preference_loss_are_named(change, message):
    kwargs = {
        "chosen_logprobs": W, "rejected_logprobs": L, "ref_chosen_logprobs": REF, "ref_rejected_logprobs": REF, **change,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match="preference_loss: argument " + message):
        preference_loss(**kwargs)
