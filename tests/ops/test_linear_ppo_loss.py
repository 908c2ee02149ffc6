from __future__ import annotations

import pytest
import tolerances
import torch
from parity import assert_parity, double
from torch.library import opcheck
from watch import Watch

import rlhf_fast
from rlhf_fast import linear_ppo_loss, linear_token_logprobs, ppo_loss
from rlhf_fast.bench.engine import peak_extra_bytes
from rlhf_fast.dialects import DIALECTS
from rlhf_fast.ops._matmul import pitch
from rlhf_fast.reference import linear_ppo_loss as reference
from rlhf_fast.reference._reduce import REDUCTIONS

LEAVES = ("hidden", "weight", "bias", "values")
HEAD = ("hidden", "weight", "token_ids", "bias", "mask", "temperature", "softcap", "chunk_bytes")
FULL = {"entropy_coef": 0.01, "kl_coef": 0.1}
SIZE = (4, 9, 127, 24)
"""B, T, V, H of the sample."""


def leaves(kwargs, trained):
    return {k: v.detach().clone().requires_grad_() if k in trained else v for k, v in kwargs.items()}


def run(kwargs, trained=LEAVES, backend="cpp", function=linear_ppo_loss, **options):
    """loss, stats and, as "d <leaf>", the gradients of the leaves that are there, for an upstream gradient of 1.7.

    explained_variance becomes the share it is 1 minus: the subtraction would be compared as an error of its result.
    """
    trained = [k for k in trained if k in kwargs]
    inputs = leaves(kwargs, trained)
    with rlhf_fast.use_backend(backend):
        out = function(**inputs, **options)
        grads = torch.autograd.grad(1.7 * out.loss, [inputs[k] for k in trained]) if trained else ()
    found = {"loss": out.loss.detach(), **out.stats, **{f"d {k}": g for k, g in zip(trained, grads, strict=True)}}
    return {**found, "explained_variance": 1 - found["explained_variance"]}


def two_ops(**kwargs):
    """The same loss in two steps."""
    head = {k: kwargs.pop(k) for k in HEAD if k in kwargs}
    found = linear_token_logprobs(**head)
    return ppo_loss(found.logprobs, mask=head["mask"], entropy=found.entropy, **kwargs)


def check(kwargs, trained=LEAVES, **options):
    got = run(kwargs, trained, **options)
    options.pop("chunk_bytes", None)
    truth, plain = (run(k, trained, "reference", **double(options)) for k in (double(kwargs), kwargs))
    assert got.keys() == truth.keys()
    for name, x in got.items():
        if x.dtype is torch.float64:
            assert (x - truth[name]).abs().max() <= tolerances.DOUBLE * max(1.0, float(truth[name].abs().max())), name
        else:
            # Means of differences of log-probs and of terms of both signs are compared at the size of a term, 1.
            size = float(truth[name].abs().max()) if x.numel() else 1.0
            assert_parity(x, truth[name], plain[name], name, scale=size if x.dim() else max(1.0, size))
    return got


def unmasked(kwargs):
    return {**kwargs, "mask": torch.ones_like(kwargs["mask"]), "token_ids": kwargs["token_ids"].clamp(0)}


# One row a chunk, a few rows with a ragged last chunk, all rows.
@pytest.mark.parametrize("chunk_bytes", [1, 127 * 4 * 7, None], ids=str)
@pytest.mark.parametrize(
    "trained", [("hidden",), ("weight",), ("bias",), ("values",), ("hidden", "values"), LEAVES], ids="+".join
)
def test_parity(chunk_bytes, trained):
    check(reference.sample(), trained, chunk_bytes=chunk_bytes, **FULL)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalizer", [None, 11.0, torch.tensor(11.0)], ids=str)
