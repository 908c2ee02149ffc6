from __future__ import annotations

import math

import pytest
import tolerances
import torch
from parity import double
from ppo_parity import FULL, GRADIENTS, check_parity, core, run

from rlhf_fast.dialects import DIALECTS
from rlhf_fast.ops import kl_estimate, ppo_loss
from rlhf_fast.reference import ppo_loss as reference
from rlhf_fast.reference._reduce import REDUCTIONS


# Empty; one token; a block and its neighbours; many short rows; long enough to start a second thread.
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 7), (2, 257), (300, 5), (17, 1100)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parity_with_every_term(shape, reduction, dtype):
    kwargs = reference.sample(shape, dtype=dtype)
    if shape == (5, 7):
        kwargs["mask"][2] = False
    options = {**FULL, "reduction": reduction, "dual_clip": 1.5}
    got, truth, plain = (
        run(kwargs, **options),
        run(double(kwargs), "reference", **options),
        run(kwargs, "reference", **options),
    )
    assert got["loss"].dtype == dtype and got["d logprobs"].dtype == dtype
    check_parity(got, truth, plain)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs", "k1+", "k3+"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_parity_over_kl_kinds_and_dialects(kind, dialect):
    kwargs = reference.sample((6, 41))
    kwargs["logprobs"][0, :8] -= 30  # beyond the clamps
    options = {**FULL, "kl_kind": kind, "dialect": dialect}
    got, truth, plain = (
        run(kwargs, **options),
        run(double(kwargs), "reference", **options),
        run(kwargs, "reference", **options),
    )
    check_parity(got, truth, plain)


@pytest.mark.parametrize("missing", ["entropy", "ref_logprobs", "values", "old_values", "importance_weights"])
def test_parity_without_a_term(missing):
    kwargs = reference.sample((4, 37))
    del kwargs[missing]
    if missing == "values":
        del kwargs["returns"], kwargs["old_values"]
    options = {
        "entropy_coef": 0.01 if "entropy" in kwargs else 0.0,
        "kl_coef": 0.1 if "ref_logprobs" in kwargs else 0.0,
    }
    got, truth, plain = (
        run(kwargs, **options),
        run(double(kwargs), "reference", **options),
        run(kwargs, "reference", **options),
    )
    check_parity(got, truth, plain)


def test_bf16_inputs_are_computed_in_fp32():
    kwargs = reference.sample((4, 37), dtype=torch.bfloat16)
    got, as_fp32 = (
        run(kwargs, **FULL),
        run({k: v.float() if v.is_floating_point() else v for k, v in kwargs.items()}, **FULL),
    )
    assert got["loss"].dtype is torch.float32 and got["d logprobs"].dtype is torch.bfloat16
    assert torch.equal(got["loss"], as_fp32["loss"])
    assert torch.equal(got["d logprobs"], as_fp32["d logprobs"].bfloat16())


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "flows"),
    [
        (1.5, 1.0, {}, -1.2, False),
        (1.5, 1.0, {"clip": (0.2, 0.28)}, -1.28, False),
        (0.5, 1.0, {}, -0.5, True),
        (1.5, -1.0, {}, 1.5, True),
        (0.5, -1.0, {}, 0.8, False),
        (5.0, -1.0, {}, 5.0, True),
        (5.0, -1.0, {"dual_clip": 3.0}, 3.0, False),
    ],
)
def test_item_27_worked_values_of_the_ratio_clip_and_where_its_gradient_is_zero(ratio, advantage, options, loss, flows):
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    out = ppo_loss(
        logprobs, torch.zeros(1, 1).double(), torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool), **options
    )
    assert out.loss.item() == pytest.approx(loss, abs=1e-12)
    out.loss.backward()
    assert logprobs.grad.item() == pytest.approx(-advantage * ratio if flows else 0.0, abs=1e-12)
    assert out.stats["clip_fraction"].item() == float(not flows and "dual_clip" not in options)
    assert out.stats["dual_clip_fraction"].item() == float("dual_clip" in options)


