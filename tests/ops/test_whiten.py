from __future__ import annotations

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.ops import whiten
from rlhf_fast.reference import whiten as reference

# Scalar; empty; one entry; one block and its neighbours; two chunks; more than 256 chunks' worth, so that chunks grow.
SHAPES = [(), (0,), (3, 0), (1,), (5, 7), (255,), (257,), (33, 65), (300, 1024)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parity(shape, shift_mean, dtype):
    kwargs = reference.sample(shape, dtype=dtype)
    for unbiased in (True, False):
        options = {"shift_mean": shift_mean, "unbiased": unbiased, "eps": 1e-5}
        got = whiten(**kwargs, **options)
        with rlhf_fast.use_backend("reference"):
            truth, plain = whiten(**double(kwargs), **options), whiten(**kwargs, **options)
        assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert_parity(got, truth, plain)


def test_gradient_parity():
    def gradient(kwargs, backend, **options):
        leaf = kwargs["x"].clone().requires_grad_()
        with rlhf_fast.use_backend(backend):
            out = whiten(leaf, kwargs["mask"], **options)
            return torch.autograd.grad(out, leaf, torch.linspace(-1, 2, leaf.numel()).view_as(leaf).to(leaf.dtype))[0]

    kwargs = reference.sample((9, 131))
    for options in ({}, {"shift_mean": False}, {"unbiased": False, "eps": 0.3}):
        truth = gradient(double(kwargs), "reference", **options)
        assert_parity(gradient(kwargs, "cpp", **options), truth, gradient(kwargs, "reference", **options))


def test_worked_values():
    x = torch.linspace(1.2, 2.0, 9).view(3, 3)
    biased = whiten(x, shift_mean=False, unbiased=False)[0]
    bessel = whiten(x, shift_mean=False)[0]
    torch.testing.assert_close(biased, torch.tensor([0.0508, 0.4381, 0.8254]), atol=tolerances.WORKED4, rtol=0)
    torch.testing.assert_close(bessel, torch.tensor([0.1394, 0.5046, 0.8697]), atol=tolerances.WORKED4, rtol=0)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mean_zero_and_variance_one_over_the_real_entries(unbiased):
    kwargs = reference.sample((40, 60))
    y = whiten(**kwargs, unbiased=unbiased)
    real = y[kwargs["mask"]].double()
    assert abs(real.mean().item()) <= 1e-6 and abs(real.var(unbiased=unbiased).item() - 1) <= 1e-5
    assert not y[~kwargs["mask"]].any()


def test_one_entry_no_entry_and_equal_entries_stay_finite():
    x = torch.tensor([5.0, 7.0, 9.0])
    one = torch.tensor([False, True, False])
    assert whiten(x, one).tolist() == [0.0, 0.0, 0.0]
    assert whiten(x, one, shift_mean=False).tolist() == [0.0, 7.0, 0.0]
    assert whiten(x, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]
    assert whiten(torch.full((4,), 0.1)).tolist() == [0.0] * 4
    for mask in (one, torch.zeros(3, dtype=torch.bool)):
        leaf = x.clone().requires_grad_()
        whiten(leaf, mask).sum().backward()
        assert leaf.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_mean_far_from_zero_costs_no_digits():
    x = 1e4 + torch.arange(4096.0) / 64
    torch.testing.assert_close(whiten(x), whiten(x - 1e4), atol=1e-6, rtol=0)


def test_masked_entries_are_never_read():
    kwargs = reference.sample((6, 200))
    clean = whiten(**kwargs)
    for poison in (float("nan"), float("inf"), -1e30):
        dirty = kwargs["x"].clone()
        dirty[~kwargs["mask"]] = poison
        leaf = dirty.requires_grad_()
        got = whiten(leaf, kwargs["mask"])
        assert torch.equal(clean, got.detach())
        got.square().sum().backward()
        assert leaf.grad.isfinite().all() and not leaf.grad[~kwargs["mask"]].any()


def test_permuting_the_batch_permutes_the_result():
    kwargs = reference.sample((12, 50))
    order = torch.randperm(12)
    permuted = whiten(kwargs["x"][order], kwargs["mask"][order])
    torch.testing.assert_close(permuted, whiten(**kwargs)[order], atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_gradcheck(shift_mean):
    kwargs = double(reference.sample((3, 7)))
    leaf = kwargs["x"].requires_grad_()
    for backend in ("cpp", "reference"):
        for unbiased in (True, False):
            with rlhf_fast.use_backend(backend):
                call = lambda x: whiten(x, kwargs["mask"], shift_mean=shift_mean, unbiased=unbiased, eps=0.1)  # noqa: B023
                assert torch.autograd.gradcheck(call, leaf, **tolerances.GRADCHECK)


def test_opcheck():
    kwargs = reference.sample((3, 9))
    for grad in (False, True):
        x = kwargs["x"].clone().requires_grad_(grad)
        opcheck(torch.ops.rlhf_fast.whiten.default, (x, kwargs["mask"], True, True, 1e-8))
        opcheck(torch.ops.rlhf_fast.whiten.default, (x, None, False, False, 1e-5))


def test_compile_gives_the_eager_result_and_gradient():
    kwargs = reference.sample((3, 9))
    leaf = kwargs["x"].requires_grad_()
    call = lambda x: whiten(x, kwargs["mask"]).pow(3).sum()
    (eager,) = torch.autograd.grad(call(leaf), leaf)
    (compiled,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(leaf), leaf)
    assert torch.equal(eager, compiled)


def test_threads_and_instruction_sets_give_the_same_bits(each_isa):
    kwargs = reference.sample((301, 1023))
    leaf = kwargs["x"].requires_grad_()

    def run():
        out = whiten(**kwargs)
        return out.detach(), torch.autograd.grad(out, leaf, kwargs["x"].detach())[0]

    torch.set_num_threads(2)
    results = [r for _, r in each_isa(run)]
    torch.set_num_threads(1)
    results.append(run())
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_strided_input_gives_the_result_of_a_contiguous_one():
    x = torch.randn(7, 12)
    torch.testing.assert_close(whiten(x.T), whiten(x.T.contiguous()), atol=0, rtol=0)
    assert torch.equal(whiten(x[:, ::2]), whiten(x[:, ::2].contiguous()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, dtype=torch.int64)}, "whiten: argument 'x' got torch.int64"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"whiten: argument 'mask' got shape \(2,\), expected \(3,\)"),
        ({"eps": 0.0}, "whiten: argument 'eps' got 0.0"),
        ({"eps": float("nan")}, "whiten: argument 'eps' got nan"),
        ({"mask": torch.ones(3, dtype=torch.bool, device="meta")}, "whiten: argument 'mask' got device meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        whiten(**{"x": torch.zeros(3), **change})


def test_meta_tensors_have_shapes_and_no_data():
    out = whiten(torch.zeros(2, 3, device="meta"))
    assert out.shape == (2, 3) and out.is_meta
