from __future__ import annotations

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.ops import silu_mul
from rlhf_fast.reference.silu_mul import sample

NAMES = ("gate", "up")
SHAPES = [(1, 1), (3, 15), (2, 3, 64), (5, 65), (7, 1536), (0, 8), (4, 0), (3000, 20)]


def run(kwargs, backend=None, wanted=NAMES):
    """(y, gradients) under one fixed upstream gradient."""
    leaves = {name: kwargs[name].detach().requires_grad_() for name in wanted}
    with rlhf_fast.use_backend(backend):
        y = silu_mul(**{**kwargs, **leaves})
        upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parity(shape, dtype, each_isa):
    kwargs = sample(shape, dtype=dtype)
    truth, plain = run(double(kwargs), "reference"), run(kwargs, "reference")

    def check():
        for name, a, b, c in zip(("y", *NAMES), run(kwargs), truth, plain, strict=True):
            assert a.dtype is c.dtype
            assert_parity(a, b, c, name)

    each_isa(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_values(dtype, each_isa):
    gate = torch.tensor([-1e38, -1e4, -200.0, -89.0, -87.0, -1e-30, 0.0, 1e-30, 60.0, 200.0, 1e38], dtype=dtype)
    kwargs = {"gate": gate, "up": torch.full_like(gate, -0.5)}
    truth = run(double(kwargs), "reference")

    def check():
        for a, b in zip(run(kwargs), truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-35)

    each_isa(check)
    broken = torch.tensor([float("nan"), 1.0])
    assert torch.equal(silu_mul(broken, torch.ones(2)).isnan(), torch.tensor([True, False]))
    assert torch.equal(silu_mul(torch.ones(2), broken).isnan(), torch.tensor([True, False]))


def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads():
    kwargs = sample((400, 100))
    expected = run(kwargs)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(kwargs), expected, strict=True))
    assert torch.equal(silu_mul(**{k: v[17:18] for k, v in kwargs.items()}), expected[0][17:18])


def test_halves_of_one_product_and_other_strides_give_the_same_bits_and_inputs_stay():
    kwargs = sample((4, 6, 40))
    expected = run(kwargs)
    joined = torch.cat([kwargs["gate"], kwargs["up"]], -1)
    before = joined.clone()
    halves = dict(zip(NAMES, joined.chunk(2, -1), strict=True))
    turned = {k: v.transpose(0, 1).contiguous().transpose(0, 1) for k, v in kwargs.items()}
    every_other = {k: torch.stack([v, torch.randn_like(v)], -1).flatten(-2)[..., ::2] for k, v in kwargs.items()}
    for other in (halves, turned, every_other):
        assert all(torch.equal(a, b) for a, b in zip(run(other), expected, strict=True))
    assert torch.equal(joined, before)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("wanted", [("gate",), ("up",)], ids=str)
def test_gradients_come_only_where_asked(wanted, backend):
    kwargs = sample((6, 40))
    full, alone = run(kwargs, backend), run(kwargs, backend, wanted)
    assert torch.equal(alone[1], full[1 + NAMES.index(wanted[0])])


def test_worked_values():
    y = silu_mul(torch.tensor([0.0, 1.0, -2.0]), torch.tensor([5.0, 2.0, 3.0]))
    torch.testing.assert_close(y, torch.tensor([0.0, 1.4621172, -0.7152176]), rtol=0, atol=tolerances.WORKED)


def test_gradcheck():
    kwargs = double(sample((3, 5)))
    leaves = [kwargs[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(silu_mul, leaves, **tolerances.GRADCHECK)


def test_opcheck():
    kwargs = sample((3, 5))
    opcheck(torch.ops.rlhf_fast.silu_mul.default, tuple(kwargs[name].requires_grad_() for name in NAMES))


def test_compile_gives_the_eager_result_and_gradient():
    kwargs = sample((6, 40))
    leaves = {name: kwargs[name].clone().requires_grad_() for name in NAMES}
    torch._dynamo.reset()
    y = torch.compile(lambda **x: silu_mul(**x), fullgraph=True, backend="aot_eager")(**leaves)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    got = (y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream))
    assert all(torch.equal(a, b) for a, b in zip(got, run(kwargs), strict=True))


BAD = {
    "integers": ({"gate": torch.ones(6, 40, dtype=torch.int64)}, TypeError, "argument 'gate'"),
    "another shape": ({"up": torch.ones(6, 39)}, ValueError, "argument 'up'"),
    "another dtype": ({"up": torch.ones(6, 40, dtype=torch.float64)}, TypeError, "argument 'up'"),
    "another device": ({"up": torch.ones(6, 40, device="meta")}, ValueError, "argument 'up'"),
    "a number": ({"gate": torch.tensor(1.0), "up": torch.tensor(1.0)}, ValueError, "argument 'gate'"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named_before_any_work(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match="silu_mul: argument") as caught:
        silu_mul(**{**sample((6, 40)), **change})
    assert message in str(caught.value)


def test_the_second_derivative_is_refused_by_name():
    kwargs = sample((6, 40))
    gate = kwargs["gate"].requires_grad_()
    (g,) = torch.autograd.grad(silu_mul(**kwargs).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="silu_mul: the second derivative"):
        g.sum().backward()
