from __future__ import annotations

import math
from itertools import pairwise

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck

import rlhf_fast
from rlhf_fast import Denominators
from rlhf_fast.ops import reward_loss
from rlhf_fast.reference import reward_loss as reference

OPTIONS = ({}, {"center_coef": 0.01}, {"label_smoothing": 0.1, "center_coef": 0.3})
LEAVES = ("chosen_scores", "rejected_scores")


def run(kwargs, backend="cpp", **options):
    """(loss, stats, gradient of chosen, of rejected) for an upstream gradient of 1.7."""
    inputs = {k: v.clone().requires_grad_() if k in LEAVES else v for k, v in kwargs.items()}
    with rlhf_fast.use_backend(backend):
        out = reward_loss(**inputs, **options)
        grads = torch.autograd.grad(1.7 * out.loss, [inputs[k] for k in LEAVES])
    return out.loss.detach(), out.stats.tensor, *grads


# Empty; one pair; odd tails; two chunks, so that a second thread starts.
@pytest.mark.parametrize("n", [0, 1, 7, 33, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parity(n, dtype):
    kwargs = reference.sample(n, dtype=dtype)
    for options in OPTIONS:
        got, truth, plain = (
            run(kwargs, **options),
            run(double(kwargs), "reference", **options),
            run(kwargs, "reference", **options),
        )
        assert got[0].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        for g, t, p, name in zip(got, truth, plain, ("loss", "stats", *LEAVES), strict=True):
            assert_parity(g, t, p, name)


def test_worked_values():
    loss = lambda **k: reward_loss(torch.tensor([1.2]), torch.tensor([0.4]), **k).loss.item()
    assert loss() == pytest.approx(0.3711007, abs=tolerances.WORKED)
    assert loss(margin=0.5) == pytest.approx(0.5543552, abs=tolerances.WORKED)
    assert loss(center_coef=0.01) == pytest.approx(0.3967007, abs=tolerances.WORKED)
    assert loss(margin=torch.tensor([0.8])) == pytest.approx(math.log(2), abs=tolerances.WORKED)


def test_label_smoothing_mixes_the_two_labels():
    a, b = torch.randn(20), torch.randn(20)
    straight, flipped = reward_loss(a, b).loss, reward_loss(b, a).loss
    torch.testing.assert_close(reward_loss(a, b, label_smoothing=0.2).loss, 0.8 * straight + 0.2 * flipped)


def test_accuracy_counts_a_tie_as_a_half():
    stats = reward_loss(torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([0.0, 2.0, 3.0, 1.0])).stats.floats()
    assert stats["accuracy"] == 0.625 and stats["pairs"] == 4
    assert stats["margin"] == pytest.approx(0.5) and stats["chosen_score"] == 2.0 and stats["rejected_score"] == 1.5


def test_extreme_scores_stay_finite():
    a, b = torch.tensor([1e30, -1e30, 80.0, -80.0]), torch.tensor([-1e30, 1e30, -80.0, 80.0])
    leaf = a.requires_grad_()
    out = reward_loss(leaf, b)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(2e30 / 4, rel=1e-6)
    torch.testing.assert_close(leaf.grad, torch.tensor([0.0, -0.25, 0.0, -0.25]))


def test_masked_pairs_are_never_read():
    kwargs = reference.sample(50)
    clean = run(kwargs, center_coef=0.1)
    alone = {k: v[kwargs["mask"]] for k, v in kwargs.items()}
    torch.testing.assert_close(run(alone, center_coef=0.1)[:2], clean[:2])
    for poison in (float("nan"), float("inf")):
        dirty = {k: v.clone() for k, v in kwargs.items()}
        for k in (*LEAVES, "margin"):
            dirty[k][~dirty["mask"]] = poison
        assert all(torch.equal(a, b) for a, b in zip(clean, run(dirty, center_coef=0.1), strict=True))


def test_everything_masked_gives_zero_loss_and_zero_gradient():
    kwargs = {**reference.sample(6), "mask": torch.zeros(6, dtype=torch.bool)}
    loss, stats, *grads = run(kwargs, center_coef=0.1)
    assert loss == 0 and not stats.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("cuts", [(0, 9), (0, 1, 9), (0, 3, 3, 7, 9), tuple(range(10))], ids=str)
def test_micro_batches_that_share_the_number_of_pairs_add_up(cuts):
    kwargs = double(reference.sample(9))
    kwargs["mask"] = torch.arange(9) != 4
    options = {"center_coef": 0.1, "label_smoothing": 0.2}

    def of(rows, **normalizer):
        leaf = kwargs["chosen_scores"][rows].clone().requires_grad_()
        part = {k: v[rows] for k, v in kwargs.items()} | {"chosen_scores": leaf}
        out = reward_loss(**part, **options, **normalizer)
        return out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0], out.stats["pairs"]

    loss, grad, pairs = of(slice(None))
    counts = Denominators.of(kwargs["mask"][:, None])
    for normalizer in (8.0, torch.tensor(8), counts.normalizer("token-mean")):
        parts = [of(slice(i, j), normalizer=normalizer) for i, j in pairwise(cuts)]
        assert sum(p[2] for p in parts) == pairs == 8
        torch.testing.assert_close(sum(p[0] for p in parts), loss, rtol=tolerances.SPLIT, atol=0.0)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad, rtol=tolerances.SPLIT, atol=1e-15)
    half = reward_loss(
        *(kwargs[k].bfloat16() for k in ("chosen_scores", "rejected_scores")), normalizer=torch.tensor(513)
    )
    whole = reward_loss(*(kwargs[k].bfloat16() for k in ("chosen_scores", "rejected_scores")))
    torch.testing.assert_close(half.loss, whole.loss * 9 / 513)  # the number is not rounded to bf16
    nothing = reward_loss(*(kwargs[k][:0] for k in ("chosen_scores", "rejected_scores")), normalizer=torch.tensor(0.0))
    assert nothing.loss == 0


