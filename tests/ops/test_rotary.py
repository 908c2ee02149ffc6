from __future__ import annotations

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import rlhf_fast
from rlhf_fast.ops import rotary
from rlhf_fast.reference.rotary import sample

NAMES = ("query", "key")
# batch, length, heads, heads of keys, width: around half a vector (8), two vectors, and no keys or no tokens at all
SHAPES = [(2, 5, 4, 2, 16), (1, 1, 1, 1, 2), (3, 7, 3, 1, 64), (2, 3, 2, 2, 34), (2, 3, 2, 0, 16), (0, 3, 2, 1, 16), (40, 30, 2, 1, 20)]  # fmt: skip


def run(kwargs, backend=None, wanted=NAMES):
    """(query, key, gradients) under fixed upstream gradients."""
    leaves = {name: kwargs[name].detach().requires_grad_() for name in wanted}
    with rlhf_fast.use_backend(backend):
        found = rotary(**{**kwargs, **leaves})
        upstream = [torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) for y in found]
        tracked = [(y, g) for y, g in zip(found, upstream, strict=True) if y.requires_grad]
        outputs, upstream = zip(*tracked, strict=True)
        grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return *(y.detach() for y in found), *grads


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parity(shape, dtype, each_isa):
    kwargs = sample(*shape, dtype=dtype)
    truth, plain = run(double(kwargs), "reference"), run(kwargs, "reference")

    def check():
        for name, a, b, c in zip((*NAMES, "of query", "of key"), run(kwargs), truth, plain, strict=True):
            assert a.dtype is c.dtype and a.shape == c.shape
            assert_parity(a, b, c, name)

    each_isa(check)


def test_it_is_what_models_compute():
    kwargs = sample()
    expected = apply_rotary_pos_emb(*kwargs.values())
    for a, b in zip(rotary(**kwargs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_tables_with_halves_of_their_own():
    kwargs = sample()
    kwargs["cosine"], kwargs["sine"] = (torch.randn_like(kwargs[name]) for name in ("cosine", "sine"))
    got, truth, plain = run(kwargs), run(double(kwargs), "reference"), run(kwargs, "reference")
    for a, b, c in zip(got, truth, plain, strict=True):
        assert_parity(a, b, c)


def test_worked_values():
    x = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    quarter = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    query, key = rotary(x, 3 * x, *quarter)  # a quarter of a turn: (1, 2) to (-2, 1)
    assert query.flatten().tolist() == [-2.0, 1.0] and key.flatten().tolist() == [-6.0, 3.0]


def test_the_backward_turns_back():
    kwargs = sample()
    query = kwargs["query"].clone().requires_grad_()
    turned, _ = rotary(**{**kwargs, "query": query})
    (back,) = torch.autograd.grad(turned, query, turned.detach())
    torch.testing.assert_close(back, query.detach())


def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads():
    kwargs = sample(40, 30, 2, 1, 20)
    expected = run(kwargs)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(kwargs), expected, strict=True))
    alone = rotary(**{name: x[3:4] for name, x in kwargs.items()})
    assert all(torch.equal(a, b[3:4]) for a, b in zip(alone, expected[:2], strict=True))


def test_any_strides_and_one_table_for_all_give_the_same_bits_and_inputs_stay():
    kwargs = sample()
    expected = run(kwargs)
    one = {**kwargs, **{name: kwargs[name][:1] for name in ("cosine", "sine")}}
    dense = {name: x.contiguous() for name, x in kwargs.items()}
    strided = {name: torch.stack([x, torch.randn_like(x)], -1).flatten(-2)[..., ::2] for name, x in kwargs.items()}
    joined = torch.cat([kwargs["query"].transpose(1, 2).flatten(2), kwargs["key"].transpose(1, 2).flatten(2)], -1)
    views = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in joined.split([64, 32], -1))
    sliced = {**kwargs, **dict(zip(NAMES, views, strict=True))}
    for other in (one, dense, strided, sliced):
        before = {name: x.clone() for name, x in other.items()}
        assert all(torch.equal(a, b) for a, b in zip(run(other), expected, strict=True))
        assert all(torch.equal(x, other[name]) for name, x in before.items())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("wanted", [("query",), ("key",)], ids=str)
def test_gradients_come_only_where_asked(wanted, backend):
    kwargs = sample()
    full, alone = run(kwargs, backend), run(kwargs, backend, wanted)
    assert torch.equal(alone[2], full[2 + NAMES.index(wanted[0])])


def test_a_loss_on_the_queries_alone_leaves_the_keys_without_gradient():
    kwargs = sample()
    query, key = (kwargs[name].clone().requires_grad_() for name in NAMES)
    rotary(query, key, kwargs["cosine"], kwargs["sine"])[0].sum().backward()
    assert query.grad is not None and query.grad.any() and (key.grad is None or not key.grad.any())


def test_gradcheck():
    kwargs = double(sample(1, 2, 2, 1, 4))
    leaves = [kwargs[name].requires_grad_() for name in NAMES]
    call = lambda query, key: rotary(query, key, kwargs["cosine"], kwargs["sine"])
    assert torch.autograd.gradcheck(call, leaves, **tolerances.GRADCHECK)


def test_opcheck():
    kwargs = sample(1, 2, 2, 1, 4)
    leaves = tuple(kwargs[name].requires_grad_() for name in NAMES)
    opcheck(torch.ops.rlhf_fast.rotary.default, (*leaves, kwargs["cosine"], kwargs["sine"]))


def test_compile_gives_the_eager_result_and_gradient():
    kwargs = sample()
    leaves = {name: kwargs[name].clone().requires_grad_() for name in NAMES}
    torch._dynamo.reset()
    found = torch.compile(lambda **x: rotary(**{**kwargs, **x}), fullgraph=True, backend="aot_eager")(**leaves)
    upstream = [torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) for y in found]
    got = (*(y.detach() for y in found), *torch.autograd.grad(found, list(leaves.values()), upstream))
    assert all(torch.equal(a, b) for a, b in zip(got, run(kwargs), strict=True))


BAD = {
    "integers": ({"query": torch.ones(2, 4, 5, 16, dtype=torch.int64)}, TypeError, "argument 'query'"),
    "an odd width": ({"query": torch.ones(2, 4, 5, 15)}, ValueError, "argument 'query'"),
    "three dimensions": ({"query": torch.ones(4, 5, 16)}, ValueError, "argument 'query'"),
    "keys of another length": ({"key": torch.ones(2, 2, 6, 16)}, ValueError, "argument 'key'"),
    "keys of another dtype": ({"key": torch.ones(2, 2, 5, 16, dtype=torch.float64)}, TypeError, "argument 'key'"),
    "a table of another batch": ({"cosine": torch.ones(3, 5, 16)}, ValueError, "argument 'cosine'"),
    "a table of another width": ({"sine": torch.ones(2, 5, 8)}, ValueError, "argument 'sine'"),
    "a trained table": ({"sine": torch.ones(2, 5, 16, requires_grad=True)}, ValueError, "argument 'sine'"),
    "another device": ({"key": torch.ones(2, 2, 5, 16, device="meta")}, ValueError, "argument 'key'"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named_before_any_work(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match="rotary: argument") as caught:
        rotary(**{**sample(), **change})
    assert message in str(caught.value)


def test_the_second_derivative_is_refused_by_name():
    kwargs = sample()
    query = kwargs["query"].requires_grad_()
    (g,) = torch.autograd.grad(rotary(**kwargs)[0].square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="rotary: the second derivative"):
        g.sum().backward()