def test_parity_of_the_reductions_padded_and_packed(reduction, normalizer):
    kwargs = reference.sample((5, 9))
    kwargs["mask"][2] = False
    options = {"reduction": reduction, "normalizer": normalizer, "chunk_bytes": 127 * 4 * 7, **FULL}
    padded = check(kwargs, **options)
    lengths = torch.tensor([9, 0, 3, 1, 9])
    inside = torch.arange(9)[None] < lengths[:, None]
    kwargs["mask"] &= inside
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    packed = {k: v if k in ("weight", "bias") else v[inside] for k, v in kwargs.items()}
    got, padded = check(packed, cu_seqlens=cu_seqlens, **options), run(kwargs, **options)
    for name in ("loss", "d weight", "d bias"):
        torch.testing.assert_close(got[name], padded[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["d hidden"], padded["d hidden"][inside], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=str)
def test_parity_in_every_dtype(dtype, options):
    kwargs = reference.sample((3, 5), 300, dtype=dtype)
    got = check(kwargs, chunk_bytes=9000, **options, **FULL)
    assert got["loss"].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert all(got[f"d {k}"].dtype is dtype for k in LEAVES)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": torch.linspace(0.5, 1.5, 36).view(4, 9)},
        {"clip": (0.1, 0.3), "dual_clip": 1.2},
        {"kl_kind": "k2", "kl_coef": 0.3},
        {"kl_kind": "k3+", "kl_coef": 0.3, "entropy_coef": 0.5},
        {"value_clip": None, "value_coef": 0.5},
        *({"dialect": name, **FULL} for name in DIALECTS),
    ],
    ids=str,
)
def test_parity_of_the_options(options):
    check(reference.sample(), chunk_bytes=127 * 4 * 7, **options)


@pytest.mark.parametrize("missing", ["bias", "ref_logprobs", "values", "old_values", "importance_weights"])
def test_parity_without_a_tensor(missing):
    kwargs = reference.sample()
    del kwargs[missing]
    if missing == "values":
        del kwargs["returns"], kwargs["old_values"]
    check(kwargs, kl_coef=0.0 if missing == "ref_logprobs" else 0.1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 0), (0, 3), (2, 2, 3), (7,)], ids=str)
def test_shapes(shape):
    kwargs = unmasked(reference.sample(shape, 33, 8))
    assert check(kwargs, chunk_bytes=600)["d hidden"].shape == (*shape, 8)


def test_an_advantage_per_sequence_and_mixed_dtypes():
    kwargs = reference.sample()
    each = kwargs["advantages"][:, 0]
    spread = run({**kwargs, "advantages": each[:, None].expand(4, 9)}, **FULL)
    got = run({**kwargs, "advantages": each}, **FULL)
    assert all(torch.equal(got[k], spread[k]) for k in got)
    plain = run(kwargs, **FULL)
    mixed = run({**kwargs, "old_logprobs": kwargs["old_logprobs"].double()}, **FULL)
    assert mixed["loss"].dtype is torch.float64 and mixed["d hidden"].dtype is torch.float32
    for name, x in mixed.items():
        torch.testing.assert_close(x.float(), plain[name], rtol=1e-5, atol=1e-6)
    half = {**kwargs, "weight": kwargs["weight"].bfloat16()}
    wide = run({**half, "weight": half["weight"].float()}, **FULL)
    for name, x in run(half, chunk_bytes=127 * 4 * 7, **FULL).items():
        coarse = {"rtol": 2 * tolerances.FLOOR[torch.bfloat16], "atol": 1e-5} if x.dtype is torch.bfloat16 else {}
        torch.testing.assert_close(x, wide[name].to(x.dtype), **(coarse or {"rtol": 1e-5, "atol": 1e-6}))


