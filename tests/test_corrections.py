from __future__ import annotations

import math

import pytest
import tolerances
import torch
from loss_batches import B, T, batch, packed

from rlhf_fast import off_policy_mask, policy_loss, rollout_correction
from rlhf_fast.corrections import KINDS, STATS

NAN = float("nan")


def worked(weights, kind, **options):
    """The weights of one answer whose tokens have these ratios old / rollout."""
    d = torch.tensor([weights], dtype=torch.float64).log()
    mask = torch.ones_like(d, dtype=torch.bool)
    return rollout_correction(d - 1, torch.full_like(d, -1), mask, kind=kind, **options)


W = [0.5, 1.0, 2.0, 4.0]
"""Product 4, geometric mean sqrt(2), mean of w - 1 - log w: (7.5 - 4 - log 4) / 4 = 0.5284."""


@pytest.mark.parametrize(
    ("kind", "bounds", "expected"),
    [
        ("token", None, W),
        ("token-tis", None, [0.5, 1.0, 2.0, 2.0]),
        ("token-tis", 3.0, [0.5, 1.0, 2.0, 3.0]),
        ("token-tis", (0.8, 3.0), [0.8, 1.0, 2.0, 3.0]),
        ("token-mis", (0.4, 5.0), W),
        ("token-mis", (0.6, 3.0), [0.0, 1.0, 2.0, 0.0]),
        ("sequence-tis", None, [2.0] * 4),
        ("sequence-tis", 10.0, [4.0] * 4),
        ("sequence-mis", None, [0.0] * 4),
        ("sequence-mis", 4.5, [4.0] * 4),
        ("geometric", None, [0.0] * 4),
        ("geometric", (0.7, 1.42), [1.0] * 4),
        ("geometric", (1.42, 2.0), [0.0] * 4),
        ("mean-k3", None, [0.0] * 4),
        ("mean-k3", 0.53, [1.0] * 4),
        ("mean-k3", 0.52, [0.0] * 4),
    ],
)
def test_worked_values(kind, bounds, expected):
    got = worked(W, kind, bounds=bounds)
    assert got.weights[0].tolist() == pytest.approx(expected, abs=1e-12)
    kept = [KINDS[kind].outside == "clamp" or w > 0 for w in expected]
    assert got.keep[0].tolist() == kept


def test_the_default_bounds_are_those_of_the_field():
    assert worked([0.49, 0.51, 4.9, 5.1], "token-mis").keep[0].tolist() == [
        False,
        True,
        True,
        False,
    ]  # IcePop's [0.5, 5]
    assert worked([1.0009, 1.0009], "geometric").keep.all() and not worked([1.0011, 1.0011], "geometric").keep.any()
    assert (
        worked([1.14], "mean-k3").keep.all() and not worked([1.15], "mean-k3").keep.any()
    )  # x - 1 - log x = 0.0090, 0.0102


def test_every_kind_has_worked_values():
    rows = test_worked_values.pytestmark[0].args[1]
    assert {row[0] for row in rows} == set(KINDS)


def test_statistics():
    stats = worked(W, "token").stats.floats()
    assert stats["effective_samples"] == pytest.approx(0.6617647, abs=tolerances.WORKED)
    assert stats["weight_mean"] == pytest.approx(1.875)
    assert (stats["weight_min"], stats["weight_max"]) == pytest.approx((0.5, 4.0))
    assert stats["approx_kl_k3"] == pytest.approx((7.5 - 4 - math.log(4)) / 4) and stats["tokens"] == 4
    assert stats["bounded_fraction"] == 0 and worked(W, "token-tis").stats["bounded_fraction"] == 0.25
    assert tuple(stats) == STATS


def test_the_product_of_a_long_answer_runs_away_and_the_geometric_mean_does_not():
    for n, product in ((10, 2.5937), (100, 13780.6)):
        got = worked([1.1] * n, "sequence-tis", bounds=1e6).weights
        assert got[0, 0].item() == pytest.approx(product, rel=1e-4)
        assert worked([1.1] * n, "geometric", bounds=(1.09, 1.11)).keep.all()
    assert worked([1e30, 1.0], "token").weights.isfinite().all()  # log-weights end at 20


