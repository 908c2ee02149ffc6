"""The Triton kernels of token_logprobs under the access checker: every access, every program order, every bit."""

from __future__ import annotations

import itertools

import pytest
import tolerances
import torch
from gpu.tools.on_cpu import on_cpu
from gpu.tools.sanitizer import Sanitizer
from parity import assert_parity, double
from rlhf_fast.kernels import token_logprobs as kernels
from token_parity import NAMES, stats

import rlhf_fast
from rlhf_fast.ops.token_logprobs import forward as cpp_forward
from rlhf_fast.ops.token_logprobs import state_shape
from rlhf_fast.reference import token_logprobs as reference

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = ("forward", "reverse", "shuffle")


def through_triton(call, order="shuffle"):
    """call() with the Triton cells in place of the C++ kernels."""
    with Sanitizer(order=order, seed=1) as s, on_cpu("triton"):
        found = call()
    s.check()
    assert s.launches
    return found


def parity(kwargs, **options):
    got = through_triton(lambda: stats(kwargs, **options))
    with rlhf_fast.use_backend("reference"):
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        truth, plain = stats(double(kwargs), **wide), stats(kwargs, **options)
    names = [n for n in (*NAMES, "gradient") if n != "kl" or "ref_logits" in kwargs]
    for g, t, p, name in zip(got, truth, plain, names, strict=True):
        assert_parity(g, t, p, name)
    return got


def padded(x, gap=5, front=3):
    """x as a view of rows with NaN before, between and after them."""
    room = torch.full((*x.shape[:-1], front + x.shape[-1] + gap), NAN, dtype=x.dtype)
    room[..., front : front + x.shape[-1]] = x
    return room[..., front : front + x.shape[-1]]


# 1, 2: below any tile; 127: one tile and a mask; 1000, 1024: whole tiles of a small program, with and without a rest;
# 50257: whole tiles of a large one at odd addresses; 151936: at addresses for wide loads.
@pytest.mark.parametrize("V", [1, 2, 127, 1000, 1024, 50257, 151936])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(V, dtype):
    rows = 5 if V < 5000 else 2 if V < 100_000 else 1
    kwargs = reference.sample((rows,), V, dtype=dtype)
    if rows < 5:
        kwargs["mask"], kwargs["token_ids"] = None, kwargs["token_ids"].clamp(0)
    parity(kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"softcap": 5.0}, {"temperature": 0.3}, {"softcap": 30.0, "temperature": torch.linspace(0.4, 2.0, 12).view(3, 4)}],
    ids=["softcap", "temperature", "both"],
)
def test_parity_with_soft_cap_and_temperature(dtype, options):
    parity(reference.sample((3, 4), 261, dtype=dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 1500, 50257])
def test_no_reference_and_no_mask(dtype, V):
    kwargs = reference.sample((3,) if V < 5000 else (1,), V, dtype=dtype, ref=False)
    kwargs["mask"], kwargs["token_ids"] = None, kwargs["token_ids"].clamp(0)
    parity(kwargs)


def inputs(
    V=300, rows=6, dtype=torch.float32, ref=True, temperature=True, mask=True, softcap=0.0, pad=True, ids=torch.int64
):
    """Positional arguments of the forward cell but the last, rows of NaN where the mask is False."""
    k = reference.sample((rows,), V, dtype=dtype, ref=ref, seed=2)
    real = torch.arange(rows) % 3 != 1
    if mask:
        for name in ("logits", "ref_logits"):
            if name in k:
                k[name][~real] = NAN
        k["token_ids"][~real] = -(2**31)
    k["token_ids"] = torch.where(real, k["token_ids"].clamp(0), k["token_ids"]).to(ids)
    if not mask:
        k["token_ids"] = k["token_ids"].clamp(0)
    per_token = torch.linspace(0.5, 1.5, rows)
    if mask:
        per_token[~real] = NAN
    fix = padded if pad else (lambda x: x)
    ref_logits = fix(k["ref_logits"]) if ref else None
    return (
        fix(k["logits"]), k["token_ids"], real if mask else None, per_token if temperature else None, ref_logits, 0.8, softcap,
    )  # fmt: skip


def run_cells(args, grads, order="forward", keep=True):
    """(forward's results, gradient, sanitizer) of the cells themselves, with results allocated under the checker."""
    logits, ids, mask, temperature, ref, value, cap = args
    with Sanitizer(order=order, seed=3) as s:
        out = kernels.forward(*args, keep)
        grad = kernels.backward(logits, ids, out[4], mask, temperature, ref, *grads, value, cap) if keep else None
        left = sum(s.unwritten(x) for x in (*out, grad) if x is not None)
    s.check()
    assert left == 0
    return out, grad, s


