from __future__ import annotations

import math

import pytest
import tolerances
import torch
from parity import assert_parity, double
from token_parity import DTYPES, NAMES, assert_all_parity, stats, three
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.ops.token_logprobs import _layout, backward_into
from rlhf_fast.reference import token_logprobs as reference

NAN, INF = float("nan"), float("inf")


# 1-3: below any vector; 15-17: around one; 127: several and a tail; 1000: unrolled; 50257: many blocks, odd rows.
@pytest.mark.parametrize("V", [1, 2, 3, 15, 16, 17, 127, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(V, dtype):
    kwargs = reference.sample((5,) if V < 5000 else (2,), V, dtype=dtype)
    got, truth, plain = three(kwargs)
    assert_all_parity(got, truth, plain)
    assert all(x.dtype == (torch.float64 if dtype is torch.float64 else torch.float32) for x in got[:4])
    assert got[4].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"temperature": 0.3}, {"softcap": 30.0, "temperature": 1.7}], ids=str
)
def test_parity_with_soft_cap_and_temperature(dtype, options):
    assert_all_parity(*three(reference.sample((3, 4), 261, dtype=dtype), **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_each_row_has_its_own_temperature(dtype):
    kwargs = reference.sample((3, 4), 261, dtype=dtype)
    temperature = torch.rand(3, 4) + 0.3
    together = rlhf_fast.token_logprobs(**kwargs, temperature=temperature)
    for i in range(12):
        one = {k: v.flatten(0, 1)[i] for k, v in kwargs.items()}
        alone = rlhf_fast.token_logprobs(**one, temperature=float(temperature.flatten()[i]))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a.flatten()[i], b, rtol=tolerances.FLOOR[torch.float32], atol=1e-6)
    assert_all_parity(*three(kwargs, temperature=temperature))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 6.0], ids=str)
def test_gradient_of_each_output_alone(name, dtype, softcap):
    kwargs = reference.sample((2, 5), 700, dtype=dtype)

    def grad(kwargs):
        z = kwargs["logits"].detach().clone().requires_grad_()
        out = getattr(rlhf_fast.token_logprobs(**{**kwargs, "logits": z}, temperature=0.8, softcap=softcap), name)
        return torch.autograd.grad(out.sum(), z)[0]

    with rlhf_fast.use_backend("reference"):
        truth, plain = grad(double(kwargs)), grad(kwargs)
    assert truth.abs().max() > 1e-3
    assert_parity(grad(kwargs), truth, plain, name)


def test_worked_values():
    logits = torch.tensor([[1.0, 2.0, 3.0]]).expand(3, 3)
    ids = torch.tensor([0, 1, 2])
    one, cold = rlhf_fast.token_logprobs(logits, ids), rlhf_fast.token_logprobs(logits, ids, temperature=0.7)
    close = {"atol": tolerances.WORKED, "rtol": 0}
    torch.testing.assert_close(one.logprobs, torch.tensor([-2.4076060, -1.4076060, -0.4076060]), **close)
    torch.testing.assert_close(one.entropy, torch.full((3,), 0.8323956), **close)
    torch.testing.assert_close(one.logsumexp, torch.full((3,), 3.4076060), **close)
    torch.testing.assert_close(cold.logprobs, torch.tensor([-3.1172613, -1.6886898, -0.2601184]), **close)
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_(), torch.tensor([[0.4, 0.4, 0.2]]).log()
    out = rlhf_fast.token_logprobs(p, torch.tensor([0]), ref_logits=q)
    torch.testing.assert_close(out.entropy, torch.tensor([1.0296530]), **close)
    torch.testing.assert_close(out.kl, torch.tensor([0.0252672]), **close)
    (d_entropy,) = torch.autograd.grad(out.entropy.sum(), p, retain_graph=True)
    torch.testing.assert_close(d_entropy, torch.tensor([[-0.1682529, 0.0522959, 0.1159570]]), **close)
    (d_kl,) = torch.autograd.grad(out.kl.sum(), p)
    torch.testing.assert_close(d_kl, torch.tensor([[0.0989382, -0.0938848, -0.0050534]]), **close)
    reverse = rlhf_fast.token_logprobs(q, torch.tensor([0]), ref_logits=p.detach())
    torch.testing.assert_close(reverse.kl, torch.tensor([0.0258154]), **close)


