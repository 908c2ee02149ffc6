from __future__ import annotations

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.ops import lora_linear
from rlhf_fast.reference.lora_linear import sample

GRADIENTS = ("x", "lora_a", "lora_b")
# Ranks of the segments; rows, in, out around the tiles and blocks of the product (14 rows, 32 columns, 768 and 1,536 of k).
SHAPES = [
    ((16, 16, 16), 4 * 57, 576, 192),
    ((4, 8), 24, 40, 33),
    ((1,), 2, 1, 1),
    ((5,), 30, 1601, 3),
    ((32, 3), 99, 17, 801),
    ((), 7, 20, 9),
    ((0, 6), 12, 20, 9),
]


def run(kwargs, backend=None, grads=GRADIENTS):
    """(y, gradients) under one fixed upstream gradient."""
    leaves = {k: kwargs[k].detach().clone().requires_grad_() for k in grads}
    with rlhf_fast.use_backend(backend):
        y = lora_linear(**{**kwargs, **leaves})
        upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        return y.detach(), *torch.autograd.grad(
            y, list(leaves.values()), upstream, materialize_grads=True, allow_unused=True
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parity(shape, dtype, each_isa):
    ranks, rows, in_features, out_features = shape
    kwargs = sample(rows, in_features, out_features, ranks, dtype=dtype)
    truth, plain = run(double(kwargs), "reference"), run(kwargs, "reference")

    def check():
        got = run(kwargs)
        for name, a, b, c in zip(("y", *GRADIENTS), got, truth, plain, strict=True):
            assert a.dtype is c.dtype
            assert_parity(a, b, c, name)

    each_isa(check)


def test_rows_of_no_segment_are_the_layer_and_a_row_has_its_bits_in_any_batch():
    kwargs = sample(60, 576, 100, (16, 16), bias=False)
    y = lora_linear(**kwargs)
    alone = lora_linear(
        kwargs["x"][21:22], kwargs["weight"], kwargs["lora_a"][:0], kwargs["lora_b"][:, :0], segments=[]
    )
    assert torch.equal(y[21:22], alone)  # rows 20 to 39 have no adapter
    a, b = kwargs["lora_a"][16:], kwargs["lora_b"][:, 16:]
    last = lora_linear(kwargs["x"][-1:], kwargs["weight"], a, b, scale=kwargs["scale"][1])
    assert torch.equal(y[-1:], last)


def test_an_update_of_zero_adds_nothing():
    kwargs = sample(60, 40, 100, (16, 16))
    kwargs["lora_b"] = torch.zeros_like(kwargs["lora_b"])
    assert torch.equal(lora_linear(**kwargs), lora_linear(**{**kwargs, "segments": [(0, 0), (60, 60)]}))


def test_any_number_of_threads_gives_the_same_bits():
    kwargs, before = sample(200, 576, 200, (16, 16)), torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(kwargs))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_leading_dimensions_strides_and_a_transposed_weight():
    kwargs = sample(24, 40, 33, (4, 8))
    expected = run(kwargs)
    wide = torch.randn(4, 6, 80)
    wide[..., ::2] = kwargs["x"].view(4, 6, 40)
    strided = {
        **kwargs,
        "x": wide[..., ::2],
        "weight": kwargs["weight"].t().contiguous().t(),
        "lora_a": kwargs["lora_a"].t().contiguous().t(),
        "lora_b": kwargs["lora_b"].t().contiguous().t(),
        "bias": kwargs["bias"].repeat_interleave(2)[::2],
    }
    before = {k: v.clone() for k, v in strided.items() if isinstance(v, torch.Tensor)}
    leaves = {k: strided[k].detach().requires_grad_() for k in GRADIENTS}
    y = lora_linear(**{**strided, **leaves})
    assert y.shape == (4, 6, 33)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).to(y.dtype)
    expanded = upstream.view(1, 4, 6, 33).transpose(1, 2).contiguous().transpose(1, 2)[0]
    got = (y, *torch.autograd.grad(y, list(leaves.values()), expanded))
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(strided[k], v) for k, v in before.items())


def test_an_input_of_its_own_for_the_factors():
    kwargs = sample(24, 40, 33, (4, 8))
    kwargs["lora_input"] = kwargs["x"] * (torch.rand(24, 40, generator=torch.Generator().manual_seed(1)) > 0.5) * 2
    names = (*GRADIENTS, "lora_input")
    got, plain = run(kwargs, grads=names), run(kwargs, "reference", names)
    truth = run(double(kwargs), "reference", names)
    for name, a, b, c in zip(("y", *names), got, truth, plain, strict=True):
        assert_parity(a, b, c, name)
    assert not got[-1][8:16].any(), "rows without an adapter"


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("wanted", [("x",), ("lora_a",), ("lora_b",), ("x", "lora_b"), ("lora_input",)], ids=str)
def test_gradients_come_only_where_asked(wanted, backend):
    kwargs = sample(24, 40, 33, (4, 8))
    if "lora_input" in wanted:
        kwargs["lora_input"] = kwargs["x"].clone()
    full = run(kwargs, backend)
    alone = run(kwargs, backend, wanted)
    for name, got in zip(wanted, alone[1:], strict=True):
        if name != "lora_input":
            assert torch.equal(got, full[1 + GRADIENTS.index(name)])
        else:
            assert torch.isfinite(got).all() and got[:8].any()


