from __future__ import annotations

import math

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.ops import kl_estimate
from rlhf_fast.ops.kl_estimate import ALL_KINDS
from rlhf_fast.reference import kl_estimate as reference


def both(kwargs, **options):
    got = kl_estimate(**kwargs, **options)
    with rlhf_fast.use_backend("reference"):
        return got, kl_estimate(**double(kwargs), **options), kl_estimate(**kwargs, **options)


# Scalar; empty; shorter than any vector and an odd tail; long enough to start a second thread.
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7), (2, 3, 33), (33, 1024)], ids=str)
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_parity(shape, kind, dtype):
    kwargs = reference.sample(shape, dtype=dtype)
    for clamp in (None, 2.0, (3.0, 1.5)):
        got, truth, plain = both(kwargs, kind=kind, clamp=clamp)
        assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert_parity(got, truth, plain)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("clamp", [None, 2.0, (3.0, None), (20.0, 10.0)], ids=str)
def test_gradient_parity(kind, clamp):
    def gradients(kwargs, backend):
        inputs = [kwargs[k].clone().requires_grad_() for k in ("logprobs", "ref_logprobs")]
        upstream = torch.linspace(-1, 1, inputs[0].numel()).view_as(inputs[0]).to(inputs[0].dtype)
        with rlhf_fast.use_backend(backend):
            return torch.autograd.grad(kl_estimate(*inputs, kind, clamp=clamp, mask=kwargs["mask"]), inputs, upstream)

    kwargs = reference.sample((7, 41))
    got, plain = gradients(kwargs, "cpp"), gradients(kwargs, "reference")
    truth = gradients(double(kwargs), "reference")
    for g, t, p, name in zip(got, truth, plain, ("logprobs", "ref_logprobs"), strict=True):
        assert_parity(g, t, p, name)


def test_k3_keeps_its_relative_accuracy_where_policy_and_reference_are_close():
    x = torch.cat(
        [torch.logspace(-8, 1, 4001, dtype=torch.float64), torch.linspace(0.2, 1.1, 500, dtype=torch.float64)]
    )
    x = torch.cat([x, -x]).float()
    logprobs = torch.zeros_like(x)
    exact = torch.tensor([_k3(v) for v in x.tolist()], dtype=torch.float64)
    relative = (kl_estimate(logprobs, x, "k3").double() - exact).abs() / exact
    assert relative.max() <= tolerances.K3_RELATIVE
    slope = torch.tensor([-math.expm1(v) for v in x.tolist()], dtype=torch.float64)
    leaf = logprobs.requires_grad_()
    (grad,) = torch.autograd.grad(kl_estimate(leaf, x, "k3").sum(), leaf)
    assert ((grad.double() - slope).abs() / slope.abs()).max() <= tolerances.K3_RELATIVE


def _k3(x: float) -> float:
    if abs(x) > 0.5:
        return math.expm1(x) - x
    return math.fsum(x**n / math.factorial(n) for n in range(2, 20))


def test_worked_values():
    at = lambda x, kind: kl_estimate(
        torch.zeros(1, dtype=torch.float64), torch.tensor([x], dtype=torch.float64), kind
    ).item()
    assert at(1e-4, "k3") == pytest.approx(5.0001667e-9, rel=1e-8)
    assert at(1e-6, "k3") == pytest.approx(5.0000017e-13, rel=1e-7)
    assert at(1.0, "k3") == pytest.approx(math.e - 2, rel=1e-15)
    assert at(0.3, "k1") == pytest.approx(-0.3) and at(0.3, "k2") == pytest.approx(0.045)
    one_way = kl_estimate(torch.tensor([-5.0]), torch.tensor([-15.0]), "k3").item()
    other = kl_estimate(torch.tensor([-15.0]), torch.tensor([-5.0]), "k3").item()
    assert one_way == pytest.approx(9.0, abs=5e-4) and other == pytest.approx(22015.47, abs=0.01)


def test_expectations_under_the_policy():
    # p = [.5 .3 .2], q = [.4 .4 .2]: k1 and k3 have expectation KL(p || q), k2 is biased.
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    mean = lambda kind: (p * kl_estimate(p.log(), q.log(), kind)).sum().item()
    assert mean("k1") == pytest.approx(0.0252672, abs=5e-8)
    assert mean("k3") == pytest.approx(0.0252672, abs=5e-8)
    assert mean("k2") == pytest.approx(0.0248624, abs=5e-8)