@pytest.mark.parametrize("V", [50257, 128256, 151936])
def test_entropy_of_the_uniform_distribution_is_log_v(V):
    out = rlhf_fast.token_logprobs(torch.full((1, V), 3.25), torch.tensor([7]))
    for x in (out.entropy, -out.logprobs, out.logsumexp - 3.25):
        assert abs(float(x) - math.log(V)) <= tolerances.FLOOR[torch.float32] * math.log(V)


def test_adding_a_constant_to_the_logits_changes_only_logsumexp():
    kwargs = reference.sample((2, 3), 1000)
    kwargs["logits"] = (kwargs["logits"] * 64).round() / 64  # exact after the shift
    kwargs["ref_logits"] = (kwargs["ref_logits"] * 64).round() / 64
    shifted = {**kwargs, "logits": kwargs["logits"] + 1e4, "ref_logits": kwargs["ref_logits"] + 1e4}
    here, there = stats(kwargs), stats(shifted)
    for i in (0, 1, 3, 4):
        assert torch.equal(here[i], there[i])
    torch.testing.assert_close(there[2], (here[2] + 1e4).masked_fill(~kwargs["mask"], 0), rtol=1e-7, atol=0)


def test_exp_is_accurate_over_its_whole_range():
    """With two classes the gradient of logsumexp is (1, e^-x) / (1 + e^-x): the exp of the kernel, one value a row."""
    x = torch.linspace(0, 87, 20011)
    logits = torch.stack([torch.zeros_like(x), -x], 1).requires_grad_()
    (grad,) = torch.autograd.grad(
        rlhf_fast.token_logprobs(logits, torch.zeros(20011, dtype=torch.int64)).logsumexp.sum(), logits
    )
    truth = 1 / (1 + x.double().exp())
    error = ((grad[:, 1].double() - truth) / truth).abs()
    # e^(x log2(e)): the constant has 24 bits, so the error grows with x as that of x itself does
    assert (error <= 2.0**-23 * (3 + x.double() / 4)).all()


def test_target_gradient_keeps_its_digits_when_the_policy_is_sure():
    logits = torch.tensor([[20.0, 0.0, 1.0, 2.0]]).requires_grad_()
    (grad,) = torch.autograd.grad(rlhf_fast.token_logprobs(logits, torch.tensor([0])).logprobs.sum(), logits)
    truth = 1 - torch.tensor([[20.0, 0.0, 1.0, 2.0]], dtype=torch.float64).softmax(-1)[0, 0]
    assert abs(float(grad[0, 0]) - float(truth)) <= 2.0**-23  # 1 - p is 2e-8; its last digits hang on the sum
    exact = rlhf_fast.token_logprobs(logits.detach(), torch.tensor([0])).logprobs
    assert float(grad[0, 0]) >= 0 and float(exact) <= 0


def test_kl_of_equal_distributions_is_zero_and_of_close_ones_not_negative():
    z = torch.randn(4, 3000)
    ids = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(rlhf_fast.token_logprobs(z, ids, ref_logits=z.clone()).kl, torch.zeros(4))
    assert torch.equal(rlhf_fast.token_logprobs(z, ids, ref_logits=z + 2.0).kl.round(decimals=6), torch.zeros(4))
    for scale in (1e-6, 1e-5, 1e-4, 1e-3):
        assert (rlhf_fast.token_logprobs(z, ids, ref_logits=z + scale * torch.randn(4, 3000)).kl >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_class_is_certain(dtype):
    out = stats(reference.sample((4,), 1, dtype=dtype), temperature=0.5)
    assert not out[0].any() and not out[1].any() and not out[3].any()


def test_strided_logits_give_the_same_bits():
    kwargs = reference.sample((6, 8), 75)
    expected = stats(kwargs)

    def same(logits, ref, pick=lambda x: x):
        got = stats({"logits": logits, "token_ids": kwargs["token_ids"], "mask": kwargs["mask"], "ref_logits": ref})
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))

    z, r = kwargs["logits"], kwargs["ref_logits"]
    wide = torch.randn(6, 9, 80)
    wide[:, :8, :75] = z
    odd = torch.randn(7, 9, 78)
    odd[1:, 1:, 3:] = r
    same(wide[:, :8, :75], odd[1:, 1:, 3:])  # two different strides, odd offset
    same(z.transpose(0, 1).contiguous().transpose(0, 1), r)
    same(z.transpose(1, 2).contiguous().transpose(1, 2), r)  # a strided vocabulary


