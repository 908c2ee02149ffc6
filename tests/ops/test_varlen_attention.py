from __future__ import annotations

from itertools import pairwise

import pytest
import tolerances
import torch
import torch.nn.functional as F
from parity import assert_parity, double
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.ops import varlen_attention
from rlhf_fast.reference.varlen_attention import sample

NAMES = ("query", "key", "value")
# lengths, heads, heads of keys, width, width of values: around blocks of 32 queries and vectors of 16, and of many sequences
SHAPES = [
    ((5, 1, 9), 4, 2, 16, None),
    ((33, 0, 64, 31), 3, 1, 64, None),
    ((1,), 1, 1, 1, 1),
    ((40, 7), 4, 4, 24, 10),
    ((100,), 2, 1, 80, 33),
    ((3,) * 20, 2, 2, 8, None),
    ((0, 0), 2, 1, 8, None),
    ((), 2, 1, 8, None),
]  # fmt: skip


def run(kwargs, backend=None, wanted=NAMES, **options):
    """(out, gradients) under fixed upstream gradients."""
    leaves = {name: kwargs[name].detach().requires_grad_() for name in wanted}
    with rlhf_fast.use_backend(backend):
        y = varlen_attention(**{**kwargs, **leaves}, **options)
        upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream)


def check(kwargs, each_isa, **options):
    truth, plain = run(double(kwargs), "reference", **options), run(kwargs, "reference", **options)

    def compare():
        for name, a, b, c in zip(("out", *NAMES), run(kwargs, **options), truth, plain, strict=True):
            assert a.dtype is c.dtype and a.shape == c.shape
            assert_parity(a, b, c, name)

    each_isa(compare)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parity(shape, dtype, each_isa):
    kwargs = sample(*shape, dtype=dtype)
    for options in ({}, {"window": 1}, {"window": 6, "scale": -1.5}, {"window": 40}):
        check(kwargs, each_isa, **options)