def test_two_backward_calls_agree():
    kwargs = reference.sample(9)
    leaf = kwargs["chosen_scores"].requires_grad_()
    loss = reward_loss(**kwargs).loss
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (double_upstream,) = torch.autograd.grad(2 * loss, leaf)
    assert torch.equal(double_upstream, 2 * first)


def test_only_the_scores_get_a_gradient():
    kwargs = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in reference.sample(9).items()}
    reward_loss(**kwargs).loss.backward()
    assert kwargs["margin"].grad is None and all(kwargs[k].grad is not None for k in LEAVES)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck(backend):
    kwargs = double(reference.sample(9))
    inputs = [kwargs[k].requires_grad_() for k in LEAVES]
    call = lambda c, r: (
        reward_loss(c, r, margin=kwargs["margin"], mask=kwargs["mask"], center_coef=0.1, label_smoothing=0.05).loss
    )
    with rlhf_fast.use_backend(backend):
        assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)


def test_opcheck():
    kwargs = reference.sample(9)
    op = torch.ops.rlhf_fast.reward_loss.default
    for grad in (False, True):
        c, r = (kwargs[k].clone().requires_grad_(grad) for k in LEAVES)
        opcheck(op, (c, r, kwargs["margin"], kwargs["mask"], 0.1, 0.05, grad))
        opcheck(op, (c, r, None, None, 0.0, 0.0, grad))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_compile_gives_the_eager_result_and_gradient(backend):
    kwargs = reference.sample(9)
    leaf = kwargs["chosen_scores"].requires_grad_()
    call = lambda c: reward_loss(c, kwargs["rejected_scores"], mask=kwargs["mask"]).loss * 3
    with rlhf_fast.use_backend(backend):
        (eager,) = torch.autograd.grad(call(leaf), leaf)
        (compiled,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(leaf), leaf)
    torch.testing.assert_close(eager, compiled, atol=0, rtol=0)


def test_threads_and_instruction_sets_give_the_same_bits(each_isa):
    kwargs = reference.sample(30000)
    torch.set_num_threads(2)
    results = [r for _, r in each_isa(lambda: run(kwargs, center_coef=0.1))]
    torch.set_num_threads(1)
    results.append(run(kwargs, center_coef=0.1))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_any_shape_and_strides():
    kwargs = reference.sample(24)
    expected = run(kwargs)
    turned = {k: v.view(4, 6).T.contiguous().T for k, v in kwargs.items()}
    got = run(turned)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2].reshape(-1), expected[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_scores": torch.zeros(3)}, r"'rejected_scores' got shape \(3,\), expected \(2,\)"),
        ({"chosen_scores": torch.zeros(2, dtype=torch.int32)}, "'chosen_scores' got torch.int32"),
        ({"margin": torch.zeros(1)}, r"'margin' got shape \(1,\), expected \(2,\)"),
        ({"margin": float("inf")}, "'margin' got inf"),
        ({"center_coef": -1.0}, "'center_coef' got -1.0"),
        ({"label_smoothing": 0.6}, "'label_smoothing' got 0.6"),
        ({"label_smoothing": 0.5}, "'label_smoothing' got 0.5"),
        ({"mask": torch.ones(2)}, "'mask' got torch.float32"),
        ({"normalizer": 0.0}, "'normalizer' got 0.0"),
        ({"normalizer": torch.ones(2)}, r"'normalizer' got shape \(2,\)"),
        ({"rejected_scores": torch.zeros(2, device="meta")}, "'rejected_scores' got device meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match="reward_loss: argument " + message):
        reward_loss(**{"chosen_scores": torch.zeros(2), "rejected_scores": torch.zeros(2), **change})


def test_meta_tensors_have_shapes_and_no_data():
    out = reward_loss(torch.zeros(3, device="meta"), torch.zeros(3, device="meta"))
    assert out.loss.shape == () and out.loss.is_meta
