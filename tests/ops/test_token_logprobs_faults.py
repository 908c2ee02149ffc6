from __future__ import annotations

import math
import multiprocessing
import threading

import pytest
import torch
from token_parity import DTYPES, assert_all_parity, stats, three

import rlhf_fast
from rlhf_fast.reference import token_logprobs as reference

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e30])
def test_masked_rows_are_never_read(poison):
    kwargs = reference.sample((3, 7), 130)
    clean = stats(kwargs, temperature=torch.ones(3, 7))
    bad = ~kwargs["mask"]
    dirty = {k: v.clone() for k, v in kwargs.items()}
    dirty["logits"][bad] = poison
    dirty["ref_logits"][bad] = poison
    dirty["token_ids"][bad] = 2**40
    got = stats(dirty, temperature=torch.ones(3, 7).masked_fill(bad, NAN))
    assert bad.any() and all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))
    assert all(not x[bad].any() for x in got)
    with rlhf_fast.use_backend("reference"):
        assert all(not x[bad].any() for x in stats(dirty, temperature=torch.ones(3, 7).masked_fill(bad, NAN)))


def test_all_rows_masked():
    kwargs = reference.sample((2, 3), 40)
    kwargs["mask"] = torch.zeros(2, 3, dtype=torch.bool)
    assert all(not x.any() for x in stats(kwargs))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), ()], ids=str)
def test_zero_rows_and_a_single_row_without_leading_dimension(shape):
    z = torch.randn(*shape, 11).requires_grad_()
    out = rlhf_fast.token_logprobs(z, torch.ones(shape, dtype=torch.int64), ref_logits=z.detach())
    assert all(x.shape == shape for x in out)
    sum(x.sum() for x in out).backward()
    assert z.grad.shape == z.shape


@pytest.mark.parametrize("bad", [5, -1, 2**40, 2**63 - 1, -100])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_token_id_out_of_range_is_refused_with_row_id_and_v(bad, backend):
    ids = torch.tensor([[0, 1, 2], [3, bad, 1]])
    message = rf"token_logprobs: argument 'token_ids' got {bad} at row 4, expected a token id in \[0, 5\)"
    with rlhf_fast.use_backend(backend), pytest.raises(ValueError, match=message):
        rlhf_fast.token_logprobs(torch.randn(2, 3, 5), ids)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_narrow_token_ids_mean_the_same(dtype):
    kwargs = reference.sample((4, 5), 120)
    kwargs["token_ids"] = kwargs["token_ids"].clamp(0)
    expected = stats(kwargs)
    kwargs["token_ids"] = kwargs["token_ids"].to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(expected, stats(kwargs), strict=True))


def test_unsigned_ids_do_not_wrap():
    with pytest.raises(ValueError, match="got 200 at row 1"):
        rlhf_fast.token_logprobs(torch.randn(2, 130), torch.tensor([129, 200], dtype=torch.uint8))


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_or_infinity_stays_in_its_row(poison, dtype):
    kwargs = reference.sample((4,), 2500, dtype=dtype)
    kwargs["mask"] = None
    kwargs["token_ids"] = kwargs["token_ids"].clamp(0)
    clean = stats(kwargs)
    for position in (0, 17, 2499):
        kwargs["logits"] = kwargs["logits"].clone()
        kwargs["logits"][2, position] = poison
        got = stats(kwargs)
        others = [0, 1, 3]
        assert all(torch.equal(a[others], b[others]) for a, b in zip(clean, got, strict=True))
        assert all(x[2].isnan().all() for x in got)


def test_nan_in_the_reference_spoils_only_kl_of_its_row():
    kwargs = reference.sample((3,), 50)
    kwargs["mask"] = None
    kwargs["token_ids"] = kwargs["token_ids"].clamp(0)
    clean = rlhf_fast.token_logprobs(**kwargs)
    kwargs["ref_logits"][1, 30] = NAN
    got = rlhf_fast.token_logprobs(**kwargs)
    assert all(torch.equal(a, b) for a, b in zip(clean[:3], got[:3], strict=True))
    assert got.kl[1].isnan() and torch.equal(got.kl[[0, 2]], clean.kl[[0, 2]])


