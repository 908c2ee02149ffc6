from __future__ import annotations

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.ops import group_advantages
from rlhf_fast.ops.group_advantages import COMPOSED, FORMULAS
from rlhf_fast.reference import group_advantages as reference
from rlhf_fast.reference.group_advantages import KINDS

R = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
ONE_GROUP = torch.zeros(5, dtype=torch.int64)


# Empty; one sample; fewer and more samples than groups; a table that has to resolve many collisions.
@pytest.mark.parametrize("n", [0, 1, 2, 7, 24, 500])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parity(n, kind, dtype):
    kwargs = reference.sample(n, dtype=dtype)
    if n == 500:
        kwargs["group_ids"] = torch.randint(-(2**62), 2**62, (120,))[torch.randint(0, 120, (n,))]
    got = group_advantages(**kwargs, kind=kind)
    with rlhf_fast.use_backend("reference"):
        truth, plain = group_advantages(**double(kwargs), kind=kind), group_advantages(**kwargs, kind=kind)
    assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert_parity(got, truth, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_parity(kind):
    def gradient(kwargs, backend):
        leaf = kwargs["scores"].clone().requires_grad_()
        with rlhf_fast.use_backend(backend):
            out = group_advantages(**{**kwargs, "scores": leaf}, kind=kind)
            return torch.autograd.grad(out, leaf, torch.linspace(-1, 2, leaf.numel()).to(leaf.dtype))[0]

    kwargs = reference.sample(60)
    truth = gradient(double(kwargs), "reference")
    assert_parity(gradient(kwargs, "cpp"), truth, gradient(kwargs, "reference"))


WORKED = [
    ("grpo", {}, [0.7303, -1.0954, -1.0954, 0.7303, 0.7303]),
    ("grpo", {"unbiased": False}, [0.8165, -1.2247, -1.2247, 0.8165, 0.8165]),
    ("dr_grpo", {}, [0.4, -0.6, -0.6, 0.4, 0.4]),
    ("rloo", {}, [0.5, -0.75, -0.75, 0.5, 0.5]),
    ("opo", {"lengths": torch.tensor([10, 20, 30, 40, 50])}, [0.3333, -0.6667, -0.6667, 0.3333, 0.3333]),
    ("remax", {"greedy_scores": torch.full((5,), 0.25)}, [0.75, -0.25, -0.25, 0.75, 0.75]),
    ("pass@k", {}, [0.0, 0.0, 0.0, 0.0, 0.0]),
    ("reinforce++", {}, [0.7303, -1.0954, -1.0954, 0.7303, 0.7303]),
    ("lite_ppo", {}, [0.7303, -1.0954, -1.0954, 0.7303, 0.7303]),
    ("gpg", {}, [0.4, -0.6, -0.6, 0.4, 0.4]),
]


def test_every_kind_has_worked_values():
    assert {kind for kind, *_ in WORKED} == set(FORMULAS) == {*KINDS, *COMPOSED}


@pytest.mark.parametrize(("kind", "options", "expected"), WORKED)
def test_worked_values(kind, options, expected):
    got = group_advantages(R, ONE_GROUP, kind, **options)
    torch.testing.assert_close(got, torch.tensor(expected), atol=tolerances.WORKED4, rtol=0)
    if kind not in ("opo", "remax"):
        assert abs(got.sum().item()) <= tolerances.WORKED


def test_pass_at_k_rewards_the_only_best_sample_with_its_lead():
    got = group_advantages(torch.tensor([0.2, 1.0, 0.7, 3.0]), torch.tensor([4, 4, 4, 9]), "pass@k")
    torch.testing.assert_close(got, torch.tensor([0.0, 0.3, 0.0, 0.0]))


def test_two_samples_under_rloo_get_plus_and_minus_their_difference():
    got = group_advantages(torch.tensor([3.0, 1.0]), torch.tensor([7, 7]), "rloo")
    assert got.tolist() == [2.0, -2.0]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "remax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_groups_of_one_and_equal_scores_give_zero_and_no_gradient_of_nan(kind, dtype):
    for backend in ("cpp", "reference"):
        scores = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.1, 0.1], dtype=dtype, requires_grad=True)
        ids, lengths = torch.tensor([1, 1, 1, 2, 1, 1]), torch.tensor([3, 1, 2, 9, 7, 1])
        with rlhf_fast.use_backend(backend):
            got = group_advantages(scores, ids, kind, lengths=lengths)
            assert got.tolist() == [0.0] * 6
            got.sum().backward()
        assert scores.grad.isfinite().all()


def test_reinforce_plus_plus_is_whitened_over_the_batch():
    kwargs = reference.sample(200)
    got = group_advantages(kwargs["scores"], kwargs["group_ids"], "reinforce++").double()
    assert abs(got.mean().item()) <= 1e-6 and got.var().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_labels_and_their_order_and_values_do_not_matter(kind):
    kwargs = reference.sample(40)
    whole = group_advantages(**kwargs, kind=kind)
    order = torch.randperm(40)
    permuted = group_advantages(**{k: v[order] for k, v in kwargs.items()}, kind=kind)
    torch.testing.assert_close(permuted, whole[order], atol=1e-6, rtol=1e-5)
    relabelled = {**kwargs, "group_ids": kwargs["group_ids"] * -3 + 11}
    assert torch.equal(group_advantages(**relabelled, kind=kind), whole)
    small = {**kwargs, "group_ids": torch.unique(kwargs["group_ids"], return_inverse=True)[1].to(torch.int32)}
    assert torch.equal(group_advantages(**small, kind=kind), whole)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "opo", "pass@k"])