@pytest.mark.parametrize("chunk_bytes", [1, 127 * 4 * 7, None], ids=str)
@pytest.mark.parametrize("trained", [(), ("hidden",), LEAVES], ids=lambda t: "+".join(t) or "none")
def test_loss_and_statistics_have_the_bits_of_the_two_ops(chunk_bytes, trained):
    kwargs = reference.sample()
    options = {"chunk_bytes": chunk_bytes, "reduction": "seq-mean-token-mean", "temperature": 0.7, **FULL}
    one, two = (run(kwargs, trained, function=f, **options) for f in (linear_ppo_loss, two_ops))
    for name, x in one.items():
        if name.startswith("d "):
            torch.testing.assert_close(x, two[name], rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(x, two[name]), name


@pytest.mark.parametrize("coef", [0.0, 0.01])
@pytest.mark.parametrize(
    ("trained", "per_chunk"),
    [((), 1), (("values",), 1), (("bias",), 1), (("hidden",), 2), (("weight",), 2), (LEAVES, 3)],
)
def test_matrix_products(trained, per_chunk, coef):
    """One for the logits and one for each gradient, with or without an entropy bonus, and none in the backward."""
    B, T, V, H = SIZE
    kwargs = leaves(unmasked(reference.sample()), trained)
    kwargs["old_logprobs"] = linear_token_logprobs(
        *(kwargs[k] for k in HEAD[:3]), bias=kwargs["bias"]
    ).logprobs.detach()
    for chunks, chunk_bytes in ((1, None), (4, 9 * 4 * (pitch(V) + 3 * H))):
        n = B * T // chunks
        with Watch() as watch:
            loss = linear_ppo_loss(**kwargs, entropy_coef=coef, chunk_bytes=chunk_bytes).loss
            if trained:
                torch.autograd.grad(loss, [kwargs[k] for k in trained])
        products = watch.products()
        assert len(products) == per_chunk * chunks and products[0] == [(n, H), (H, V)]
        assert ([(n, V), (V, H)] in products) == ("hidden" in trained)
        assert ([(V, n), (n, H)] in products) == ("weight" in trained)


def test_rows_without_gradient_are_left_out_of_the_products_of_the_gradients():
    kwargs = unmasked(reference.sample())
    kwargs["advantages"][0] = 0.0  # nothing to learn from a whole sequence
    kwargs["advantages"][2, 3:8] = 0.0
    kwargs["advantages"][3, 8] = 0.0
    kwargs["old_logprobs"] = linear_token_logprobs(*(kwargs[k] for k in HEAD[:3]), bias=kwargs["bias"]).logprobs
    B, T, V, H = SIZE
    for chunk_bytes in (None, 9 * 4 * (pitch(V) + 3 * H)):
        for temperature in (1.0, torch.ones(B, T)):
            trained = leaves(kwargs, LEAVES)
            with Watch() as watch:
                linear_ppo_loss(**trained, chunk_bytes=chunk_bytes, temperature=temperature).loss.backward()
            rows = [shapes[0][0] for shapes in watch.products() if shapes[1] == (V, H)]
            assert rows == ([21] if chunk_bytes is None else [9, 4, 8])
            check(kwargs, chunk_bytes=chunk_bytes, temperature=temperature)
    kwargs["advantages"][:] = 0.0
    found = check(kwargs)
    assert not any(found[f"d {k}"].any() for k in LEAVES[:3])


def test_masked_rows_are_never_multiplied_or_read():
    kwargs = reference.sample()
    clean = run(kwargs, **FULL)
    bad = ~kwargs["mask"]
    for poison in (float("nan"), float("inf"), -1e30):
        dirty = {k: v.clone() for k, v in kwargs.items()}
        for k, v in dirty.items():
            if v.is_floating_point() and k not in ("weight", "bias"):
                v[bad] = poison
        dirty["token_ids"][bad] = 2**40
        got = run(dirty, temperature=torch.ones(4, 9).masked_fill(bad, float("nan")), **FULL)
        assert all(torch.equal(got[k], clean[k]) for k in clean)
    assert not clean["d hidden"][bad].any()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_everything_masked_gives_zero(reduction, backend):
    kwargs = reference.sample()
    kwargs["mask"][:] = False
    got = run(kwargs, backend=backend, reduction=reduction, **FULL)
    assert all(not v.any() for k, v in got.items() if k != "explained_variance")


def test_a_nan_on_a_real_token_reaches_only_the_gradient_of_its_own_state():
    kwargs = unmasked(reference.sample())
    clean = run(kwargs, ("hidden",), **FULL)
    kwargs["advantages"][1, 5] = float("nan")
    got = run(kwargs, ("hidden",), **FULL)
    assert got["loss"].isnan() and got["d hidden"][1, 5].isnan().all()
    others = torch.ones(4, 9, dtype=torch.bool)
    others[1, 5] = False
    torch.testing.assert_close(got["d hidden"][others], clean["d hidden"][others])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_that_share_a_normalizer_add_up(reduction):
    kwargs = reference.sample((8, 9))
    normalizer = float(kwargs["mask"].sum())
    whole = run(kwargs, reduction=reduction, normalizer=normalizer, **FULL)
    parts = [
        run(
            {k: v if k in ("weight", "bias") else v[rows] for k, v in kwargs.items()},
            reduction=reduction, normalizer=normalizer, **FULL,
        )
        for rows in (slice(0, 3), slice(3, 8))
    ]  # fmt: skip
    for name in ("loss", "d weight", "d bias"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-5, atol=1e-6)
    for name in ("d hidden", "d values"):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), whole[name], rtol=1e-5, atol=1e-6)