def upstream(rows, which=range(4)):
    g = torch.Generator().manual_seed(4)
    drawn = [torch.randn(rows, generator=g) for _ in range(4)]
    return [x if i in which else None for i, x in enumerate(drawn)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "V, softcap, ref", [(1, 0.0, True), (2, 0.0, False), (127, 4.0, True), (1030, 4.0, False), (5001, 0.0, True)]
)
def test_accesses_program_order_and_rows_alone(dtype, V, softcap, ref):
    """No order of the programs and no neighbour shows in the bits; gaps between rows and masked rows are never touched."""
    args = inputs(V, dtype=dtype, softcap=softcap, ref=ref)
    grads = upstream(6, range(4) if ref else range(3))
    first, grad, _ = run_cells(args, grads)
    first = [x for x in first if x is not None]
    masked = ~args[2]
    assert all(not x[masked].any() for x in (*first, grad)) and first[0].isfinite().all() and grad.isfinite().all()
    for order in ORDERS[1:]:
        again, grad_again, _ = run_cells(args, grads, order)
        again = [x for x in again if x is not None]
        assert torch.equal(grad, grad_again) and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for i in (0, 3, 5):
        one = [x[i : i + 1].clone() if isinstance(x, torch.Tensor) else x for x in args]  # contiguous, another address
        alone, grad_alone, _ = run_cells(one, [None if g is None else g[i : i + 1] for g in grads])
        alone = [x for x in alone if x is not None]
        assert torch.equal(grad[i : i + 1], grad_alone)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(first, alone, strict=True))


@pytest.mark.parametrize("which", [c for n in range(5) for c in itertools.combinations(range(4), n)], ids=str)
def test_every_subset_of_upstream_gradients(which):
    """A gradient that is not given is one of 0: the terms without it are left out."""
    args = inputs(140, rows=4)
    grads = upstream(4, which)
    for grad in grads:
        if grad is not None:
            grad[3] = 0.0
    _, got, _ = run_cells(args, grads)
    kwargs = {"logits": args[0], "token_ids": args[1], "mask": args[2], "ref_logits": args[4]}

    def gradient(kwargs, temperature):
        z = kwargs["logits"].detach().clone().requires_grad_()
        out = rlhf_fast.token_logprobs(**{**kwargs, "logits": z}, temperature=temperature)
        total = sum((x * g.to(x.dtype)).sum() for x, g in zip(out, grads, strict=True) if g is not None)
        return torch.autograd.grad(total, z)[0] if which else torch.zeros_like(z)

    with rlhf_fast.use_backend("reference"):
        truth = gradient(double(kwargs), args[3].double())
        assert_parity(got, truth, gradient(kwargs, args[3]), "gradient")
    assert not got[3].any() or not which


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [127, 5000])
def test_gradient_may_take_the_place_of_the_logits(dtype, V):
    args = inputs(V, dtype=dtype, softcap=3.0)
    grads = upstream(6)
    first, expected, _ = run_cells(args, grads)
    place = padded(args[0].clone())
    with Sanitizer(order="shuffle", seed=5) as s:
        found = kernels.backward_into(place, place, args[1], first[4], args[2], args[3], args[4], grads, *args[5:])
    s.check()
    assert found is place and torch.equal(place, expected)
    around = torch.as_strided(place, (6, V + 8), (V + 8, 1), 0)
    assert around[:, :3].isnan().all() and around[:, -5:].isnan().all()


def test_gradient_of_wide_logits_in_bf16():
    args = inputs(600)
    grads = upstream(6)
    first, expected, _ = run_cells(args, grads)
    narrow = padded(torch.zeros(6, 600, dtype=torch.bfloat16))
    with Sanitizer() as s:
        kernels.backward_into(narrow, args[0], args[1], first[4], args[2], args[3], args[4], grads, *args[5:])
    s.check()
    assert torch.equal(narrow, expected.bfloat16())