@pytest.mark.parametrize(
    ("reduction", "normalizer", "expected"),
    [
        ("token-mean", None, 3.6667),
        ("seq-mean-token-mean", None, 4.1667),
        ("seq-mean-token-sum", None, 7.3333),
        ("token-sum", None, 22.0),
        ("token-sum", 9.0, 2.4444),  # TRL's dr_grpo: rows x longest
        ("token-sum", 3.0, 7.3333),  # verl's sum over the longest
    ],
)
def test_worked_values_of_the_reductions(reduction, normalizer, expected):
    token_loss = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [7.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    zeros = torch.zeros(3, 3)
    out = ppo_loss(zeros, zeros, -token_loss, mask, reduction=reduction, normalizer=normalizer)
    assert out.loss.item() == pytest.approx(expected, abs=tolerances.WORKED4)
    packed = ppo_loss(
        zeros[mask], zeros[mask], -token_loss[mask], mask[mask], reduction=reduction, normalizer=normalizer,
        cu_seqlens=torch.tensor([0, 2, 5, 6]),
    )  # fmt: skip
    assert torch.equal(packed.loss, out.loss)


def test_sequence_mean_weighs_a_short_answer_like_a_long_one_and_token_mean_does_not():
    mask = torch.zeros(2, 1000, dtype=torch.bool)
    mask[0, :10] = True
    mask[1] = True
    zeros = torch.zeros(2, 1000)
    only_short = torch.zeros(2, 1000)
    only_short[0] = -1
    share = lambda reduction: ppo_loss(zeros, zeros, only_short, mask, reduction=reduction).loss.item()
    assert share("seq-mean-token-mean") == pytest.approx(0.5) and share("token-mean") == pytest.approx(10 / 1010)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_item_26_micro_batches_that_share_a_normalizer_add_up_to_the_one_shot_gradient(reduction):
    kwargs = reference.sample((8, 29))
    kwargs["mask"][3] = False
    sequences, tokens = kwargs["mask"].any(1).sum(), kwargs["mask"].sum()
    normalizer = sequences if reduction.startswith("seq") else tokens
    whole = run(kwargs, reduction=reduction, normalizer=normalizer.item(), **FULL)
    if reduction != "token-sum":
        default = run(kwargs, reduction=reduction, **FULL)
        assert all(torch.equal(whole[k], default[k]) for k in (*GRADIENTS, "loss"))
    for cuts in ([3, 5], [1, 6, 1]):
        parts = [
            run(
                {k: v[i : i + n] for k, v in kwargs.items()}, reduction=reduction, normalizer=normalizer.float(), **FULL
            )
            for i, n in zip([sum(cuts[:j]) for j in range(len(cuts))], cuts, strict=True)
        ]
        for name in GRADIENTS:
            assert torch.equal(torch.cat([p[name] for p in parts]), whole[name])
        total = sum(p["loss"].double() for p in parts)
        assert total.item() == pytest.approx(whole["loss"].item(), abs=1e-6)


def test_policy_equal_to_old_gives_minus_the_mean_advantage_and_the_reinforce_gradient():
    kwargs = core(reference.sample((5, 60)))
    kwargs["logprobs"] = kwargs["old_logprobs"].clone()
    got = run(double(kwargs))
    real = kwargs["mask"]
    assert got["loss"].item() == pytest.approx(-kwargs["advantages"].double()[real].mean().item(), abs=1e-12)
    torch.testing.assert_close(got["d logprobs"], 1.7 * -kwargs["advantages"].double().where(real, 0.0) / real.sum())
    assert got["ratio_mean"] == got["ratio_min"] == got["ratio_max"] == 1 and got["ratio_var"] == 0
    assert got["approx_kl"] == got["approx_kl_k3"] == got["clip_fraction"] == got["ratio_clamped"] == 0


def test_policy_equal_to_reference_and_kl_coef_zero_both_recover_the_loss_without_kl():
    kwargs = reference.sample((5, 60))
    bare = {k: v for k, v in kwargs.items() if k != "ref_logprobs"}
    same = {**kwargs, "ref_logprobs": kwargs["logprobs"].clone()}
    expected = run(bare, entropy_coef=0.01)
    for got in (run(kwargs, entropy_coef=0.01, kl_coef=0.0), run(same, entropy_coef=0.01, kl_coef=0.5)):
        assert all(torch.equal(got[k], expected[k]) for k in ("loss", *GRADIENTS))
    assert run(same, **FULL)["kl"] == 0 and run(kwargs)["kl"] > 0


def test_the_loss_is_the_sum_of_its_terms():
    kwargs = double(reference.sample((5, 60)))
    got = run(kwargs, value_coef=0.3, **FULL)
    expected = got["policy_loss"] + 0.3 * got["value_loss"] - 0.01 * got["entropy"] + 0.1 * got["kl"]
    torch.testing.assert_close(got["loss"], expected)
    mean_kl = (
        kl_estimate(kwargs["logprobs"], kwargs["ref_logprobs"], "k3", mask=kwargs["mask"]).sum() / kwargs["mask"].sum()
    )
    torch.testing.assert_close(got["kl"], mean_kl)


def test_item_27_value_clipping_and_its_fraction():
    kwargs = core(reference.sample((1, 4)))
    kwargs["mask"][:] = True
    old, returns = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, -1.0, 1.0]])
    values = torch.tensor([[0.5, 0.1, 0.5, -0.5]], requires_grad=True)
    out = ppo_loss(**kwargs, values=values, old_values=old, returns=returns, value_coef=1.0)
    # clipped to .2 where that is worse: (.2 - 1)^2 = .64 > .25; inside; unclipped worse: 2.25 > 1.44; 2.25 > 1.44
    assert out.stats["value_loss"].item() == pytest.approx((0.64 + 0.81 + 2.25 + 2.25) / 8)
    assert out.stats["value_clip_fraction"].item() == 0.25
    out.loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.9, 1.5, -1.5]]) / 4)
    free = ppo_loss(**kwargs, values=values, old_values=old, returns=returns, value_clip=None)
    assert free.stats["value_loss"].item() == pytest.approx((0.25 + 0.81 + 2.25 + 2.25) / 8)
    assert torch.equal(free.loss, ppo_loss(**kwargs, values=values, returns=returns).loss)