def test_schulman_table_of_bias_and_spread():
    # q = N(0, 1), p = N(mu, 1), samples from q: bias / KL and std / KL of k1, k2, k3 by quadrature on a fine grid.
    grid = torch.linspace(-12, 12, 400001, dtype=torch.float64)
    weight = torch.exp(-grid.square() / 2)
    weight /= weight.sum()
    for mu, table in ((0.1, ((0, 20), (0.0025, 1.418), (0, 1.417))), (1.0, ((0, 2), (0.25, 1.732), (0, 1.695)))):
        truth = mu * mu / 2
        for kind, (bias, spread) in zip(("k1", "k2", "k3"), table, strict=True):
            values = kl_estimate(-grid.square() / 2, -(grid - mu).square() / 2, kind)
            mean = (weight * values).sum()
            std = (weight * (values - mean).square()).sum().sqrt()
            assert (mean / truth - 1).item() == pytest.approx(bias, abs=1e-4)
            assert (std / truth).item() == pytest.approx(spread, abs=1e-3)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_policy_equal_to_reference_gives_exactly_zero(kind):
    x = -torch.rand(3, 50) * 20
    assert torch.equal(kl_estimate(x, x.clone(), kind), torch.zeros(3, 50))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_a_plus_keeps_the_value_and_takes_the_gradient_of_k2(kind):
    kwargs = reference.sample((4, 20))
    leaf = kwargs["logprobs"].clone().requires_grad_()
    plus = kl_estimate(leaf, kwargs["ref_logprobs"], kind + "+", clamp=(20.0, 10.0))
    assert torch.equal(plus.detach(), kl_estimate(kwargs["logprobs"], kwargs["ref_logprobs"], kind, clamp=(20.0, 10.0)))
    (got,) = torch.autograd.grad(plus.sum(), leaf)
    (k2,) = torch.autograd.grad(kl_estimate(leaf, kwargs["ref_logprobs"], "k2").sum(), leaf)
    assert torch.equal(got, k2)


def test_gradients_in_expectation_are_those_of_the_two_kls():
    # With detached sampling: k1 has no gradient, k2 that of KL(p || q), k3 that of KL(q || p), which is p - q in the logits.
    logits = torch.tensor([0.3, -0.2, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    p = logits.detach().softmax(0)

    def gradient(kind):
        return torch.autograd.grad((p * kl_estimate(logits.log_softmax(0), q.log(), kind)).sum(), logits)[0]

    reverse = p * ((p.log() - q.log()) - (p * (p.log() - q.log())).sum())
    torch.testing.assert_close(gradient("k1"), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(gradient("k2"), reverse)
    torch.testing.assert_close(gradient("k3+"), reverse)
    torch.testing.assert_close(gradient("k3"), p - q)


def test_clamps_bound_the_ratio_and_the_estimate():
    logprobs, ref = torch.tensor([0.0, 0.0, -50.0]), torch.tensor([50.0, -50.0, 0.0])
    assert kl_estimate(logprobs, ref, "k3", clamp=(20.0, 10.0)).tolist() == [10.0, 10.0, 10.0]
    assert kl_estimate(logprobs, ref, "k1", clamp=10.0).tolist() == [-10.0, 10.0, -10.0]
    assert kl_estimate(logprobs, ref, "k2", clamp=(2.0, None)).tolist() == [2.0, 2.0, 2.0]
    leaf = logprobs.clone().requires_grad_()
    kl_estimate(leaf, ref, "k3", clamp=(20.0, 10.0)).sum().backward()
    assert leaf.grad.tolist() == [0.0, 0.0, 0.0]


def test_masked_tokens_are_never_read():
    kwargs = reference.sample((6, 20))
    for kind in ALL_KINDS:
        clean = kl_estimate(**kwargs, kind=kind)
        for poison in (float("nan"), float("inf"), -1e30):
            dirty = {k: v.clone() for k, v in kwargs.items()}
            dirty["logprobs"][~dirty["mask"]] = poison
            dirty["ref_logprobs"][~dirty["mask"]] = -poison
            leaf = dirty["logprobs"].requires_grad_()
            got = kl_estimate(**dirty, kind=kind)
            assert torch.equal(clean, got.detach()) and not got[~dirty["mask"]].any()
            got.sum().backward()
            assert leaf.grad.isfinite().all() and not leaf.grad[~dirty["mask"]].any()


def test_a_nan_stays_at_its_token():
    kwargs = reference.sample((3, 40))
    kwargs["mask"][:] = True
    clean = kl_estimate(**kwargs, kind="k3")
    kwargs["logprobs"][1, 5] = float("nan")
    got = kl_estimate(**kwargs, kind="k3")
    hit = torch.zeros(3, 40, dtype=torch.bool)
    hit[1, 5] = True
    assert got[hit].isnan().all() and torch.equal(got[~hit], clean[~hit])


@pytest.mark.parametrize(
    "kind", ["k1", "k2", "k3", "abs", "k2+"]
)  # the other "+" have a gradient that is not their value's
def test_gradcheck(kind):
    kwargs = double(reference.sample((3, 5), seed=3))
    kwargs["logprobs"] = kwargs["ref_logprobs"] + torch.randn(3, 5, dtype=torch.float64)
    inputs = [kwargs[k].requires_grad_() for k in ("logprobs", "ref_logprobs")]
    for backend in ("cpp", "reference"):
        with rlhf_fast.use_backend(backend):
            call = lambda a, b: kl_estimate(a, b, kind, mask=kwargs["mask"])
            assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)


def test_opcheck():
    kwargs = reference.sample((3, 9))
    for grad in (False, True):
        a, b = (kwargs[k].clone().requires_grad_(grad) for k in ("logprobs", "ref_logprobs"))
        opcheck(torch.ops.rlhf_fast.kl_estimate.default, (a, b, kwargs["mask"], "k3", 20.0, 10.0))
        opcheck(torch.ops.rlhf_fast.kl_estimate.default, (a, b, None, "abs+", math.inf, math.inf))


def test_compile_gives_the_eager_result_and_gradient():
    kwargs = reference.sample((3, 9))
    leaf = kwargs["logprobs"].requires_grad_()
    call = lambda x: kl_estimate(x, kwargs["ref_logprobs"], "k3", mask=kwargs["mask"]).square().sum()
    (eager,) = torch.autograd.grad(call(leaf), leaf)
    (compiled,) = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(leaf), leaf)
    assert torch.equal(eager, compiled)


def test_threads_and_instruction_sets_give_the_same_bits(each_isa):
    kwargs = reference.sample((70, 700))
    leaf = kwargs["logprobs"].requires_grad_()

    def run():
        value = kl_estimate(**kwargs, kind="k3")
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    torch.set_num_threads(2)
    results = [r for _, r in each_isa(run)]
    torch.set_num_threads(1)
    results.append(run())
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))