@pytest.mark.parametrize("window", [None, 40])
def test_parity_of_sequences_that_the_forward_takes_in_parts(window, each_isa):
    check(sample((600, 530), 2, 1, 16), each_isa, window=window)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_it_is_torchs_attention_of_each_sequence(scale):
    kwargs = sample((5, 40, 3))
    got = run(kwargs, scale=scale)
    leaves = [kwargs[name].clone().requires_grad_() for name in NAMES]
    parts = []
    for start, stop in pairwise(kwargs["cu_seqlens"].tolist()):
        q, k, v = (x[None, start:stop].transpose(1, 2) for x in leaves)
        each = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(each[0].transpose(0, 1))
    y = torch.cat(parts)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).float()
    for a, b in zip(got, (y, *torch.autograd.grad(y, leaves, upstream)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_worked_values():
    # Two tokens whose scores are ln 3 apart: weights 3/4 and 1/4. The first token of either sequence sees itself.
    log3 = 1.0986122886681098
    query = torch.tensor([1.0, 1.0, 1.0]).view(3, 1, 1)
    key = torch.tensor([log3, 0.0, 5.0]).view(3, 1, 1)
    value = torch.tensor([[4.0, 0.0], [0.0, 8.0], [-1.0, -2.0]]).view(3, 1, 2)
    got = varlen_attention(query, key, value, torch.tensor([0, 2, 3]), scale=1.0)
    torch.testing.assert_close(got.view(3, 2), torch.tensor([[4.0, 0.0], [3.0, 2.0], [-1.0, -2.0]]))
    alone = varlen_attention(query, key, value, torch.tensor([0, 2, 3]), scale=1.0, window=1)
    assert torch.equal(alone, value)


def test_no_window_is_one_as_long_as_the_sequence():
    kwargs = sample((50, 9))
    assert all(torch.equal(a, b) for a, b in zip(run(kwargs), run(kwargs, window=50), strict=True))


def test_a_sequence_has_the_same_bits_alone_in_any_place_and_with_any_threads():
    kwargs = sample((40, 70, 5), 6, 2, 24)
    bounds = kwargs["cu_seqlens"].tolist()
    for window in (None, 20):
        expected = run(kwargs, window=window)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(run(kwargs, window=window), expected, strict=True))
        y = varlen_attention(**kwargs, window=window)
        for start, stop in pairwise(bounds):
            part = {name: kwargs[name][start:stop] for name in NAMES}
            ends = torch.tensor([0, stop - start])
            assert torch.equal(varlen_attention(**part, cu_seqlens=ends, window=window), y[start:stop])


def test_a_token_sees_neither_later_ones_nor_other_sequences_nor_those_before_its_window():
    kwargs = sample((40, 40), 2, 1, 16)
    for window in (None, 7):
        expected = varlen_attention(**kwargs, window=window)
        for place in (0, 20, 39, 40, 60, 79):
            changed = {name: x.clone() for name, x in kwargs.items()}
            changed["key"][place] += 1.0
            changed["value"][place] += 1.0
            moved = (varlen_attention(**changed, window=window) != expected).flatten(1).any(1).nonzero().flatten()
            end = min(place // 40 * 40 + 40, place + (window or 40))
            assert moved.tolist() == list(range(place, end))


def test_any_strides_and_int32_boundaries_give_the_same_bits_and_inputs_stay():
    kwargs = sample((5, 33, 9))
    expected = run(kwargs)
    heads_first = {name: kwargs[name].transpose(0, 1).contiguous().transpose(0, 1) for name in NAMES}
    every_other = {name: torch.stack([kwargs[name]] * 2, -1).flatten(-2)[..., ::2] for name in NAMES}
    joined = torch.cat([kwargs[name].flatten(1) for name in NAMES], -1)
    sliced = dict(zip(NAMES, (x.unflatten(-1, (-1, 16)) for x in joined.split([64, 32, 32], -1)), strict=True))
    for other in (heads_first, every_other, sliced, {"cu_seqlens": kwargs["cu_seqlens"].int()}):
        given = {**kwargs, **other}
        before = {name: x.clone() for name, x in given.items()}
        assert all(torch.equal(a, b) for a, b in zip(run(given), expected, strict=True))
        assert all(torch.equal(x, given[name]) for name, x in before.items())


def test_an_upstream_gradient_of_any_strides():
    kwargs = sample()
    query = kwargs["query"].clone().requires_grad_()
    y = varlen_attention(**{**kwargs, "query": query})
    (a,) = torch.autograd.grad(y, query, torch.ones(()).expand_as(y), retain_graph=True)
    (b,) = torch.autograd.grad(y, query, torch.ones_like(y))
    assert torch.equal(a, b)


def test_nan_stays_in_its_sequence_and_large_scores_overflow_nothing():
    kwargs = sample((5, 6))
    kwargs["query"][2] = float("nan")
    y = varlen_attention(**kwargs)
    assert y[2].isnan().all() and not y[:2].isnan().any() and not y[3:].isnan().any()
    kwargs = sample((5, 6))
    got = run({**kwargs, "query": kwargs["query"] * 1e4}, scale=10.0)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value",), ("query", "value")], ids=str)
def test_gradients_come_only_where_asked(wanted, backend):
    kwargs = sample()
    full, some = run(kwargs, backend), run(kwargs, backend, wanted)
    assert all(torch.equal(g, full[1 + NAMES.index(name)]) for name, g in zip(wanted, some[1:], strict=True))


def test_gradcheck():
    kwargs = double(sample((3, 1), 2, 1, 4))
    leaves = [kwargs[name].requires_grad_() for name in NAMES]
    call = lambda query, key, value: varlen_attention(query, key, value, kwargs["cu_seqlens"], window=2)
    assert torch.autograd.gradcheck(call, leaves, **tolerances.GRADCHECK)


def test_opcheck():
    kwargs = sample((3, 1), 2, 1, 4)
    leaves = tuple(kwargs[name].requires_grad_() for name in NAMES)
    opcheck(torch.ops.rlhf_fast.varlen_attention.default, (*leaves, kwargs["cu_seqlens"], 0.5, 0))


def test_compile_gives_the_eager_result_and_gradient():
    kwargs = sample()
    leaves = {name: kwargs[name].clone().requires_grad_() for name in NAMES}
    torch._dynamo.reset()
    y = torch.compile(lambda **x: varlen_attention(**{**kwargs, **x}), fullgraph=True, backend="aot_eager")(**leaves)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    got = (y.detach(), *torch.autograd.grad(y, list(leaves.values()), upstream))
    assert all(torch.equal(a, b) for a, b in zip(got, run(kwargs), strict=True))


def test_boundaries_past_the_tokens_are_clamped_where_nobody_has_checked_them():
    kwargs = sample((5, 4))
    call = torch.ops.rlhf_fast.varlen_attention.default
    arguments = [kwargs[name] for name in NAMES]
    expected, _ = call(*arguments, kwargs["cu_seqlens"], 0.25, 0)
    got, _ = call(*arguments, torch.tensor([0, 5, 1000]), 0.25, 0)
    assert torch.equal(got, expected)


BAD = {
    "integers": ({"query": torch.ones(15, 4, 16, dtype=torch.int64)}, TypeError, "argument 'query'"),
    "four dimensions": ({"query": torch.ones(1, 15, 4, 16)}, ValueError, "argument 'query'"),
    "keys of other tokens": ({"key": torch.ones(14, 2, 16)}, ValueError, "argument 'key'"),
    "keys of another width": ({"key": torch.ones(15, 2, 8)}, ValueError, "argument 'key'"),
    "heads that do not divide": ({"key": torch.ones(15, 3, 16)}, ValueError, "argument 'key'"),
    "no heads of keys": ({"key": torch.ones(15, 0, 16)}, ValueError, "argument 'key'"),
    "keys of another dtype": ({"key": torch.ones(15, 2, 16, dtype=torch.float64)}, TypeError, "argument 'key'"),
    "values of other heads": ({"value": torch.ones(15, 4, 16)}, ValueError, "argument 'value'"),
    "another device": ({"value": torch.ones(15, 2, 16, device="meta")}, ValueError, "argument 'value'"),
    "boundaries that fall": ({"cu_seqlens": torch.tensor([0, 9, 5, 15])}, ValueError, "argument 'cu_seqlens'"),
    "boundaries that end early": ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "argument 'cu_seqlens'"),
    "float boundaries": ({"cu_seqlens": torch.tensor([0.0, 15.0])}, TypeError, "argument 'cu_seqlens'"),
    "a window of no keys": ({"window": 0}, ValueError, "argument 'window'"),
    "an infinite scale": ({"scale": float("inf")}, ValueError, "argument 'scale'"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named_before_any_work(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match="varlen_attention: argument") as caught:
        varlen_attention(**{**sample(), **change})
    assert message in str(caught.value)


def test_the_second_derivative_is_refused_by_name():
    kwargs = sample()
    query = kwargs["query"].requires_grad_()
    (g,) = torch.autograd.grad(varlen_attention(**kwargs).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="varlen_attention: the second derivative"):
        g.sum().backward()
