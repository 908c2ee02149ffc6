from __future__ import annotations

import pytest
import tolerances
import torch
from head_parity import NAMES, leaves
from head_parity import statistics as results
from parity import assert_parity, double
from torch.library import opcheck
from watch import Watch

import rlhf_fast
from rlhf_fast.reference import linear_token_logprobs as reference

TRAINED = [("hidden",), ("weight",), ("hidden", "weight", "bias"), ("bias",)]
NAN = float("nan")


def check(kwargs, trained=(), outputs=NAMES, **options):
    got = results(kwargs, trained, outputs, **options)
    with rlhf_fast.use_backend("reference"):
        options.pop("chunk_bytes", None)
        truth, plain = (results(k, trained, outputs, **options) for k in (double(kwargs), kwargs))
    names = [n for n in NAMES if n != "kl" or "ref_hidden" in kwargs] + list(trained)
    for g, t, p, name in zip(got, truth, plain, names, strict=True):
        if g.dtype is torch.float64:
            assert (g - t).abs().max() <= tolerances.DOUBLE * max(1.0, float(t.abs().max())), name
        else:
            assert_parity(g, t, p, name)
    return got


# One row a chunk, a few rows with a ragged last chunk, all rows.
@pytest.mark.parametrize("chunk_bytes", [1, 127 * 4 * 2 * 7, None], ids=str)
@pytest.mark.parametrize("trained", TRAINED, ids="+".join)
def test_parity(chunk_bytes, trained):
    check(reference.sample(), trained, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=str)
def test_parity_in_every_dtype(dtype, options):
    got = check(reference.sample((3, 5), 300, dtype=dtype), ("hidden", "weight", "bias"), chunk_bytes=9000, **options)
    assert got[0].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert all(x.dtype == dtype for x in got[4:])


@pytest.mark.parametrize("output", NAMES)
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids="+".join)
def test_gradient_of_each_output_alone(output, trained):
    check(reference.sample(), trained, (output,), temperature=torch.rand(4, 9) + 0.5, chunk_bytes=9000)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 2, 3)], ids=str)
def test_shapes(shape):
    kwargs = reference.sample(shape, 33, 8)
    kwargs["mask"] = None
    kwargs["token_ids"] = kwargs["token_ids"].clamp(0)
    check(kwargs, ("hidden", "weight"), chunk_bytes=600)
    assert rlhf_fast.linear_token_logprobs(**kwargs).kl.shape == shape


def test_without_bias_mask_and_reference():
    kwargs = reference.sample(ref=False, bias=False)
    kwargs["mask"] = None
    kwargs["token_ids"] = kwargs["token_ids"].clamp(0)
    check(kwargs, ("hidden",), NAMES[:3])
    assert rlhf_fast.linear_token_logprobs(**kwargs).kl is None