@pytest.mark.parametrize("kind", KINDS)
def test_normalized_weights_have_mean_one(kind):
    got = worked(W, kind, bounds=(0.1, 100.0), normalize=True)
    assert got.weights.mean().item() == pytest.approx(1.0)
    nothing = worked(W, "geometric", normalize=True)  # every token rejected
    assert not nothing.weights.any() and nothing.weights.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_are_never_read_and_packed_equals_padded(kind, dtype):
    tensors = batch("decoupled_ppo", dtype)
    old, rollout, mask = (tensors[k] for k in ("old_logprobs", "rollout_logprobs", "mask"))
    options = {"kind": kind, "bounds": (0.9, 1.1) if kind != "mean-k3" else (None, 0.02)}
    got = rollout_correction(old, rollout, mask, **options)
    assert got.weights.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert not got.weights[~mask].any() and not got.keep[~mask].any() and not got.weights.requires_grad
    assert 0 < got.stats["bounded_fraction"] < 1 or kind == "token"
    dirty = [x.where(mask, NAN) for x in (old, rollout)]
    again = rollout_correction(*dirty, mask, **options)
    assert torch.equal(again.weights, got.weights) and torch.equal(again.stats.tensor, got.stats.tensor)
    flat, cu_seqlens = packed(tensors, list(range(B)))
    once = rollout_correction(
        flat["old_logprobs"], flat["rollout_logprobs"], flat["mask"], **options, cu_seqlens=cu_seqlens
    )
    expected, _ = packed({"weights": got.weights, "keep": got.keep}, list(range(B)))
    torch.testing.assert_close(once.weights, expected["weights"])
    assert torch.equal(once.keep, expected["keep"])
    alone = rollout_correction(old[4:5], rollout[4:5], mask[4:5], **options)
    assert torch.equal(alone.weights[0], got.weights[4])


def test_nothing_gives_nothing():
    empty = torch.zeros(0, T)
    for tensor, mask in ((empty, empty.bool()), (torch.zeros(2, 3), torch.zeros(2, 3).bool())):
        got = rollout_correction(tensor, tensor, mask, normalize=True)
        assert not got.weights.any() and not got.keep.any() and not got.stats.tensor.any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_applies_the_weights_of_the_kind(kind):
    tensors = batch("decoupled_ppo")
    rollout = tensors.pop("rollout_logprobs")
    bounds = (0.9, 1.1)
    weights = rollout_correction(tensors["old_logprobs"], rollout, tensors["mask"], kind=kind, bounds=bounds).weights
    got = policy_loss("grpo", **tensors, rollout_logprobs=rollout, correction=kind, correction_bounds=bounds).loss
    assert torch.equal(got, policy_loss("grpo", **tensors, importance_weights=weights).loss)


def test_bypass_does_not_count_the_mismatch_twice():
    tensors = batch("decoupled_ppo")
    tensors["old_logprobs"] = tensors["rollout_logprobs"]
    got = policy_loss("ppo", **tensors, correction="token-tis").loss
    tensors.pop("rollout_logprobs")
    assert torch.equal(got, policy_loss("ppo", **tensors).loss)


def test_off_policy_mask_drops_bad_answers_that_the_policy_has_left():
    # Mean of rollout - new per row: 0.6, 0.6, 0.4; TRL's rule keeps where A >= 0 or the mean is at most the threshold.
    new = torch.tensor([[-1.2, -2.0, NAN], [-1.2, -2.0, NAN], [-0.8, -2.0, NAN]])
    rollout = torch.tensor([[-1.0, -1.0, NAN]] * 3)
    mask, advantages = torch.tensor([[True, True, False]] * 3), torch.tensor([-1.0, 1.0, -1.0])
    got = off_policy_mask(new, rollout, advantages, mask, threshold=0.55)
    assert got.tolist() == [[False] * 3, [True, True, False], [True, True, False]]
    assert torch.equal(off_policy_mask(new, rollout, advantages, mask, threshold=0.7), mask)
    per_token = torch.tensor([[-1.0, 1.0, NAN]] * 3)
    assert off_policy_mask(new, rollout, per_token, mask, threshold=0.55).tolist()[0] == [False, True, False]
    cu_seqlens = torch.tensor([0, 2, 4, 6])
    flat = off_policy_mask(new[mask], rollout[mask], advantages, mask[mask], threshold=0.55, cu_seqlens=cu_seqlens)
    assert torch.equal(flat, got[mask])


Z, ONES = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rollout_correction(Z, Z, ONES, kind="tis"), "rollout_correction: argument 'kind' got 'tis', expected one of 'tok"),
        (lambda: rollout_correction(Z, Z, ONES, bounds=-1.0), "'bounds' got -1.0"),
        (lambda: rollout_correction(Z, Z, ONES, bounds=(1, 2, 3)), r"'bounds' got \(1, 2, 3\), expected a number or a pair"),
        (lambda: rollout_correction(Z, Z, ONES, bounds=(2.0, 1.0)), r"'bounds' got \(2.0, 1.0\), expected low <= high"),
        (lambda: rollout_correction(Z, Z[:1], ONES), "'rollout_logprobs' got shape"),
        (lambda: rollout_correction(Z[0], Z[0], ONES[0]), r"'old_logprobs' got shape \(3,\), expected \(B, T\)"),
        (lambda: rollout_correction(Z, Z, Z), "'mask' got torch.float32"),
        (lambda: rollout_correction(Z, Z, None), "'mask' got NoneType"),
        (lambda: off_policy_mask(Z, Z, torch.zeros(3), ONES, threshold=0.1), "off_policy_mask: argument 'advantages' got shape"),
        (lambda: off_policy_mask(Z, Z, Z, ONES, threshold=NAN), "'threshold' got nan"),
        (lambda: off_policy_mask(Z, None, Z, ONES, threshold=0.1), "'rollout_logprobs' got NoneType"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