def minimum(args, keep=True):
    """Bytes the forward has to move, and the backward with all gradients given."""
    logits, ids, mask, temperature, ref, *_ = args
    real = len(ids) if mask is None else int(mask.sum())
    width = logits.element_size()
    row = (logits.shape[-1] + 1) * width  # the logit of the target once more
    if ref is not None:
        row_back, row = 2 * row, row + logits.shape[-1] * width
    else:
        row_back = row
    about = ids.element_size() + (0 if temperature is None else 4)
    masks = 0 if mask is None else len(ids)
    results, state = (4, 6) if ref is not None else (3, 3)
    forward = (real * (row + about) + masks, len(ids) * 4 * (results + state * keep))
    backward = (
        real * (row_back + about + 4 * results + 4 * state) + masks,
        len(ids) * logits.shape[-1] * width + real * width,
    )
    return forward, backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1024, 50257])
@pytest.mark.parametrize("ref", [False, True], ids=["alone", "ref"])
def test_each_pass_is_one_launch_that_reads_every_logit_once(dtype, V, ref):
    args = inputs(V, rows=3, dtype=dtype, ref=ref, pad=False)
    grads = upstream(3, range(4) if ref else range(3))
    _, _, s = run_cells(args, grads)
    assert [launch.kernel for launch in s.launches] == [
        "token_logprobs_kernel",
        "token_logprobs_backward_kernel",
    ]
    for launch, (loads, stores) in zip(s.launches, minimum(args), strict=True):
        assert launch.load_bytes == loads and launch.store_bytes == stores
        assert launch.atomic_bytes == 0
    exponentials = s.launches[0].ops["exp2"]
    lanes = 2048 if V > 4096 else 256
    rows = int(args[2].sum())
    covered = -(-V // lanes) * lanes  # the last tile is computed whole
    assert covered * rows * (2 if ref else 1) <= exponentials <= 1.01 * covered * rows * (2 if ref else 1) + 64 * lanes


def test_forward_without_state_writes_none():
    args = inputs(300, ref=False)
    out, _, s = run_cells(args, None, keep=False)
    assert out[3] is None and out[4] is None and len(s.launches) == 1
    assert s.launches[0].store_bytes == minimum(args, keep=False)[0][1]


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_token_ids_of_two_widths(ids):
    wide, narrow = (run_cells(inputs(300, ids=x), upstream(6)) for x in (torch.int64, ids))
    assert torch.equal(wide[1], narrow[1]) and all(torch.equal(a, b) for a, b in zip(wide[0], narrow[0], strict=True))


def test_strided_rows_are_read_in_place_with_the_same_bits():
    k = reference.sample((3, 4), 75)
    expected = through_triton(lambda: stats(k))
    wide, odd = torch.full((3, 5, 80), NAN), torch.full((4, 5, 78), NAN)
    wide[:, :4, :75], odd[1:, 1:, 3:] = k["logits"], k["ref_logits"]
    for logits in (wide[:, :4, :75], k["logits"].transpose(0, 1).contiguous().transpose(0, 1)):
        with Sanitizer(order="reverse") as s, on_cpu("triton"):
            out = kernels.forward(logits, k["token_ids"], k["mask"], None, odd[1:, 1:, 3:], 1.0, 0.0, False)
        s.check()
        assert all(torch.equal(a, b) for a, b in zip(expected[:4], out[:4], strict=True))


def test_aligned_rows_have_the_bits_of_others():
    """The hint about wide loads changes how a row is loaded, and nothing else."""
    k = reference.sample((2,), 4800, dtype=torch.bfloat16)
    k["mask"], k["token_ids"] = None, k["token_ids"].clamp(0)
    assert kernels._vectors(k["logits"], k["ref_logits"], [2, 0, 4800, 0, 4800]) == {"VECTOR": 8, "REF_VECTOR": 8}
    moved = {name: padded(x) if x is not None and x.is_floating_point() else x for name, x in k.items()}
    assert kernels._vectors(moved["logits"], None, [2, 0, 4808, 0, 0]) == {"VECTOR": 1, "REF_VECTOR": 1}
    results = [
        run_cells((x["logits"], k["token_ids"], None, None, x["ref_logits"], 1.0, 0.0), upstream(2)) for x in (k, moved)
    ]
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [NAN, INF])
def test_nan_or_infinity_stays_in_its_row(poison, dtype):
    kwargs = reference.sample((4,), 2500, dtype=dtype, ref=dtype is not torch.float16)
    kwargs["mask"], kwargs["token_ids"] = None, kwargs["token_ids"].clamp(0)
    clean = through_triton(lambda: stats(kwargs))
    for position in (0, 2499):
        kwargs["logits"] = kwargs["logits"].clone()
        kwargs["logits"][2, position] = poison
        got = through_triton(lambda: stats(kwargs))
        others = [0, 1, 3]
        assert all(torch.equal(a[others], b[others]) for a, b in zip(clean, got, strict=True))
        assert all(x[2].isnan().all() for x in got)