def test_gradients_too_small_for_fp16_survive_until_they_are_scaled():
    """A loss scaler multiplies the loss, so the upstream gradient arrives after the gradients were found."""
    kwargs = leaves(unmasked(reference.sample(dtype=torch.float16)), LEAVES)
    scale, tiny = 2.0**16, 2.0**-22
    linear_ppo_loss(**kwargs, normalizer=36 / tiny).loss.mul(scale).backward()
    plain = run(kwargs, normalizer=36.0)
    for k in LEAVES:
        expected = plain[f"d {k}"].double() / 1.7 * scale * tiny
        torch.testing.assert_close(kwargs[k].grad.double(), expected, rtol=2e-3, atol=2e-7)
        assert kwargs[k].grad.any()


@pytest.mark.parametrize("trained", [(), ("hidden",), LEAVES], ids=lambda t: "+".join(t) or "none")
def test_no_tensor_is_larger_than_the_budget(trained):
    """64 rows of 2000 classes are 512 KB of logits; the budget is 64 KiB."""
    kwargs = leaves(reference.sample((2, 32), 2000, 4), trained)
    budget = 64 << 10
    with Watch() as watch:
        loss = linear_ppo_loss(**kwargs, chunk_bytes=budget, **FULL).loss
        if trained:
            torch.autograd.grad(loss, [kwargs[k] for k in trained])
    assert len(watch.products()) >= 6 and budget // 2 <= max(size for *_, size in watch.calls) <= budget
    torch.testing.assert_close(loss, linear_ppo_loss(**kwargs, **FULL).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory(dtype):
    """Budget, and for each state its gradient twice: before and after it is scaled. 512 MiB of logits in whole."""
    shape, V, H, budget = (16, 256), 32768, 256, 48 << 20
    kwargs = reference.sample(shape, 64, H, dtype=dtype)
    kwargs["weight"] = torch.randn(V, H).mul_(H**-0.5).to(dtype)
    del kwargs["bias"]

    def step():
        x = leaves(kwargs, ("hidden",))
        linear_ppo_loss(**x, chunk_bytes=budget, entropy_coef=0.01).loss.backward()

    step()  # pages of the libraries
    leaf, slack = shape[0] * shape[1] * H * kwargs["hidden"].itemsize, 4 << 20
    assert peak_extra_bytes(step) <= budget + 2 * shape[0] * shape[1] * H * 4 + leaf + slack


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [127, -1, 2**40])
def test_token_id_out_of_range_is_refused_before_any_product(bad, backend, monkeypatch):
    kwargs = unmasked(reference.sample())
    kwargs["token_ids"][2, 1] = bad
    if backend == "cpp":
        monkeypatch.setattr(torch, "mm", lambda *_, **__: pytest.fail("a product was computed"))
    message = rf"linear_ppo_loss: argument 'token_ids' got {bad} at row 19, expected a token id in \[0, 127\)"
    with rlhf_fast.use_backend(backend), pytest.raises(ValueError, match=message):
        linear_ppo_loss(**kwargs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 9, 24, dtype=torch.int64)}, "'hidden' got torch.int64, expected one of float32"),
        ({"weight": torch.zeros(127, 23)}, r"'weight' got shape \(127, 23\), expected \(V, H\)"),
        ({"bias": torch.zeros(126)}, r"'bias' got shape \(126,\), expected \(127,\)"),
        ({"token_ids": torch.zeros(4, 8, dtype=torch.int64)}, r"'token_ids' got shape \(4, 8\), expected \(4, 9\)"),
        ({"temperature": 0.0}, "'temperature' got 0.0"),
        ({"temperature": torch.zeros(4, 9)}, "'temperature' got 0.0 at row"),
        ({"softcap": -1.0}, "'softcap' got -1.0"),
        ({"chunk_bytes": 0}, "'chunk_bytes' got 0"),
        ({"mask": None}, "'mask' got None"),
        ({"mask": torch.ones(4, 8, dtype=torch.bool)}, r"'mask' got shape \(4, 8\)"),
        ({"old_logprobs": torch.zeros(4, 8)}, r"'old_logprobs' got shape \(4, 8\), expected \(4, 9\) \(the shape of token_ids"),
        ({"old_logprobs": None}, "'old_logprobs' got NoneType"),
        ({"advantages": torch.zeros(5)}, r"'advantages' got shape \(5,\)"),
        ({"values": None}, "'values' got NoneType"),
        ({"ref_logprobs": None, "kl_coef": 0.1}, "'ref_logprobs' got None, expected a tensor with kl_coef=0.1"),
        ({"entropy_coef": -0.1}, "'entropy_coef' got -0.1"),
        ({"clip": (0.2, 0.0)}, "'clip' got 0.0"),
        ({"dual_clip": 1.0}, "'dual_clip' got 1.0"),
        ({"kl_kind": "k4"}, "'kl_kind' got 'k4'"),
        ({"reduction": "mean"}, "'reduction' got 'mean'"),
        ({"dialect": "ours"}, "'dialect' got 'ours'"),
        ({"normalizer": 0.0}, "'normalizer' got 0.0"),
        ({"cu_seqlens": torch.tensor([0, 36])}, r"'token_ids' got shape \(4, 9\), expected \(N,\) with cu_seqlens"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=f"linear_ppo_loss: argument {message}"):
        linear_ppo_loss(**{**reference.sample(), **change})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck(reduction, backend):
    kwargs = double(reference.sample((2, 3), 9, 4))
    inputs = [kwargs.pop(k).requires_grad_() for k in LEAVES]

    def call(hidden, weight, bias, values):
        return linear_ppo_loss(
            hidden, weight, bias=bias, values=values, **kwargs, **FULL, temperature=0.8, softcap=5.0, chunk_bytes=200,
            reduction=reduction, dual_clip=1.5,
        ).loss  # fmt: skip

    with rlhf_fast.use_backend(backend):
        assert torch.autograd.gradcheck(call, inputs, **tolerances.GRADCHECK)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("trained", [(), ("hidden",), ("values",), LEAVES], ids=lambda t: "+".join(t) or "none")
