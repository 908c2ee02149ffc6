from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from gpu.shim.cells import cuda_cells
from parity import assert_parity, double
from token_parity import NAMES, assert_all_parity, stats, three

import rlhf_fast
from rlhf_fast.cuda import group_advantages, ppo_loss, reward_loss, whiten
from rlhf_fast.cuda import token_logprobs as cell
from rlhf_fast.reference import token_logprobs as reference

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# 1, 2: less than a vector; 127: no whole sweep of a block; 50257, 151936: two and five slices.
@pytest.mark.parametrize("V", [1, 2, 127, 1000, 50257, 151936])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
def test_parity(cuda, V, dtype, ref):
    kwargs = reference.sample((5,) if V < 5000 else (2,), V, dtype=dtype, ref=ref)
    if V > 5000:
        kwargs["mask"] = None
        kwargs["token_ids"] = torch.tensor([0, V - 1])
    got, truth, plain = three(kwargs)
    names = NAMES if ref else NAMES[:3]
    for g, t, p, name in zip(got, truth, plain, (*names, "gradient"), strict=True):
        assert_parity(g, t, p, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_with_soft_cap_and_a_temperature_per_row(cuda, dtype):
    kwargs = reference.sample((3, 4), 261, dtype=dtype)
    assert_all_parity(*three(kwargs, softcap=5.0, temperature=torch.rand(3, 4) + 0.3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("softcap", [None, 6.0], ids=str)
def test_gradient_of_each_output_alone(cuda, name, softcap):
    kwargs = reference.sample((2, 5), 700, dtype=torch.bfloat16)

    def grad(kwargs):
        z = kwargs["logits"].detach().clone().requires_grad_()
        out = getattr(rlhf_fast.token_logprobs(**{**kwargs, "logits": z}, temperature=0.8, softcap=softcap), name)
        return torch.autograd.grad(out.sum(), z)[0]

    with rlhf_fast.use_backend("reference"):
        truth, plain = grad(double(kwargs)), grad(kwargs)
    assert truth.abs().max() > 1e-3
    assert_parity(grad(kwargs), truth, plain, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_logit_anywhere_moves_the_point_of_reference(cuda, dtype):
    V = 5000
    for place in (0, 15, 16, 4095, 4096, V - 1):
        kwargs = reference.sample((2,), V, dtype=dtype, spread=1.0)
        kwargs["mask"] = None
        kwargs["token_ids"] = torch.tensor([place, 7])
        for x in ("logits", "ref_logits"):
            kwargs[x][:, place] = 40.0
        assert_all_parity(*three(kwargs))


# Exponents relative to a rounded offset near 0, at its limit of 2^20, and beyond it, where there is none.
@pytest.mark.parametrize("shift", [0.0, -1e5, 7e5, -8e5, 3e7])
@pytest.mark.parametrize("temperature", [1.0, 1e-3])
def test_logits_far_from_0(cuda, shift, temperature):
    kwargs = reference.sample((3,), 5000, dtype=torch.float32, ref=False, spread=temperature)
    kwargs["logits"] += shift
    kwargs["mask"], kwargs["token_ids"] = None, torch.tensor([0, 4999, int(kwargs["logits"][2].argmax())])
    got, truth, plain = three(kwargs, temperature=temperature)
    for g, t, p, name in zip(got, truth, plain, (*NAMES[:3], "gradient"), strict=True):
        assert_parity(g, t, p, name)


@pytest.mark.parametrize("largest, temperature", [(200.0, 1.0), (1.7, 1e-30), (3e38, 1.0), (-2e5, 1e-3)])
def test_a_certain_row_has_a_log_probability_and_an_entropy_of_0(cuda, largest, temperature):
    z = largest - (largest if largest > 1e30 else 200.0) * (1 + torch.rand(2, 5000)) * max(temperature, 1e-7)
    z[:, 77] = largest
    out = rlhf_fast.token_logprobs(z, torch.tensor([77, 77]), temperature=temperature)
    assert out.logprobs.tolist() == [0.0, 0.0] == out.entropy.tolist()
    torch.testing.assert_close(out.logsumexp, (z.double()[:, 77] / temperature).float())


def at_offset(x, offset, gap):
    """x (N, V) in memory that begins `offset` elements past 16 bytes, rows `gap` further apart, NaN in between."""
    N, V = x.shape
    memory = torch.full((offset + N * (V + gap) + 16,), NAN, dtype=x.dtype)
    rows = memory[offset:].as_strided((N, V), (V + gap, 1), storage_offset=offset)
    rows.copy_(x)
    return rows, memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 7, 127, 1000, 4113, 40001])
def test_the_bits_of_a_row_depend_neither_on_its_address_nor_on_its_batch(cuda, dtype, V):
    kwargs = reference.sample((4,), V, dtype=dtype)
    kwargs["mask"] = None
    kwargs["token_ids"] = torch.tensor([0, V - 1, V // 2, V // 3])
    expected = stats(kwargs)
    for offset, ref_offset, gap in [(1, 1, 0), (2, 5, 1), (3, 0, 3), (4, 4, 8), (5, 7, 0), (6, 6, 13), (7, 2, 1)]:
        logits, _ = at_offset(kwargs["logits"], offset, gap)
        ref, _ = at_offset(kwargs["ref_logits"], ref_offset, gap)
        got = rlhf_fast.token_logprobs(logits, kwargs["token_ids"], ref_logits=ref)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=False)), offset
    for i in range(4):
        alone = rlhf_fast.token_logprobs(
            kwargs["logits"][i].clone(), kwargs["token_ids"][i], ref_logits=kwargs["ref_logits"][i].clone()
        )
        assert all(torch.equal(a[i], b) for a, b in zip(expected, alone, strict=False))


@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
def test_a_row_split_over_blocks_has_the_same_bits_in_any_order_of_blocks(cuda, ref):
    V = 70001
    kwargs = reference.sample((2, 3), V, dtype=torch.bfloat16, ref=ref)
    results = []
    for seed, multiprocessors in ((1, 1), (2, 1), (3, 132), (4, 132)):
        with cuda_cells(seed, multiprocessors) as library:
            before = library.configure(seed, multiprocessors)
            out = rlhf_fast.token_logprobs(**kwargs)
            assert library.configure(seed, multiprocessors) - before == (1 if multiprocessors == 1 else 2)
            results.append([*(x for x in out if x is not None), stats(kwargs)[-1]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0], ids=str)
def test_infinite_and_nan_rows_stay_by_themselves(cuda, dtype, softcap):
    V = 600
    kwargs = reference.sample((8,), V, dtype=dtype)
    kwargs["mask"] = None
    kwargs["token_ids"] = torch.tensor([5, 1, 2, 3, 4, 5, 6, 7])
    z, ref = kwargs["logits"], kwargs["ref_logits"]
    z[0, 100:] = -INF  # classes of probability 0
    z[1] = -INF
    z[2, 17] = NAN
    z[3, 18] = INF
    ref[4, 20] = -INF  # excluded by the reference alone
    ref[5, 21] = NAN
    z[6, :300] = -INF
    ref[6, :300] = -INF
    got, truth, plain = three(kwargs, softcap=softcap)
    for g, t, p, name in zip(got, truth, plain, NAMES, strict=False):
        assert_parity(g, t, p, name)
    keep = [0, 6, 7]
    assert_parity(got[-1][keep], truth[-1][keep], plain[-1][keep], "gradient")


def test_masked_rows_are_not_looked_at_and_give_0(cuda):
    kwargs = reference.sample((6,), 300, dtype=torch.bfloat16)
    kwargs["mask"] = torch.tensor([True, False] * 3)
    kwargs["token_ids"][1::2] = -(2**40)
    for x in ("logits", "ref_logits"):
        kwargs[x][1::2] = NAN
    *results, grad = stats(kwargs)
    for x in (*results, grad):
        assert not x[1::2].any() and x[::2].isfinite().all()


def test_rows_that_the_cpu_refuses_are_nan(cuda):
    z = torch.randn(5, 40, requires_grad=True)
    ids, temperature = torch.tensor([0, 40, -1, 3, 4]), torch.tensor([1.0, 1.0, 1.0, 0.0, INF])
    out = rlhf_fast.token_logprobs(z, ids, temperature=temperature)
    (grad,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), z)
    for x in (*out[:3], grad):
        assert x[0].isfinite().all() and x[1:].isnan().all()


def test_ids_of_32_bits_and_rows_on_two_levels_of_strides(cuda):
    logits = torch.randn(3, 6, 75)
    ids = torch.randint(0, 75, (3, 5))
    expected = rlhf_fast.token_logprobs(logits[:, :-1].contiguous(), ids)
    got = rlhf_fast.token_logprobs(logits[:, :-1], ids.int())
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], got[:3], strict=True))