def test_nan_in_the_reference_spoils_only_kl_of_its_row():
    kwargs = reference.sample((3,), 1500)
    kwargs["mask"], kwargs["token_ids"] = None, kwargs["token_ids"].clamp(0)
    clean = through_triton(lambda: rlhf_fast.token_logprobs(**kwargs))
    kwargs["ref_logits"][1, 30] = NAN
    got = through_triton(lambda: rlhf_fast.token_logprobs(**kwargs))
    assert all(torch.equal(a, b) for a, b in zip(clean[:3], got[:3], strict=True))
    assert got.kl[1].isnan() and torch.equal(got.kl[[0, 2]], clean.kl[[0, 2]])


@pytest.mark.parametrize("V", [3, 1500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_entirely_at_minus_infinity_is_nan(V, dtype):
    logits = torch.randn(3, V).to(dtype)
    logits[1] = -INF
    ref = torch.randn(3, V).to(dtype)
    kwargs = {"logits": logits, "token_ids": torch.zeros(3, dtype=torch.int64), "ref_logits": ref}
    out = through_triton(lambda: stats(kwargs))
    assert all(x[1].isnan().all() and not x[[0, 2]].isnan().any() for x in out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_at_minus_infinity_are_as_if_absent(dtype):
    """Also when whole tiles are excluded before the first finite logit."""
    kwargs = reference.sample((3,), 6000, dtype=dtype)
    kwargs["mask"] = None
    keep = torch.zeros(6000, dtype=torch.bool)
    keep[4500:5200] = True
    keep[5900] = True
    kwargs["token_ids"] = torch.tensor([4500, 5000, 5900])
    for name in ("logits", "ref_logits"):
        kwargs[name] = kwargs[name].masked_fill(~keep, -INF)
    got = parity(kwargs, temperature=0.7)
    assert all(g.isfinite().all() for g in got) and not got[4][:, ~keep].any()


def test_kl_is_infinite_where_the_reference_excludes_a_possible_class():
    logits, ref = torch.randn(2, 40), torch.randn(2, 40)
    ref[0, 7] = -INF
    ids = torch.tensor([3, 4])
    z = logits.clone().requires_grad_()
    out = through_triton(lambda: rlhf_fast.token_logprobs(z, ids, ref_logits=ref))
    assert out.kl[0] == INF and out.kl[1].isfinite() and out.entropy.isfinite().all()
    both = logits.clone()
    both[0, 7] = -INF
    agreed = through_triton(lambda: rlhf_fast.token_logprobs(both, ids, ref_logits=ref))
    assert agreed.kl.isfinite().all()
    (grad,) = torch.autograd.grad(out.logprobs.sum(), z, retain_graph=True)  # KL takes no part: no NaN from it
    assert grad.isfinite().all()


@pytest.mark.parametrize("bad", [300, -1, 2**40, -100])
def test_an_illegal_token_id_or_temperature_makes_its_row_nan_and_its_gradient_zero(bad):
    logits, ids, mask, temperature, ref, value, cap = inputs(300, mask=False)
    ids[2] = bad
    for number in (0.0, -1.0, NAN, INF):
        temperature[4] = number
        out, grad, _ = run_cells((logits, ids, mask, temperature, ref, value, cap), upstream(6))
        wrong, right = [2, 4], [0, 1, 3, 5]
        assert all(x[wrong].isnan().all() and x[right].isfinite().all() for x in out)
        assert not grad[wrong].any() and grad[right].abs().amax(-1).min() > 0


def test_a_nan_from_upstream_stays_in_its_row():
    args = inputs(300, mask=False)
    grads = upstream(6)
    grads[1][2] = NAN
    _, grad, _ = run_cells(args, grads)
    assert grad[2].isnan().all() and grad[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()], ids=str)
def test_zero_rows_need_no_launch_and_a_row_no_leading_dimension(shape):
    z = torch.randn(*shape, 11)
    ids = torch.ones(shape, dtype=torch.int64)
    with Sanitizer() as s:
        out = kernels.forward(z, ids, None, None, z, 1.0, 0.0, True)
        grad = kernels.backward(z, ids, out[4], None, None, z, *(torch.ones(shape) for _ in range(4)), 1.0, 0.0)
    s.check()
    assert len(s.launches) == (2 if not shape else 0)
    assert grad.shape == z.shape and all(x.shape == shape for x in out[:4])
    assert out[4].shape == state_shape(ids.numel(), z)


@pytest.mark.parametrize("leap", [13.0, 90.0, 355.0, 1e4, 1e30])
def test_a_logit_far_above_all_before_it_takes_the_whole_weight(leap):
    logits = torch.zeros(2, 1500)
    logits[0, 1400], logits[1, 127] = leap, leap
    kwargs = {"logits": logits, "token_ids": torch.tensor([1400, 127])}
    truth = logits.double().log_softmax(-1)
    found = through_triton(lambda: stats(kwargs))
    torch.testing.assert_close(found[0], truth.amax(-1).float(), rtol=1e-6, atol=tolerances.FLOOR[torch.float32])
    torch.testing.assert_close(found[1], -(truth * truth.exp()).sum(-1).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[2], torch.logsumexp(logits, -1))


@pytest.mark.parametrize("temperature", [1e-38, 1e-30, 1e30])
def test_extreme_logits_and_temperatures_keep_their_row_finite(temperature):
    top = torch.finfo(torch.float32).max
    logits = torch.zeros(2, 1500)
    logits[0, 3], logits[0, 1300], logits[1, 5] = top, -top, -top
    ids = torch.tensor([3, 0])
    out = through_triton(lambda: rlhf_fast.token_logprobs(logits, ids, temperature=temperature))
    sure = rlhf_fast.token_logprobs(logits, ids, temperature=temperature)
    for name, got, expected in zip(NAMES, out, sure, strict=True):
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6, equal_nan=True, msg=name)


def test_target_gradient_keeps_its_digits_when_the_policy_is_sure():
    logits = torch.tensor([[20.0, 0.0, 1.0, 2.0]])
    one = torch.ones(1)
    args = (logits, torch.tensor([0]), None, None, None, 1.0, 0.0)
    out, grad, _ = run_cells(args, [one, None, None, None])
    truth = 1 - logits.double().softmax(-1)[0, 0]
    assert abs(float(grad[0, 0]) - float(truth)) <= 2.0**-23 and float(grad[0, 0]) >= 0 and float(out[0]) <= 0


def test_kl_of_equal_distributions_is_zero_and_of_close_ones_not_negative():
    z = torch.randn(4, 3000)
    ids = torch.zeros(4, dtype=torch.int64)

    def kl(ref):
        return through_triton(lambda: rlhf_fast.token_logprobs(z, ids, ref_logits=ref).kl)

    assert torch.equal(kl(z.clone()), torch.zeros(4))
    for scale in (1e-6, 1e-4):
        assert (kl(z + scale * torch.randn(4, 3000)) >= 0).all()


def test_every_way_to_the_kernels_gives_the_same_bits():
    """Plain eager calls, the registered op below the dispatcher (where a dispatch mode sends them), and a compiled graph."""
    k = reference.sample((2, 3), 64)
    below = through_triton(lambda: stats(k))
    args = (k["logits"], k["token_ids"], k["mask"], None, k["ref_logits"], 1.0, 0.0, False)
    found = through_triton(lambda: torch.ops.rlhf_fast.token_logprobs(*args))
    assert all(torch.equal(a, b) for a, b in zip(below[:4], found[:4], strict=True)) and found[4].numel() == 0

    def call(z):
        out = rlhf_fast.token_logprobs(z, k["token_ids"], mask=k["mask"], ref_logits=k["ref_logits"])
        return out.logprobs.sum() + out.entropy.square().sum() + out.kl.sum()

    z = k["logits"].clone().requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with on_cpu("triton"):  # fp32: the interpreter's own arithmetic is right without the checker
        assert all(torch.equal(a, b) for a, b in zip(below, stats(k), strict=True))
        assert torch.equal(*(torch.autograd.grad(f(z), z)[0] for f in (call, compiled)))


def test_doubles_are_declined_with_the_reason():
    k = double(reference.sample((2,), 20))
    with on_cpu("triton"), pytest.raises(RuntimeError, match="fp64 is left to the reference"):
        rlhf_fast.token_logprobs(**k)


def test_inputs_are_not_changed():
    k = reference.sample((2, 3), 64)
    before = {name: x.clone() for name, x in k.items()}
    through_triton(lambda: stats(k))
    assert all(torch.equal(x, before[name]) for name, x in k.items())


def test_results_and_state_agree_with_the_cpp_kernels():
    args = inputs(700)
    got, _, _ = run_cells(args, upstream(6))
    clean = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    for a, b in zip(got, cpp_forward(*clean, True), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