def test_a_group_does_not_depend_on_the_rest_of_the_batch(kind):
    kwargs = reference.sample(40)
    whole = group_advantages(**kwargs, kind=kind)
    for g in kwargs["group_ids"].unique():
        inside = kwargs["group_ids"] == g
        assert torch.equal(group_advantages(**{k: v[inside] for k, v in kwargs.items()}, kind=kind), whole[inside])


@pytest.mark.parametrize("kind", KINDS)
def test_masked_samples_belong_to_no_group(kind):
    kwargs = reference.sample(40)
    clean = group_advantages(**kwargs, kind=kind)
    kept = kwargs["mask"]
    alone = group_advantages(**{k: v[kept] for k, v in kwargs.items()}, kind=kind)
    assert torch.equal(clean[kept], alone) and not clean[~kept].any()
    for poison in (float("nan"), float("inf")):
        dirty = {**kwargs, "scores": kwargs["scores"].clone(), "greedy_scores": kwargs["greedy_scores"].clone()}
        dirty["scores"][~kept] = poison
        dirty["greedy_scores"][~kept] = poison
        leaf = dirty["scores"].requires_grad_()
        got = group_advantages(**dirty, kind=kind)
        assert torch.equal(clean, got.detach())
        got.square().sum().backward()
        assert leaf.grad.isfinite().all() and not leaf.grad[~kept].any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    kwargs = double(reference.sample(14))
    kwargs["scores"] = torch.randn(14, dtype=torch.float64)  # no ties: the kinds have kinks there
    leaf = kwargs["scores"].requires_grad_()
    for backend in ("cpp", "reference"):
        with rlhf_fast.use_backend(backend):
            call = lambda s: group_advantages(**{**kwargs, "scores": s}, kind=kind)
            assert torch.autograd.gradcheck(call, leaf, **tolerances.GRADCHECK)


def test_opcheck():
    kwargs = reference.sample(12)
    op = torch.ops.rlhf_fast.group_advantages.default
    for grad in (False, True):
        s = kwargs["scores"].clone().requires_grad_(grad)
        opcheck(op, (s, kwargs["group_ids"], kwargs["mask"], kwargs["lengths"], None, "opo", True, 1e-6))
        opcheck(op, (s, kwargs["group_ids"], None, None, None, "grpo", False, 1e-6))


def test_compile_gives_the_eager_result_and_gradient():
    kwargs = reference.sample(12)
    leaf = kwargs["scores"].requires_grad_()
    call = lambda s: group_advantages(s, kwargs["group_ids"]).pow(3).sum()
    (eager,) = torch.autograd.grad(call(leaf), leaf)
    (compiled,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(leaf), leaf)
    assert torch.equal(eager, compiled)


def test_instruction_sets_give_the_same_bits(each_isa):
    kwargs = reference.sample(100)
    for kind in KINDS:
        results = [r for _, r in each_isa(lambda: group_advantages(**kwargs, kind=kind))]  # noqa: B023
        assert all(torch.equal(results[0], r) for r in results[1:])


def test_any_shape_and_strides():
    kwargs = reference.sample(24)
    flat = group_advantages(**kwargs)
    square = {k: v.view(4, 6) for k, v in kwargs.items()}
    assert torch.equal(group_advantages(**square).view(-1), flat)
    turned = {k: v.T.contiguous().T for k, v in square.items()}
    assert torch.equal(group_advantages(**turned).reshape(-1), flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(5, dtype=torch.int64)}, "'scores' got torch.int64"),
        ({"group_ids": torch.zeros(4, dtype=torch.int64)}, r"'group_ids' got shape \(4,\), expected \(5,\)"),
        ({"group_ids": torch.zeros(5)}, "'group_ids' got torch.float32"),
        ({"group_ids": ONE_GROUP.to("meta")}, "'group_ids' got device meta"),
        ({"kind": "gpo"}, "'kind' got 'gpo', expected one of 'grpo', 'dr_grpo'"),
        ({"kind": "opo"}, "'lengths' got NoneType"),
        ({"kind": "opo", "lengths": torch.ones(3, dtype=torch.int64)}, r"'lengths' got shape \(3,\)"),
        ({"kind": "remax"}, "'greedy_scores' got NoneType"),
        ({"eps": 0.0}, "'eps' got 0.0"),
        ({"eps": float("nan")}, "'eps' got nan"),
        ({"mask": torch.ones(5)}, "'mask' got torch.float32"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match="group_advantages: argument " + message):
        group_advantages(**{"scores": R, "group_ids": ONE_GROUP, **change})


def test_meta_tensors_have_shapes_and_no_data():
    out = group_advantages(torch.zeros(6, device="meta"), torch.zeros(6, dtype=torch.int64, device="meta"))
    assert out.shape == (6,) and out.is_meta