def test_an_empty_batch_launches_nothing(cuda):
    before = cuda.configure()
    z = torch.zeros(0, 9, requires_grad=True)
    out = rlhf_fast.token_logprobs(z, torch.zeros(0, dtype=torch.int64))
    (grad,) = torch.autograd.grad(out.logprobs.sum(), z)
    assert out.entropy.shape == (0,) and grad.shape == (0, 9) and cuda.configure() == before
    rlhf_fast.whiten(torch.ones(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 6])
def test_the_gradient_may_overwrite_the_logits_and_leaves_gaps_alone(cuda, dtype, offset):
    V = 9001
    kwargs = reference.sample((3,), V, dtype=dtype)
    ids, mask = torch.tensor([0, V - 1, 4500]), None
    _, _, _, _, state = cell.forward(kwargs["logits"], ids, mask, None, kwargs["ref_logits"], 0.9, 0.0, True)
    grads = [torch.randn(3) for _ in range(4)]
    rest = (ids, state, mask, None, kwargs["ref_logits"], grads, 0.9, 0.0)
    expected = cell.backward_into(torch.full((3, V), NAN, dtype=dtype), kwargs["logits"], *rest)
    logits, memory = at_offset(kwargs["logits"], offset, 5)
    cell.backward_into(logits, logits, *rest)
    assert torch.equal(logits, expected)
    assert int(memory.isnan().sum()) == memory.numel() - 3 * V
    assert expected.isfinite().all()