def test_gradcheck():
    kwargs = double(sample(6, 5, 4, (2, 1)))
    kwargs["lora_input"] = kwargs["x"].flip(0)
    names = (*GRADIENTS, "lora_input")
    leaves = [kwargs[k].detach().requires_grad_() for k in names]
    call = lambda *t: lora_linear(**{**kwargs, **dict(zip(names, t, strict=True))})
    assert torch.autograd.gradcheck(call, leaves, **tolerances.GRADCHECK)


def test_opcheck():
    kwargs = sample(6, 5, 4, (2, 1))
    x, a, b = (kwargs[k].requires_grad_() for k in GRADIENTS)
    rest = (None, kwargs["bias"], kwargs["scale"], [0, 2, 4, 6], [2, 1])
    opcheck(torch.ops.rlhf_fast.lora_linear.default, (x, kwargs["weight"], a, b, *rest))
    empty = (x.detach()[:, :0].t()[:0], kwargs["lora_b"].detach()[:, :0])
    opcheck(
        torch.ops.rlhf_fast.lora_linear.default,
        (x, kwargs["weight"], torch.zeros(0, 5), empty[1], *rest[:2], [], [], []),
    )


def test_compile_gives_the_eager_result_and_gradient():
    kwargs = sample(24, 40, 33, (4, 8))
    leaves = {k: kwargs[k].clone().requires_grad_() for k in GRADIENTS}
    torch._dynamo.reset()
    y = torch.compile(lambda **t: lora_linear(**{**kwargs, **t}), fullgraph=True, backend="aot_eager")(**leaves)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    got = (y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream))
    for a, b in zip(got, run(kwargs), strict=True):
        torch.testing.assert_close(a, b)


BAD = {
    "an integer input": ({"x": torch.ones(24, 40, dtype=torch.int64)}, TypeError, "argument 'x'"),
    "another dtype": ({"weight": torch.zeros(33, 40, dtype=torch.float64)}, TypeError, "argument 'weight'"),
    "another width": ({"weight": torch.zeros(33, 41)}, ValueError, "argument 'weight'"),
    "a trained weight": ({"weight": torch.zeros(33, 40, requires_grad=True)}, ValueError, "frozen"),
    "a trained bias": ({"bias": torch.zeros(33, requires_grad=True)}, ValueError, "argument 'bias'"),
    "a bias of another size": ({"bias": torch.zeros(32)}, ValueError, "argument 'bias'"),
    "factors of another width": ({"lora_a": torch.zeros(12, 41)}, ValueError, "argument 'lora_a'"),
    "factors of another rank": ({"lora_b": torch.zeros(33, 11)}, ValueError, "argument 'lora_b'"),
    "an input of another shape": ({"lora_input": torch.zeros(23, 40)}, ValueError, "argument 'lora_input'"),
    "segments out of order": ({"segments": [(8, 16), (0, 8)]}, ValueError, "argument 'segments'"),
    "segments that overlap": ({"segments": [(0, 9), (8, 16)]}, ValueError, "argument 'segments'"),
    "segments beyond the rows": ({"segments": [(0, 8), (16, 25)]}, ValueError, "argument 'segments'"),
    "ranks that do not add up": ({"ranks": [4, 7]}, ValueError, "argument 'ranks'"),
    "a negative rank": ({"ranks": [13, -1]}, ValueError, "argument 'ranks'"),
    "a scale too few": ({"scale": [1.0]}, ValueError, "argument 'scale'"),
    "a scale that is no number": ({"scale": float("nan")}, ValueError, "argument 'scale'"),
    "another device": ({"lora_a": torch.zeros(12, 40, device="meta")}, ValueError, "argument 'lora_a'"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named_before_any_work(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=f"lora_linear: argument.*|{message}") as caught:
        lora_linear(**{**sample(24, 40, 33, (4, 8)), **change})
    assert message in str(caught.value)


def test_a_rank_that_is_not_given_is_an_equal_share():
    kwargs = sample(24, 40, 33, (6, 6))
    expected = lora_linear(**kwargs)
    del kwargs["ranks"]
    assert torch.equal(lora_linear(**kwargs), expected)
    with pytest.raises(ValueError, match="no multiple"):
        lora_linear(**{**sample(24, 40, 33, (6, 7)), "ranks": None})


def test_the_second_derivative_is_refused_by_name():
    kwargs = sample(24, 40, 33, (4, 8))
    x = kwargs["x"].requires_grad_()
    (g,) = torch.autograd.grad(lora_linear(**kwargs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear: the second derivative"):
        g.sum().backward()