def test_opcheck(backend, trained):
    kwargs = leaves(reference.sample((2, 3), 17, 5), trained)
    tensors = [
        kwargs.get(k)
        for k in (
            "hidden", "weight", "bias", "token_ids", "mask", "temperature", "old_logprobs", "advantages", "ref_logprobs",
            "values", "old_values", "returns", "importance_weights",
        )
    ]  # fmt: skip
    numbers = (0.8, 5.0, 0.2, 0.2, 3.0, 20.0, 0.01, 0.1, "k3", 20.0, 10.0, 0.2, 0.1, "seq-mean-token-mean", 0.0, 300)
    wanted = [k in trained for k in LEAVES]
    with rlhf_fast.use_backend(backend):
        opcheck(torch.ops.rlhf_fast.linear_ppo_loss.default, (*tensors, None, None, *numbers, wanted))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("trained", [("hidden",), LEAVES], ids="+".join)
def test_compile_gives_the_eager_result_and_gradient(trained, backend):
    kwargs = leaves(reference.sample((2, 3), 17, 5), trained)
    inputs = [kwargs[k] for k in trained]
    call = lambda *_: linear_ppo_loss(**kwargs, **FULL).loss * 3
    with rlhf_fast.use_backend(backend):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), call(*inputs))
        for a, b in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (call, compiled)), strict=True):
            torch.testing.assert_close(a, b)