@pytest.mark.parametrize("view", ["shifted", "expanded", "folding"])
def test_common_views_are_read_in_place(view):
    base = torch.randn(4, 9, 2, 33)
    x = {
        "shifted": base[:, :, 0][:, :-1],
        "expanded": base[0, 0, 0].expand(5, 6, 33),
        "folding": base[:, :, :, :30],
    }[view]
    logits, _, layout = _layout(x, None)
    assert logits.data_ptr() == x.data_ptr()
    inner, outer_stride, inner_stride = layout[:3]
    flat = [(i // inner) * outer_stride + (i % inner) * inner_stride for i in range(x[..., 0].numel())]
    offsets = torch.as_tensor(flat) + x.storage_offset()
    storage = torch.as_strided(x, (x.untyped_storage().size() // 4,), (1,), 0)
    assert torch.equal(storage[offsets], x[..., 0].flatten())
    ids = torch.zeros(x.shape[:-1], dtype=torch.int64)
    assert torch.equal(
        rlhf_fast.token_logprobs(x, ids).logprobs, rlhf_fast.token_logprobs(x.contiguous(), ids).logprobs
    )


def test_leading_dimensions_that_do_not_fold_are_copied():
    x = torch.randn(5, 4, 3, 2, 10).permute(2, 0, 3, 1, 4)
    ids = torch.zeros(x.shape[:-1], dtype=torch.int64)
    a, b = rlhf_fast.token_logprobs(x, ids), rlhf_fast.token_logprobs(x.contiguous(), ids)
    assert torch.equal(a.logprobs, b.logprobs) and torch.equal(a.entropy, b.entropy)


def test_rows_further_apart_than_two_to_the_31_elements():
    V, far = 4096, 2**31
    storage = torch.empty(far + V)  # 8 GiB of address space, of which two rows are touched
    z = torch.as_strided(storage, (2, V), (far, 1))
    z.copy_(torch.randn(2, V))
    ids = torch.tensor([5, V - 1])
    near, distant = z.clone().requires_grad_(), z.requires_grad_()
    a, b = (rlhf_fast.token_logprobs(x, ids, ref_logits=x.detach() * 1) for x in (near, distant))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    c = rlhf_fast.token_logprobs(near, ids, ref_logits=distant.detach())
    assert torch.equal(c.kl, torch.zeros(2))
    ga, gb = (torch.autograd.grad(rlhf_fast.token_logprobs(x, ids).logprobs.sum(), x)[0] for x in (near, distant))
    assert torch.equal(ga, gb)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_gradients_are_streamed_with_the_same_bits(dtype):
    """Past 32 MiB the stores bypass the cache and want alignment, which odd rows lack."""
    V = 50257
    rows = (34 << 20) // (V * dtype.itemsize)
    logits = torch.randn(rows, V).to(dtype).requires_grad_()
    ids = torch.randint(0, V, (rows,))
    out = rlhf_fast.token_logprobs(logits, ids)
    (whole,) = torch.autograd.grad([out.logprobs, out.entropy], logits, [torch.ones(rows), torch.ones(rows)])
    for i in (0, 1, 2, 3, rows - 1):
        one = logits.detach()[i : i + 1].clone().requires_grad_()
        alone = rlhf_fast.token_logprobs(one, ids[i : i + 1])
        (grad,) = torch.autograd.grad([alone.logprobs, alone.entropy], one, [torch.ones(1), torch.ones(1)])
        assert torch.equal(whole[i : i + 1], grad)


def test_gradient_is_a_new_contiguous_tensor_and_inputs_are_untouched():
    base = torch.randn(3, 5, 20)
    before = base.clone()
    z = base[:, :-1].requires_grad_()
    out = rlhf_fast.token_logprobs(z, torch.zeros(3, 4, dtype=torch.int64))
    (grad,) = torch.autograd.grad(out.logprobs.sum(), z)
    assert grad.is_contiguous() and grad.data_ptr() != z.data_ptr() and torch.equal(base, before)


def test_reference_of_another_dtype_promotes():
    kwargs = reference.sample((2, 3), 64)
    mixed = {**kwargs, "logits": kwargs["logits"].bfloat16()}
    promoted = {**kwargs, "logits": kwargs["logits"].bfloat16().float()}
    a, b = stats(mixed), stats(promoted)
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    assert a[4].dtype is torch.bfloat16 and torch.equal(a[4], b[4].bfloat16())


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_gradcheck(options, backend):
    kwargs = double(reference.sample((2, 3), 9))

    def call(z):
        return tuple(rlhf_fast.token_logprobs(**{**kwargs, "logits": z}, **options))

    with rlhf_fast.use_backend(backend):
        assert torch.autograd.gradcheck(call, kwargs["logits"].requires_grad_(), **tolerances.GRADCHECK)


def test_opcheck():
    k = reference.sample((2, 3), 17)
    for grad in (False, True):
        z = k["logits"].clone().requires_grad_(grad)
        op = torch.ops.rlhf_fast.token_logprobs.default
        opcheck(op, (z, k["token_ids"], k["mask"], torch.ones(2, 3), k["ref_logits"], 1.0, 0.0, grad))
        opcheck(op, (z, k["token_ids"].clamp(0), None, None, None, 0.7, 5.0, grad))


def test_compile_gives_the_eager_result_and_gradient():
    k = reference.sample((2, 3), 17)

    def call(z):
        out = rlhf_fast.token_logprobs(
            z[:, :2], k["token_ids"][:, :2], mask=k["mask"][:, :2], ref_logits=k["ref_logits"][:, :2]
        )
        return out.logprobs.sum() + out.entropy.square().sum() + out.kl.sum()

    z = k["logits"].requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(z), compiled(z))
    assert torch.equal(*(torch.autograd.grad(f(z), z)[0] for f in (call, compiled)))


def test_inference_mode_autocast_and_vmap_give_the_same_numbers():
    z, ids = torch.randn(3, 4, 50), torch.randint(0, 50, (3, 4))
    expected = rlhf_fast.token_logprobs(z, ids)
    with torch.inference_mode():
        assert torch.equal(rlhf_fast.token_logprobs(z, ids).logprobs, expected.logprobs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rlhf_fast.token_logprobs(z, ids)
        assert got.logprobs.dtype is torch.float32 and torch.equal(got.entropy, expected.entropy)
    mapped = torch.vmap(lambda a, b: rlhf_fast.token_logprobs(a, b).logprobs)(z, ids)
    assert torch.equal(mapped, expected.logprobs)


def test_meta_tensors_have_shapes_and_no_data():
    out = rlhf_fast.token_logprobs(
        torch.zeros(2, 3, 8, device="meta", dtype=torch.bfloat16),
        torch.zeros(2, 3, device="meta", dtype=torch.int64),
    )
    assert (
        out.logprobs.shape == (2, 3) and out.logprobs.is_meta and out.logprobs.dtype is torch.float32 and out.kl is None
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_batch_threads_or_address(dtype):
    kwargs = reference.sample((40,), 3001, dtype=dtype)
    torch.set_num_threads(2)
    whole = stats(kwargs)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(whole, stats(kwargs), strict=True))
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(40, generator=g, dtype=torch.float64) for _ in range(4)]
    for i in (0, 19, 39):
        shifted = torch.zeros(3004, dtype=dtype)[3:]  # another alignment
        shifted.copy_(kwargs["logits"][i])
        one = {k: v[i : i + 1] for k, v in kwargs.items()}
        one["logits"] = shifted[None].requires_grad_()
        out = rlhf_fast.token_logprobs(**one)
        (grad,) = torch.autograd.grad(
            sum((x * w[i].to(x.dtype)).sum() for x, w in zip(out, weights, strict=True)), one["logits"]
        )
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, [*out, grad], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 8.0], ids=str)
def test_instruction_sets_agree(each_isa, dtype, softcap):
    kwargs = reference.sample((5,), 4200, dtype=dtype)
    results = dict(each_isa(lambda: stats(kwargs, temperature=0.9, softcap=softcap)))
    best = results[next(iter(results))]
    largest = max(float(x.abs().max()) for x in best[:4])
    for name, found in results.items():
        for a, b in zip(best[:4], found[:4], strict=True):
            assert (a.double() - b.double()).abs().max() <= tolerances.ISA * largest, name
        floor = max(tolerances.ISA, tolerances.FLOOR[dtype])  # the gradient is rounded to dtype
        assert (best[4].double() - found[4].double()).abs().max() <= floor * best[4].double().abs().max(), name
    if dtype is torch.float64:
        assert all(torch.equal(a, b) for found in results.values() for a, b in zip(best, found, strict=True))
    if {"avx2", "avx512"} <= results.keys():
        assert all(torch.equal(a, b) for a, b in zip(results["avx2"], results["avx512"], strict=True))


@pytest.mark.parametrize("leap", [13.0, 90.0, 354.9, 355.0, 1e4, 1e7, 1e30])
def test_a_logit_far_above_all_before_it_takes_the_whole_weight(each_isa, leap):
    """Also where an exponent beyond the range of fp32 would wrap around (512 ln 2 = 354.9)."""
    logits = torch.zeros(3, 5000)
    logits[0, 4000], logits[1, 127], logits[2, 128] = leap, leap, leap
    kwargs = {"logits": logits, "token_ids": torch.tensor([4000, 127, 128])}
    truth = logits.double().log_softmax(-1)
    for _, found in each_isa(lambda: stats(kwargs)):
        torch.testing.assert_close(found[0], truth.amax(-1).float(), rtol=1e-6, atol=tolerances.FLOOR[torch.float32])
        torch.testing.assert_close(found[1], -(truth * truth.exp()).sum(-1).float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[2], torch.logsumexp(logits, -1))


def test_the_exponential_is_at_most_one_ulp_off(each_isa):
    """Seen through the gradient of logsumexp in a row whose largest logit and sum are given: base 2, every power alike."""
    by = math.log2(math.e)
    x = torch.cat(
        [torch.linspace(-125.9, 0, 400_001), -torch.logspace(-9, 0, 100_000), torch.tensor([-126.5, -1e9, -INF])]
    )
    state = torch.tensor([[0.0, 1 / by, 0.0]])
    one, target = torch.ones(1), torch.tensor([0])
    truth = torch.exp2(x.double())
    ulp = torch.exp2(x.double().floor() - 23)
    for _, found in each_isa(
        lambda: backward_into(
            torch.empty(1, x.numel()), x[None], target, state, None, None, None, (None, None, one, None), by, 0.0
        )
    ):
        assert ((found[0].double() - truth).abs() / ulp)[1:-3].max() <= 1.0
        assert (found[0, -3:] == 0).all()


def test_tiny_probabilities_cost_nothing_and_leave_the_processor_as_it_was():
    """Powers below the smallest normal number count as 0 inside the kernels, and as themselves outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on the calling thread
    try:
        tiny = torch.tensor([1e-40, 3e-39]) * 1
        kwargs = reference.sample((3,), 4000)
        kwargs["logits"] = torch.linspace(-110, 3, 4000).expand(3, -1).contiguous()
        assert_all_parity(*three(kwargs))
        assert (torch.tensor([1e-40, 3e-39]) * 1).tolist() == tiny.tolist() != [0.0, 0.0]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_of_the_scalar_kernels(native, dtype):
    before = native.isa()
    native.select_isa("scalar")
    try:
        assert_all_parity(*three(reference.sample((5,), 333, dtype=dtype), softcap=20.0))
    finally:
        native.select_isa(before)


def _in_child(queue, kwargs):
    torch.set_num_threads(1)
    queue.put([x.tolist() for x in rlhf_fast.token_logprobs(**kwargs)])