def test_agrees_with_token_logprobs_on_the_full_logits():
    kwargs = reference.sample(ref=False)
    logits = torch.nn.functional.linear(kwargs["hidden"], kwargs["weight"], kwargs["bias"])
    full = rlhf_fast.token_logprobs(logits, kwargs["token_ids"], mask=kwargs["mask"])
    for a, b in zip(rlhf_fast.linear_token_logprobs(**kwargs)[:3], full[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_reference_shares_the_head_unless_it_has_its_own():
    kwargs = reference.sample()
    del kwargs["ref_weight"]
    shared = rlhf_fast.linear_token_logprobs(**kwargs).kl
    spelled = rlhf_fast.linear_token_logprobs(**kwargs, ref_weight=kwargs["weight"], ref_bias=kwargs["bias"]).kl
    assert torch.equal(shared, spelled) and shared.abs().sum() > 0
    check(kwargs, ("hidden", "weight", "bias"))
    check({**kwargs, "ref_weight": kwargs["weight"] * 1.1, "ref_bias": torch.randn(127)}, ("hidden",))
    same = rlhf_fast.linear_token_logprobs(**{**kwargs, "ref_hidden": kwargs["hidden"]}).kl
    assert not same.any()
    narrow = {**kwargs, "ref_hidden": torch.randn(4, 9, 5), "ref_weight": torch.randn(127, 5)}
    check(narrow, ("hidden",))


def test_hidden_and_weight_of_two_dtypes_meet_in_fp32():
    kwargs = reference.sample(ref=False)
    mixed = {**kwargs, "weight": kwargs["weight"].bfloat16(), "bias": kwargs["bias"].bfloat16()}
    wide = {
        **kwargs,
        "weight": kwargs["weight"].bfloat16().float(),
        "bias": kwargs["bias"].bfloat16().float(),
    }
    trained = ("hidden", "weight")
    for tiles in (None, 500):
        a, b = (
            results(mixed, trained, NAMES[:3], chunk_bytes=tiles),
            results(wide, trained, NAMES[:3], chunk_bytes=tiles),
        )
        for x, y in zip(a[:4], b[:4], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
        assert a[4].dtype is torch.bfloat16
        torch.testing.assert_close(a[4], b[4].bfloat16(), rtol=2 * tolerances.FLOOR[torch.bfloat16], atol=1e-5)


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_masked_rows_are_never_multiplied(trained):
    kwargs = reference.sample()
    clean = results(kwargs, trained)
    bad = ~kwargs["mask"]
    dirty = {k: v.clone() for k, v in kwargs.items()}
    dirty["hidden"][bad] = NAN
    dirty["ref_hidden"][bad] = NAN
    dirty["token_ids"][bad] = 2**40
    got = results(dirty, trained, temperature=torch.ones(4, 9).masked_fill(bad, NAN))
    for a, b in zip(clean, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert all(not x[bad].any() for x in got[:4]) and not got[4][bad].any()
    dirty["mask"] = torch.zeros_like(bad)
    assert all(not x.any() for x in results(dirty, trained))


def unmasked(kwargs):
    return {**kwargs, "mask": None, "token_ids": kwargs["token_ids"].clamp(0)}


def test_rows_without_upstream_gradient_are_not_recomputed():
    kwargs = leaves(unmasked(reference.sample(ref=False)), ("hidden", "weight"))
    out = rlhf_fast.linear_token_logprobs(**kwargs)
    weights = torch.zeros(4, 9)
    weights[1, 3] = 2.0
    with Watch() as watch:
        grad, _ = torch.autograd.grad(out.logprobs, [kwargs["hidden"], kwargs["weight"]], weights)
    one_row = [[(1, 24), (24, 127)], [(1, 127), (127, 24)], [(127, 1), (1, 24)]]
    assert watch.products() == one_row
    assert grad[1, 3].any() and not grad[0].any()


def test_frozen_weight_keeps_the_direction_and_multiplies_nothing_in_backward():
    kwargs = leaves(reference.sample(ref=False), ("hidden",))
    with Watch() as watch:
        out = rlhf_fast.linear_token_logprobs(**kwargs)
    assert len(watch.products()) == 2
    g = torch.randn(4, 9)
    with Watch() as watch:
        (grad,) = torch.autograd.grad(out.logprobs, kwargs["hidden"], g, retain_graph=True)
    assert watch.calls and not watch.products()
    with Watch() as watch:
        (recomputed,) = torch.autograd.grad([out.logprobs, out.entropy], kwargs["hidden"], [g, torch.zeros(4, 9)])
    assert len(watch.products()) == 2
    torch.testing.assert_close(grad, recomputed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("directions", [(), ("entropy",), ("logprobs", "entropy"), ["kl", "logsumexp"], NAMES], ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 127 * 4 * 3 * 7, None], ids=str)
def test_directions_that_are_kept_give_the_gradients_without_products(directions, chunk_bytes):
    kwargs = reference.sample()
    for outputs in (NAMES, directions, *((name,) for name in NAMES)):
        if outputs:
            got = check(kwargs, ("hidden",), outputs, directions=directions, chunk_bytes=chunk_bytes, softcap=5.0)
            plain = results(kwargs, ("hidden",), outputs, chunk_bytes=chunk_bytes, softcap=5.0)
            torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
    leaf = leaves(kwargs, ("hidden",))
    with Watch() as watch:
        out = rlhf_fast.linear_token_logprobs(**leaf, directions=directions)
    assert len(watch.products()) == 2 + len(directions)
    for name in NAMES:
        with Watch() as watch:
            torch.autograd.grad(getattr(out, name).sum(), leaf["hidden"], retain_graph=True)
        again = 2 + (name == "kl")
        assert len(watch.products()) == (0 if name in directions else again), name
    if directions:
        with Watch() as watch:
            torch.autograd.grad(sum(getattr(out, name).sum() for name in directions), leaf["hidden"])
        assert not watch.products()


@pytest.mark.parametrize(
    "trained", [(), ("weight",), ("hidden", "weight", "bias")], ids=lambda t: "+".join(t) or "none"
)
def test_directions_are_only_kept_for_a_frozen_head(trained):
    kwargs = leaves(reference.sample(), trained)
    with Watch() as watch:
        rlhf_fast.linear_token_logprobs(**kwargs, directions=NAMES)
    assert len(watch.products()) == 2  # the logits of the policy and of the reference


def test_two_backward_calls_agree_and_leave_the_directions_alone():
    kwargs = leaves(reference.sample(), ("hidden",))
    out = rlhf_fast.linear_token_logprobs(**kwargs, directions=NAMES)
    total = (out.logprobs * 3 + out.entropy).sum()
    first = torch.autograd.grad(total, kwargs["hidden"], retain_graph=True)[0].clone()
    torch.autograd.grad(total, kwargs["hidden"], retain_graph=True)[0].fill_(7.0)
    assert torch.equal(torch.autograd.grad(total, kwargs["hidden"])[0], first)


@pytest.mark.parametrize("grad", [False, True])
def test_without_gradient_towards_hidden_there_is_one_product(grad):
    kwargs = leaves(reference.sample(ref=False), ("bias",) if grad else ())
    with Watch() as watch:
        out = rlhf_fast.linear_token_logprobs(**kwargs)
    assert len(watch.products()) == 1
    if grad:
        with Watch() as watch:
            torch.autograd.grad(out.logprobs.sum(), kwargs["bias"])
        assert len(watch.products()) == 1  # the logits again; nothing of the size of the weight


def test_gradient_of_a_frozen_weight_is_not_computed():
    kwargs = leaves(reference.sample(ref=False, bias=False), ("hidden",))
    out = rlhf_fast.linear_token_logprobs(**kwargs)
    live = int(kwargs["mask"].sum())
    with Watch() as watch:
        torch.autograd.grad(out.entropy.sum(), kwargs["hidden"])
    assert watch.products() == [[(live, 24), (24, 127)], [(live, 127), (127, 24)]]


@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight")], ids="+".join)
@pytest.mark.parametrize("directions", [("logprobs",), ("logprobs", "kl")], ids="+".join)
def test_no_tensor_is_larger_than_the_budget(trained, directions):
    """64 rows of 2000 classes are 512 KB of logits, 1 MB with the reference; the budget is 64 KiB."""
    kwargs = leaves(reference.sample((64,), 2000, 4, bias=False), trained)
    budget = 64 << 10
    with Watch() as watch:
        out = rlhf_fast.linear_token_logprobs(**kwargs, chunk_bytes=budget, directions=directions)
        if trained:
            torch.autograd.grad(out.kl.sum() + out.logprobs.sum(), [kwargs[k] for k in trained])
    assert len(watch.products()) >= 16 and budget // 3 <= max(size for *_, size in watch.calls) <= budget
    torch.testing.assert_close(out.kl, rlhf_fast.linear_token_logprobs(**kwargs).kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(dtype, native):
    if native.isa() == "scalar":
        pytest.skip("PyTorch's product serves this processor, and promises nothing")
    kwargs = unmasked(reference.sample((40,), 500, 16, dtype=dtype, ref=False))

    def run(rows, threads, chunk_bytes=None):
        torch.set_num_threads(threads)
        some = {k: v[rows] if k in ("hidden", "token_ids") else v for k, v in kwargs.items()}
        return results(some, ("hidden",), ("logsumexp",), chunk_bytes=chunk_bytes, directions=("logsumexp",))

    whole = run(slice(None), 2)
    for rows, threads, chunk_bytes in ((slice(0, 1), 1, None), (slice(7, 31), 3, 1), (slice(0, 40), 1, 40_000)):
        for got, all_rows in zip(run(rows, threads, chunk_bytes)[:3], whole[:3], strict=True):
            assert torch.equal(got, all_rows[rows])


def test_chunks_do_not_change_the_result():
    kwargs = reference.sample((40,), 500, 16)
    whole = results(kwargs, ("hidden", "weight", "bias"))
    for chunk_bytes in (1, 500 * 4 * 2 * 3, 500 * 4 * 2 * 16):
        for a, b in zip(whole, results(kwargs, ("hidden", "weight", "bias"), chunk_bytes=chunk_bytes), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [127, -1, 2**40])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_token_id_out_of_range_is_refused_before_any_product(bad, backend, monkeypatch):
    kwargs = reference.sample()
    kwargs["mask"][2, 1] = True
    kwargs["token_ids"] = kwargs["token_ids"].masked_fill(kwargs["mask"], 3)
    kwargs["token_ids"][2, 1] = bad
    if backend == "cpp":
        monkeypatch.setattr(torch, "mm", lambda *_, **__: pytest.fail("a product was computed"))
    message = rf"linear_token_logprobs: argument 'token_ids' got {bad} at row 19, expected a token id in \[0, 127\)"
    with rlhf_fast.use_backend(backend), pytest.raises(ValueError, match=message):
        rlhf_fast.linear_token_logprobs(**kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(4, 9, 24, dtype=torch.int64)},
            "'hidden' got torch.int64, expected one of float32",
        ),
        ({"weight": torch.zeros(127, 23)}, r"'weight' got shape \(127, 23\), expected \(V, H\)"),
        ({"weight": torch.zeros(0, 24)}, r"'weight' got shape \(0, 24\)"),
        ({"weight": torch.zeros(127, 24, device="meta")}, "'weight' got device meta, expected cpu"),
        ({"bias": torch.zeros(126)}, r"'bias' got shape \(126,\), expected \(127,\)"),
        (
            {"token_ids": torch.zeros(4, 8, dtype=torch.int64)},
            r"'token_ids' got shape \(4, 8\), expected \(4, 9\)",
        ),
        ({"mask": torch.ones(4, 8, dtype=torch.bool)}, r"'mask' got shape \(4, 8\)"),
        (
            {"ref_hidden": torch.zeros(4, 8, 24)},
            r"'ref_hidden' got shape \(4, 8, 24\), expected \(4, 9, 24\)",
        ),
        ({"ref_weight": torch.zeros(126, 24)}, r"'ref_weight' got shape \(126, 24\)"),
        ({"ref_hidden": None}, "'ref_weight' got a tensor, expected None without ref_hidden"),
        (
            {"ref_weight": None, "ref_bias": torch.zeros(127)},
            "'ref_bias' got a tensor, expected None without ref_weight",
        ),
        ({"temperature": 0.0}, "'temperature' got 0.0"),
        ({"temperature": torch.zeros(4, 9)}, "'temperature' got 0.0 at row"),
        ({"softcap": -1.0}, "'softcap' got -1.0"),
        ({"chunk_bytes": 0}, "'chunk_bytes' got 0"),
        ({"chunk_bytes": "64M"}, "'chunk_bytes' got '64M' of type str"),
        ({"directions": "entropy"}, "'directions' got 'entropy', expected a sequence of names"),
        ({"directions": ("entropies",)}, "'directions' got 'entropies', expected one of 'logprobs'"),
        (
            {"directions": ("kl",), "ref_hidden": None, "ref_weight": None},
            "'directions' got 'kl', expected another name without ref_hidden",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    kwargs = {**reference.sample(), **change}
    with pytest.raises((ValueError, TypeError), match=f"linear_token_logprobs: argument {message}"):
        rlhf_fast.linear_token_logprobs(**kwargs)


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
@pytest.mark.parametrize("outputs", [("logprobs",), NAMES], ids="+".join)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck(trained, outputs, backend):
    kwargs = double(reference.sample((2, 3), 9, 4))

    def call(*values):
        out = rlhf_fast.linear_token_logprobs(
            **{**kwargs, **dict(zip(trained, values, strict=True))},
            temperature=0.8,
            softcap=5.0,
            chunk_bytes=300,
        )
        return tuple(getattr(out, name) for name in outputs)

    with rlhf_fast.use_backend(backend):
        inputs = [kwargs[k].clone().requires_grad_() for k in trained]
        assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_opcheck(backend):
    op = torch.ops.rlhf_fast.linear_token_logprobs.default
    order = (
        "hidden",
        "weight",
        "bias",
        "token_ids",
        "mask",
        "temperature",
        "ref_hidden",
        "ref_weight",
        "ref_bias",
    )
    with rlhf_fast.use_backend(backend):
        for trained in ((), ("hidden",), ("hidden", "weight", "bias")):
            kwargs = leaves(reference.sample((2, 3), 17, 5), trained)
            opcheck(op, (*map(kwargs.get, order), 0.7, 0.0, 300, bool(trained), [trained == ("hidden",)] * 4))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids="+".join)
def test_compile_gives_the_eager_result_and_gradient(trained, backend):
    kwargs = leaves(reference.sample((2, 3), 17, 5), trained)

    def call(*_):
        out = rlhf_fast.linear_token_logprobs(**kwargs, directions=("logprobs", "entropy"))
        return out.logprobs.square().sum() + out.entropy.sum()

    inputs = [kwargs[k] for k in trained]
    with rlhf_fast.use_backend(backend):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), call(*inputs))
        for a, b in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (call, compiled)), strict=True):
            torch.testing.assert_close(a, b)