def test_strided_inputs():
    kwargs = reference.sample((12, 7))
    strided = {k: v.T.contiguous().T for k, v in kwargs.items()}
    assert torch.equal(kl_estimate(**kwargs, kind="k3"), kl_estimate(**strided, kind="k3"))
    expanded = kl_estimate(kwargs["logprobs"], kwargs["ref_logprobs"][:1].expand(12, 7))
    assert torch.equal(expanded, kwargs["logprobs"] - kwargs["ref_logprobs"][:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ref_logprobs": torch.zeros(2, 4)},
            r"kl_estimate: argument 'ref_logprobs' got shape \(2, 4\), expected \(2, 3\)",
        ),
        ({"logprobs": torch.zeros(2, 3, dtype=torch.int8)}, "kl_estimate: argument 'logprobs' got torch.int8"),
        ({"logprobs": [0.0]}, "kl_estimate: argument 'logprobs' got list"),
        ({"mask": torch.ones(2, 3)}, "kl_estimate: argument 'mask' got torch.float32, expected torch.bool"),
        ({"kind": "k4"}, "kl_estimate: argument 'kind' got 'k4', expected one of 'k1', 'k2', 'k3', 'abs', 'k1"),
        ({"clamp": -1.0}, "kl_estimate: argument 'clamp' got -1.0"),
        ({"clamp": (1.0, float("nan"))}, "kl_estimate: argument 'clamp' got nan"),
        ({"clamp": (1.0,)}, "kl_estimate: argument 'clamp' got .* a pair"),
        ({"ref_logprobs": torch.zeros(2, 3, device="meta")}, "kl_estimate: argument 'ref_logprobs' got device meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    kwargs = {"logprobs": torch.zeros(2, 3), "ref_logprobs": torch.zeros(2, 3), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        kl_estimate(**kwargs)


def test_meta_tensors_have_shapes_and_no_data():
    x = torch.zeros(2, 3, device="meta")
    out = kl_estimate(x, x, "k3")
    assert out.shape == (2, 3) and out.is_meta