def test_results_do_not_depend_on_the_upstream_gradients_that_are_left_out(cuda):
    kwargs = reference.sample((2,), 500, dtype=torch.float32)
    kwargs["mask"] = None
    kwargs["token_ids"] = torch.tensor([1, 2])
    *_, state = cell.forward(kwargs["logits"], kwargs["token_ids"], None, None, kwargs["ref_logits"], 1.0, 0.0, True)
    zero, one = torch.zeros(2), torch.rand(2)
    for given in range(1, 16):
        grads = [one if given >> k & 1 else None for k in range(4)]
        a, b = (
            cell.backward(kwargs["logits"], kwargs["token_ids"], state, None, None, kwargs["ref_logits"], *g, 1.0, 0.0)
            for g in (grads, [zero if x is None else x for x in grads])
        )
        assert torch.equal(a, b) and a.abs().max() > 0


def test_constants_are_those_of_the_headers():
    text = (Path(__file__).resolve().parents[3] / "csrc" / "cuda" / "ops.h").read_text(encoding="utf-8")

    def constant(name):
        return int(re.search(rf"\b{name} = (\d+)", text).group(1))

    assert constant("kSlice") == cell.SLICE and constant("kThreads") == cell.THREADS
    assert (constant("kSliceFloats"), constant("kRefSliceFloats")) == (cell.SLICE_FLOATS, cell.REF_SLICE_FLOATS)
    assert constant("kMaxParts") == whiten.MAX_PARTS
    assert (constant("kMomentDoubles"), constant("kSumDoubles")) == (whiten.MOMENT_DOUBLES, whiten.SUM_DOUBLES)
    assert constant("kPpoNumbers") == ppo_loss.NUMBERS
    assert constant("kRewardNumbers") == reward_loss.NUMBERS
    text = (Path(__file__).resolve().parents[3] / "csrc" / "cuda" / "group_advantages.cuh").read_text(encoding="utf-8")
    found = (constant("kSampleDoubles"), constant("kPartDoubles"))
    assert found == (group_advantages.SAMPLE_DOUBLES, group_advantages.PART_DOUBLES)