def test_strided_hidden_states():
    kwargs = reference.sample((3, 8), 50, 12)
    expected = results(kwargs, ("hidden",))
    wide = torch.randn(3, 9, 20)
    wide[:, :8, 3:15] = kwargs["hidden"]
    strided = {**kwargs, "hidden": wide[:, :8, 3:15], "weight": kwargs["weight"].t().contiguous().t()}
    for a, b in zip(expected, results(strided, ("hidden",)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_second_derivative_and_changed_inputs_are_errors():
    kwargs = leaves(reference.sample(), ("hidden",))
    out = rlhf_fast.linear_token_logprobs(**kwargs).logprobs.sum()
    (first,) = torch.autograd.grad(out, kwargs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_token_logprobs: the second derivative is not available"):
        first.square().sum().backward()
    out = rlhf_fast.linear_token_logprobs(**kwargs).entropy.sum()
    kwargs["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_reference_and_temperature_get_no_gradient():
    kwargs = leaves(reference.sample(), ("hidden", "ref_hidden", "ref_weight"))
    kwargs["temperature"] = torch.ones(4, 9, requires_grad=True)
    for backend in ("cpp", "reference"):
        with rlhf_fast.use_backend(backend):
            rlhf_fast.linear_token_logprobs(**kwargs).kl.sum().backward()
    assert kwargs["hidden"].grad is not None
    assert all(kwargs[k].grad is None for k in ("ref_hidden", "ref_weight", "temperature"))


def test_inference_mode_and_autocast_give_the_same_numbers():
    kwargs = reference.sample()
    expected = rlhf_fast.linear_token_logprobs(**kwargs)
    with torch.inference_mode():
        assert torch.equal(rlhf_fast.linear_token_logprobs(**kwargs).logprobs, expected.logprobs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rlhf_fast.linear_token_logprobs(**kwargs)
        assert got.logprobs.dtype is torch.float32 and torch.equal(got.kl, expected.kl)


def test_meta_tensors_have_shapes_and_no_data():
    out = rlhf_fast.linear_token_logprobs(
        torch.zeros(2, 3, 8, device="meta", dtype=torch.bfloat16),
        torch.zeros(50, 8, device="meta"),
        torch.zeros(2, 3, device="meta", dtype=torch.int64),
    )
    assert out.entropy.shape == (2, 3) and out.entropy.is_meta and out.entropy.dtype is torch.float32