@pytest.mark.parametrize("V", [3, 40, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_entirely_at_minus_infinity_is_nan(V, dtype):
    logits = torch.randn(3, V).to(dtype)
    logits[1] = -INF
    out = stats(
        {
            "logits": logits,
            "token_ids": torch.zeros(3, dtype=torch.int64),
            "ref_logits": torch.randn(3, V).to(dtype),
        }
    )
    assert all(x[1].isnan().all() and not x[[0, 2]].isnan().any() for x in out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_at_minus_infinity_are_as_if_absent(dtype):
    """Also when a whole block of the vocabulary is excluded before the first finite logit."""
    kwargs = reference.sample((3,), 6000, dtype=dtype)
    kwargs["mask"] = None
    keep = torch.zeros(6000, dtype=torch.bool)
    keep[4500:5200] = True
    keep[5900] = True
    kwargs["token_ids"] = torch.tensor([4500, 5000, 5900])
    excluded = {
        k: v.masked_fill(~keep, -INF) if v is not None and v.is_floating_point() else v for k, v in kwargs.items()
    }
    got, truth, plain = three(excluded, temperature=0.7)
    assert all(g.isfinite().all() for g in got)
    assert_all_parity(got, truth, plain)
    assert not got[4][:, ~keep].any()
    small = {k: v[:, keep] if v is not None and v.is_floating_point() else v for k, v in kwargs.items()}
    small["token_ids"] = torch.tensor([0, 500, 700])
    for a, b in zip(stats(small, temperature=0.7), got, strict=True):
        torch.testing.assert_close(a, b if b.dim() == 1 else b[:, keep], rtol=2e-6, atol=2e-6, check_dtype=False)


def test_excluded_token_has_logprob_minus_infinity_and_pytorchs_gradient():
    logits = torch.tensor([[0.0, -INF, 1.0]]).requires_grad_()
    out = rlhf_fast.token_logprobs(logits, torch.tensor([1]))
    assert out.logprobs.item() == -INF and out.entropy.isfinite().all()
    (grad,) = torch.autograd.grad(out.logprobs.sum(), logits)
    (expected,) = torch.autograd.grad(logits.log_softmax(-1)[0, 1], logits)
    torch.testing.assert_close(grad, expected)


def test_kl_is_infinite_where_the_reference_excludes_a_possible_class():
    q = torch.tensor([[0.0, -INF, 1.0]])
    assert float(rlhf_fast.token_logprobs(torch.zeros(1, 3), torch.tensor([0]), ref_logits=q).kl) == INF
    both = rlhf_fast.token_logprobs(q, torch.tensor([0]), ref_logits=q).kl
    assert float(both) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_numbers_do_not_overflow(dtype):
    top = torch.finfo(dtype).max if dtype is not torch.float64 else 3e38
    logits = torch.tensor(
        [[top, -top, 0.0, top], [-top, -top, -top, -top], [0.0, top, -top, 1.0]], dtype=torch.float64
    ).to(dtype)
    out = stats({"logits": logits, "token_ids": torch.tensor([0, 1, 1]), "ref_logits": logits.flip(0)})
    expected = torch.tensor([-math.log(2), -math.log(4), 0.0])
    torch.testing.assert_close(out[0].float(), expected)
    torch.testing.assert_close(out[1].float(), -expected)
    assert out[2].isfinite().all() and not any(x.isnan().any() for x in out[:4])
    cold = rlhf_fast.token_logprobs(logits, torch.tensor([0, 1, 1]), temperature=1e-30)
    torch.testing.assert_close(cold.logprobs.float(), expected)
    hot = rlhf_fast.token_logprobs(torch.randn(2, 8).to(dtype), torch.tensor([0, 1]), temperature=1e30)
    torch.testing.assert_close(hot.entropy.float(), torch.full((2,), math.log(8)))


def test_soft_cap_makes_infinite_logits_finite():
    logits = torch.tensor([[INF, 0.0, -INF, 1.0]]).requires_grad_()
    out = rlhf_fast.token_logprobs(logits, torch.tensor([0]), softcap=3.0)
    capped = torch.tensor([[3.0, 0.0, -3.0, 3 * math.tanh(1 / 3)]])
    torch.testing.assert_close(out.logsumexp, capped.logsumexp(-1))
    (grad,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), logits)
    assert grad.isfinite().all() and float(grad[0, 0]) == 0.0 and float(grad[0, 2]) == 0.0 and float(grad[0, 1]) != 0.0


def test_rows_without_upstream_gradient_are_not_read():
    logits = torch.randn(3, 30)
    logits[1] = NAN
    logits.requires_grad_()
    out = rlhf_fast.token_logprobs(logits, torch.zeros(3, dtype=torch.int64))
    (grad,) = torch.autograd.grad(out.logprobs, logits, torch.tensor([1.0, 0.0, 1.0]))
    assert not grad[1].any() and grad[[0, 2]].isfinite().all() and grad[0].any()


def test_reference_and_temperature_get_no_gradient():
    kwargs = reference.sample((2, 3), 20)
    for backend in ("cpp", "reference"):
        z, r = kwargs["logits"].clone().requires_grad_(), kwargs["ref_logits"].clone().requires_grad_()
        t = torch.ones(2, 3, requires_grad=True)
        with rlhf_fast.use_backend(backend):
            rlhf_fast.token_logprobs(
                z, kwargs["token_ids"], mask=kwargs["mask"], ref_logits=r, temperature=t
            ).kl.sum().backward()
        assert z.grad is not None and r.grad is None and t.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.zeros(2, 3, dtype=torch.int8)},
            "'logits' got torch.int8, expected one of float32, bfloat16",
        ),
        ({"logits": torch.zeros(2, 3, dtype=torch.complex64)}, "'logits' got torch.complex64"),
        ({"logits": torch.zeros(2, 3, dtype=torch.float8_e4m3fn)}, "'logits' got torch.float8_e4m3fn"),
        ({"logits": [[1.0]]}, "'logits' got list"),
        ({"logits": torch.zeros(2, 0)}, r"'logits' got shape \(2, 0\), expected \(..., V\) with V > 0"),
        ({"logits": torch.zeros(())}, r"'logits' got shape \(\)"),
        ({"token_ids": torch.zeros(3, dtype=torch.int64)}, r"'token_ids' got shape \(3,\), expected \(2,\)"),
        ({"token_ids": torch.zeros(2)}, "'token_ids' got torch.float32, expected one of int64, int32"),
        (
            {"token_ids": torch.zeros(2, dtype=torch.int64, device="meta")},
            "'token_ids' got device meta, expected cpu",
        ),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"'mask' got shape \(2, 3\), expected \(2,\)"),
        ({"mask": torch.ones(2)}, "'mask' got torch.float32, expected torch.bool"),
        ({"ref_logits": torch.zeros(2, 4)}, r"'ref_logits' got shape \(2, 4\), expected \(2, 3\)"),
        ({"temperature": 0.0}, "'temperature' got 0.0, expected a finite number"),
        ({"temperature": -1}, "'temperature' got -1"),
        ({"temperature": NAN}, "'temperature' got nan"),
        ({"temperature": "1"}, "'temperature' got '1' of type str"),
        ({"temperature": torch.ones(3)}, r"'temperature' got shape \(3,\), expected \(2,\)"),
        (
            {"temperature": torch.tensor([1.0, 0.0])},
            "'temperature' got 0.0 at row 1, expected a finite number > 0",
        ),
        ({"temperature": torch.tensor([1.0, NAN])}, "'temperature' got nan at row 1"),
        ({"softcap": 0.0}, "'softcap' got 0.0"),
        ({"softcap": INF}, "'softcap' got inf"),
    ],
)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_wrong_arguments_are_named(change, message, backend):
    kwargs = {"logits": torch.zeros(2, 3), "token_ids": torch.zeros(2, dtype=torch.int64), **change}
    logits, ids = kwargs.pop("logits"), kwargs.pop("token_ids")
    with (
        rlhf_fast.use_backend(backend),
        pytest.raises((ValueError, TypeError), match=f"token_logprobs: argument {message}"),
    ):
        rlhf_fast.token_logprobs(logits, ids, **kwargs)


