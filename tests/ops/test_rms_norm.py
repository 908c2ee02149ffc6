from __future__ import annotations

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rlhf_fast
from rlhf_fast.ops import rms_norm
from rlhf_fast.reference.rms_norm import sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Around a vector (16), four of them, and the rows that a thread takes.
SHAPES = [(1, 1), (3, 15), (2, 3, 64), (5, 65), (7, 576), (0, 8), (9000, 20)]


def run(kwargs, backend=None):
    """(y, gradient) under one fixed upstream gradient."""
    x = kwargs["x"].detach().requires_grad_()
    with rlhf_fast.use_backend(backend):
        y = rms_norm(**{**kwargs, "x": x})
        upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        return y.detach(), *torch.autograd.grad(y, x, upstream)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(shape, dtype, each_isa):
    for offset, scale in ((0.0, 1.0), (1.0, 3e-3)):  # the second: eps counts
        kwargs = sample(shape, dtype=dtype, offset=offset, scale=scale)
        truth, plain = run(double(kwargs), "reference"), run(kwargs, "reference")

        def check(kwargs=kwargs, truth=truth, plain=plain):
            for name, a, b, c in zip(("y", "x"), run(kwargs), truth, plain, strict=True):
                assert a.dtype is c.dtype
                assert_parity(a, b, c, name)

        each_isa(check)


@pytest.mark.parametrize(("kind", "offset"), [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_it_is_what_models_compute(kind, offset):
    kwargs = sample((6, 40), offset=offset)
    layer = kind(40, eps=kwargs["eps"]).requires_grad_(False)
    layer.weight.copy_(kwargs["weight"])
    torch.testing.assert_close(rms_norm(**kwargs), layer(kwargs["x"]), rtol=1e-6, atol=1e-6)


def test_worked_values():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    y = rms_norm(x, torch.tensor([1.0, 2.0]), eps=0.5)
    # mean(x^2) = 12.5, and 1 / sqrt(13); a row of zeros stays one.
    torch.testing.assert_close(y, torch.tensor([[0.8320503, 2.2188008], [0.0, 0.0]]), rtol=0, atol=tolerances.WORKED)


def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads():
    kwargs = sample((400, 576))
    y, grad = run(kwargs)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(kwargs), (y, grad), strict=True))
    alone = rms_norm(**{**kwargs, "x": kwargs["x"][17:18]})
    assert torch.equal(alone, y[17:18])


def test_any_strides_give_the_same_bits_and_inputs_stay():
    kwargs = sample((4, 6, 40))
    expected = run(kwargs)
    wide = torch.randn(4, 6, 80)
    wide[..., :40] = kwargs["x"]
    every_other = torch.randn(4, 6, 80)
    every_other[..., ::2] = kwargs["x"]
    transposed = kwargs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for x in (wide[..., :40], every_other[..., ::2], transposed):
        before = x.clone()
        assert all(torch.equal(a, b) for a, b in zip(run({**kwargs, "x": x}), expected, strict=True))
        assert torch.equal(x, before)
    x = kwargs["x"].clone().requires_grad_()
    upstream = torch.ones(1, 1, 1).expand(4, 6, 40)
    (grad,) = torch.autograd.grad(rms_norm(**{**kwargs, "x": x}), x, upstream)
    (dense,) = torch.autograd.grad(rms_norm(**{**kwargs, "x": x}), x, upstream.contiguous())
    assert torch.equal(grad, dense)


def test_gradcheck():
    kwargs = double(sample((3, 5)))
    x = kwargs.pop("x").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, **kwargs), x, **tolerances.GRADCHECK)


def test_opcheck():
    kwargs = sample((3, 5))
    opcheck(torch.ops.rlhf_fast.rms_norm.default, (kwargs["x"].requires_grad_(), kwargs["weight"], 1e-5, 1.0))


def test_compile_gives_the_eager_result_and_gradient():
    kwargs = sample((6, 40))
    x = kwargs["x"].clone().requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(lambda x: rms_norm(**{**kwargs, "x": x}), fullgraph=True, backend="aot_eager")(x)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    got = (y.detach(), *torch.autograd.grad(y, x, upstream))
    assert all(torch.equal(a, b) for a, b in zip(got, run(kwargs), strict=True))


BAD = {
    "integers": ({"x": torch.ones(2, 40, dtype=torch.int64)}, TypeError, "argument 'x'"),
    "no width": ({"x": torch.ones(2, 0), "weight": torch.ones(0)}, ValueError, "argument 'x'"),
    "another width": ({"weight": torch.ones(39)}, ValueError, "argument 'weight'"),
    "another dtype": ({"weight": torch.ones(40, dtype=torch.float64)}, TypeError, "argument 'weight'"),
    "another device": ({"weight": torch.ones(40, device="meta")}, ValueError, "argument 'weight'"),
    "a trained weight": ({"weight": torch.ones(40, requires_grad=True)}, ValueError, "frozen"),
    "a negative eps": ({"eps": -1.0}, ValueError, "argument 'eps'"),
    "an offset that is no number": ({"offset": float("nan")}, ValueError, "argument 'offset'"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named_before_any_work(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match="rms_norm: argument") as caught:
        rms_norm(**{**sample((6, 40)), **change})
    assert message in str(caught.value)


def test_the_second_derivative_is_refused_by_name():
    kwargs = sample((6, 40))
    x = kwargs["x"].requires_grad_()
    (g,) = torch.autograd.grad(rms_norm(**kwargs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm: the second derivative"):
        g.sum().backward()