def test_item_34_explained_variance_is_zero_for_a_constant_critic_one_for_a_perfect_one_and_never_nan():
    kwargs = core(reference.sample((1, 3)))
    kwargs["mask"][:] = True
    explained = lambda v, r: (
        ppo_loss(**kwargs, values=torch.tensor([v]), returns=torch.tensor([r])).stats["explained_variance"].item()
    )
    assert explained([1.1, 1.9, 3.2], [1.0, 2.0, 3.0]) == pytest.approx(0.9766667, abs=tolerances.WORKED)
    assert explained([7.5, 7.5, 7.5], [1.0, 2.0, 3.0]) == pytest.approx(0.0, abs=1e-12)
    assert explained([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert explained([1.0, 2.0, 3.0], [0.1, 0.1, 0.1]) == 0.0
    assert explained([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]) == pytest.approx(-3.0)


def test_item_33_statistics_are_masked_and_match_their_definitions():
    kwargs = double(reference.sample((6, 50)))
    got, real = run(kwargs, **FULL), kwargs["mask"]
    d = (kwargs["logprobs"] - kwargs["old_logprobs"])[real]
    ratio = d.exp()
    A = kwargs["advantages"][real]
    for name, expected in {
        "approx_kl": d.square().mean() / 2,
        "approx_kl_k3": (ratio - 1 - d).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_var": ratio.var(unbiased=False),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "entropy": kwargs["entropy"][real].mean(),
        "clip_fraction": (((A > 0) & (ratio > 1.2)) | ((A < 0) & (ratio < 0.8))).double().mean(),
        "tokens": real.sum().double(),
    }.items():
        torch.testing.assert_close(got[name], expected)


def test_log_ratios_beyond_20_are_clamped_counted_and_get_no_gradient():
    logprobs = torch.tensor([[0.0, -1.0, 90.0, -90.0]], requires_grad=True)
    out = ppo_loss(logprobs, torch.zeros(1, 4), -torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool))
    assert out.loss.isfinite() and out.stats["ratio_clamped"] == 2
    assert out.stats["ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-6)
    out.loss.backward()
    assert logprobs.grad[0, 2:].tolist() == [0.0, 0.0] and logprobs.grad[0, 0] != 0


def test_dialects_set_the_clamp_and_the_dual_clip():
    args = (torch.full((1, 1), 25.0), torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert ppo_loss(*args, dialect="trl").loss.item() == pytest.approx(math.exp(25), rel=1e-6)
    assert ppo_loss(*args, dialect="openrlhf").loss.item() == pytest.approx(math.exp(20), rel=1e-6)
    assert ppo_loss(*args, dialect="verl").loss.item() == 3.0
    assert ppo_loss(*args, dialect="verl", dual_clip=5.0).loss.item() == 5.0


def test_importance_weights_scale_the_policy_term_alone():
    kwargs = reference.sample((4, 20))
    got = run({**kwargs, "importance_weights": torch.full((4, 20), 0.5)}, **FULL)
    plain = run({k: v for k, v in kwargs.items() if k != "importance_weights"}, **FULL)
    torch.testing.assert_close(got["policy_loss"], 0.5 * plain["policy_loss"])
    assert torch.equal(got["d values"], plain["d values"]) and torch.equal(got["kl"], plain["kl"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_tokens_are_never_read(reduction):
    kwargs = reference.sample((6, 70))
    kwargs["mask"][4] = False
    clean = run(kwargs, reduction=reduction, **FULL)
    for poison in (float("nan"), float("inf"), -1e30):
        dirty = {k: v.clone() for k, v in kwargs.items()}
        for k, v in dirty.items():
            if k != "mask":
                v[~kwargs["mask"]] = poison
        got = run(dirty, reduction=reduction, **FULL)
        assert all(torch.equal(clean[k], got[k]) for k in clean)
    assert not clean["d logprobs"][~kwargs["mask"]].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_everything_masked_gives_zero_loss_zero_gradient_and_zero_tokens(reduction, backend):
    kwargs = reference.sample((3, 9))
    kwargs["mask"][:] = False
    got = run(kwargs, backend, reduction=reduction, **FULL)
    assert all(not v.any() for k, v in got.items() if k != "unexplained")
    assert run(kwargs, backend, reduction=reduction, normalizer=torch.tensor(0.0))["loss"] == 0


def test_a_nan_on_a_real_token_reaches_the_loss_but_only_its_own_gradient():
    kwargs = reference.sample((3, 40))
    kwargs["mask"][:] = True
    clean = run(kwargs, **FULL)
    kwargs["advantages"][1, 5] = float("nan")
    got = run(kwargs, **FULL)
    assert got["loss"].isnan() and got["policy_loss"].isnan() and not got["value_loss"].isnan()
    others = torch.ones(3, 40, dtype=torch.bool)
    others[1, 5] = False
    assert got["d logprobs"][1, 5].isnan() and torch.equal(got["d logprobs"][others], clean["d logprobs"][others])


def test_packed_equals_padded_and_empty_sequences_do_not_count():
    kwargs = reference.sample((5, 300))
    lengths = torch.tensor([300, 0, 17, 1, 300])
    inside = torch.arange(300)[None] < lengths[:, None]
    kwargs["mask"] &= inside
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    packed = {k: v[inside] for k, v in kwargs.items()}
    for reduction in REDUCTIONS:
        a, b = run(kwargs, reduction=reduction, **FULL), run(packed, reduction=reduction, cu_seqlens=cu_seqlens, **FULL)
        expected = {k: (v[inside] if k in GRADIENTS else v).double() for k, v in a.items()}
        check_parity(b, expected, expected)
        oracle = run(double(packed), "reference", reduction=reduction, cu_seqlens=cu_seqlens, **FULL)
        check_parity(b, oracle, oracle)


def test_one_advantage_per_sequence_is_repeated_over_its_tokens():
    kwargs = core(reference.sample((4, 10)))
    per_row = torch.randn(4)
    expected = run({**kwargs, "advantages": per_row[:, None].expand(4, 10)})
    assert torch.equal(run({**kwargs, "advantages": per_row})["d logprobs"], expected["d logprobs"])
    flat = {k: v.reshape(-1) for k, v in kwargs.items()}
    packed = run({**flat, "advantages": per_row}, cu_seqlens=torch.arange(5) * 10)
    assert torch.equal(packed["d logprobs"].view(4, 10), expected["d logprobs"])


def test_permuting_the_batch_permutes_the_gradient():
    kwargs = reference.sample((9, 33))
    order = torch.randperm(9)
    a, b = run(kwargs, **FULL), run({k: v[order] for k, v in kwargs.items()}, **FULL)
    assert all(torch.equal(a[k][order], b[k]) for k in GRADIENTS)
    torch.testing.assert_close(a["loss"], b["loss"], atol=1e-6, rtol=1e-5)