def test_second_derivative_is_a_clear_error_and_the_reference_has_it():
    z, ids = torch.randn(2, 6, requires_grad=True), torch.tensor([1, 2])
    (first,) = torch.autograd.grad(rlhf_fast.token_logprobs(z, ids).logprobs.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="token_logprobs: the second derivative is not available"):
        first.square().sum().backward()
    with rlhf_fast.use_backend("reference"):
        (first,) = torch.autograd.grad(rlhf_fast.token_logprobs(z, ids).logprobs.sum(), z, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), z)[0].abs().sum() > 0


def test_change_of_the_logits_before_backward_is_an_error():
    x = torch.randn(2, 6, requires_grad=True)
    z = x * 1
    out = rlhf_fast.token_logprobs(z, torch.tensor([1, 2]))
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprobs.sum().backward()


def test_results_may_be_changed_before_backward():
    x = torch.randn(2, 6, requires_grad=True)
    ids = torch.tensor([1, 2])
    out = rlhf_fast.token_logprobs(x, ids)
    (expected,) = torch.autograd.grad(out.logprobs.sum(), x, retain_graph=True)
    out.entropy.detach().fill_(NAN)
    out.logsumexp.detach().fill_(NAN)
    assert torch.equal(torch.autograd.grad(out.logprobs.sum(), x)[0], expected)


def test_threads_may_call_at_the_same_time():
    kwargs = reference.sample((30,), 2000)
    expected, wrong = stats(kwargs), []

    def work():
        for _ in range(5):
            if not all(torch.equal(a, b) for a, b in zip(expected, stats(kwargs), strict=True)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def _in_child(queue, kwargs):
    torch.set_num_threads(1)
    queue.put([x.tolist() for x in rlhf_fast.token_logprobs(**kwargs)])


def test_a_forked_child_completes():
    kwargs = reference.sample((40,), 2000)
    torch.set_num_threads(2)
    expected = [x.tolist() for x in rlhf_fast.token_logprobs(**kwargs)]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, kwargs))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join(timeout=60)
    assert child.exitcode == 0