def test_two_backward_calls_agree_and_leave_the_saved_gradients_alone():
    kwargs = leaves(reference.sample(), LEAVES)
    inputs = [kwargs[k] for k in LEAVES]
    loss = linear_ppo_loss(**kwargs, **FULL).loss
    first = [g.clone() for g in torch.autograd.grad(loss, inputs, retain_graph=True)]
    for upstream in (1, 3):
        for g in torch.autograd.grad(upstream * loss, inputs, retain_graph=True):
            g.fill_(7.0)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_last_backward_scales_the_gradient_of_the_weight_where_it_is():
    kwargs = leaves(reference.sample((4, 9), 2000, 24), ("weight",))
    loss = linear_ppo_loss(**kwargs).loss
    kept = loss.grad_fn.saved_tensors[0]
    pointer = kept.data_ptr()
    del kept
    (3 * loss).backward()
    assert kwargs["weight"].grad.data_ptr() == pointer
    torch.testing.assert_close(kwargs["weight"].grad * 1.7 / 3, run(kwargs, ("weight",))["d weight"])


def test_only_hidden_weight_bias_and_values_get_a_gradient():
    for backend in ("cpp", "reference"):
        kwargs = reference.sample()
        kwargs = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in kwargs.items()}
        kwargs["temperature"] = torch.ones(4, 9, requires_grad=True)
        with rlhf_fast.use_backend(backend):
            linear_ppo_loss(**kwargs, **FULL).loss.backward()
        assert all((v.grad is not None) == (k in LEAVES) for k, v in kwargs.items() if v.is_floating_point())
    assert not linear_ppo_loss(**reference.sample()).loss.requires_grad


def test_second_derivative_is_an_error():
    kwargs = leaves(reference.sample(), ("hidden",))
    (first,) = torch.autograd.grad(linear_ppo_loss(**kwargs).loss, kwargs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_ppo_loss: the second derivative is not available"):
        first.square().sum().backward()


def test_inputs_changed_after_the_forward_do_not_matter_and_are_not_changed_by_it():
    grads = []
    for change in (0.0, 5.0):
        kwargs = leaves(reference.sample(), LEAVES)
        copies = {k: v.detach().clone() for k, v in kwargs.items()}
        loss = linear_ppo_loss(**kwargs, **FULL).loss
        with torch.no_grad():
            assert all(torch.equal(kwargs[k], copies[k]) for k in kwargs)
            for k in LEAVES:
                kwargs[k].add_(change)
        loss.backward()
        grads.append([kwargs[k].grad for k in LEAVES])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_strided_inputs():
    kwargs = reference.sample((3, 8))
    expected = run(kwargs, **FULL)
    wide = torch.randn(3, 9, 40)
    wide[:, :8, 3:27] = kwargs["hidden"]
    strided = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in kwargs.items()}
    strided["hidden"] = wide[:, :8, 3:27]
    for name, x in run(strided, **FULL).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", [unmasked, dict], ids=["unmasked", "masked"])
def test_grad_mode_inference_mode_and_autocast(change):
    kwargs = leaves(change(reference.sample()), LEAVES)
    expected = linear_ppo_loss(**kwargs, **FULL)
    with torch.inference_mode():
        assert torch.equal(linear_ppo_loss(**kwargs, **FULL).stats.tensor, expected.stats.tensor)
    with torch.no_grad():
        assert not linear_ppo_loss(**kwargs, **FULL).loss.requires_grad
    inputs = [kwargs[k] for k in LEAVES]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_ppo_loss(**kwargs, **FULL)
        grads = torch.autograd.grad(got.loss, inputs)
    assert torch.equal(got.stats.tensor, expected.stats.tensor)
    assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(expected.loss, inputs), strict=True))


def test_meta_tensors_have_shapes_and_no_data():
    kwargs = {k: v.to("meta") for k, v in reference.sample(dtype=torch.bfloat16).items()}
    out = linear_ppo_loss(**kwargs)
    assert out.loss.is_meta and out.loss.dtype is torch.float32 and out.loss.shape == ()
    assert out.stats.tensor.shape == (len(rlhf_fast.reference.ppo_loss.STATS),)
