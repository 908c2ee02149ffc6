"""linear_token_logprobs and linear_ppo_loss on the CUDA kernels of rows: logits in buffers, gradients over them or narrowed."""

from __future__ import annotations

import pytest
import torch
from gpu.shim.cells import cuda_cells
from gpu.shim.test_token_logprobs import at_offset
from head_parity import NAMES, assert_ppo_parity, assert_statistics_parity, leaves, ppo, statistics
from parity import assert_parity, double

import rlhf_fast
from rlhf_fast._op import OPS
from rlhf_fast.cuda import token_logprobs as cell
from rlhf_fast.reference import linear_ppo_loss as ppo_reference
from rlhf_fast.reference import linear_token_logprobs as reference
from rlhf_fast.reference import token_logprobs as rows_reference

NAN = float("nan")
BF16 = torch.bfloat16
FROZEN, TRAINED = ("hidden",), ("hidden", "weight", "bias")


def check(kwargs, trained=(), outputs=NAMES, **options):
    got = statistics(kwargs, trained, outputs, **options)
    assert_statistics_parity(got, kwargs, trained, outputs, **options)
    return got


# One row a chunk, a few rows with a ragged last chunk, all rows.
@pytest.mark.parametrize("chunk_bytes", [1, 127 * 4 * 2 * 7, None], ids=str)
@pytest.mark.parametrize("trained", [FROZEN, ("weight",), TRAINED], ids="+".join)
def test_statistics_and_gradients(cuda, chunk_bytes, trained):
    check(reference.sample((2, 5) if chunk_bytes == 1 else (4, 5)), trained, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=["plain", "capped"])
@pytest.mark.parametrize("trained", [FROZEN, TRAINED], ids="+".join)
def test_every_dtype(cuda, dtype, options, trained):
    got = check(reference.sample((2, 4), 300, dtype=dtype), trained, chunk_bytes=9000, **options)
    assert got[0].dtype == torch.float32 and all(x.dtype == dtype for x in got[4:])


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("directions", [("logprobs", "entropy"), ("logprobs", "logsumexp", "kl")], ids="+".join)
def test_a_frozen_head_keeps_several_directions(cuda, dtype, directions):
    kwargs = reference.sample((3, 5), 140, dtype=dtype)
    check(kwargs, FROZEN, directions, directions=directions, temperature=torch.rand(3, 5) + 0.5, chunk_bytes=9000)


def test_a_frozen_head_costs_one_launch_each_way_and_its_backward_none(cuda):
    kwargs = leaves(reference.sample((2, 4), ref=False), FROZEN)
    before = cuda.configure()
    out = rlhf_fast.linear_token_logprobs(**kwargs)
    assert cuda.configure() == before + 2
    torch.autograd.grad(out.logprobs.sum(), kwargs["hidden"])
    assert cuda.configure() == before + 2


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_rows_have_the_same_bits_in_any_chunk_and_order(dtype):
    kwargs, found = reference.sample((3, 3), dtype=dtype), []
    for seed, multiprocessors, budget in ((1, 4, None), (2, 1, 1), (3, 132, 127 * 4 * 2 * 7)):
        with cuda_cells(seed, multiprocessors):
            found.append(statistics(kwargs, FROZEN, NAMES[:1], chunk_bytes=budget))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("trained", [FROZEN, TRAINED], ids="+".join)
def test_masked_rows_never_show(cuda, trained):
    kwargs = reference.sample((3, 4))
    clean = statistics(kwargs, trained)
    bad = ~kwargs["mask"]
    dirty = {k: v.clone() for k, v in kwargs.items()}
    dirty["hidden"][bad] = NAN
    dirty["ref_hidden"][bad] = NAN
    dirty["token_ids"][bad] = 2**40
    got = statistics(dirty, trained, temperature=torch.ones(3, 4).masked_fill(bad, NAN))
    for a, b in zip(clean, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert bad.any() and all(not x[bad].any() for x in got[:5])


@pytest.mark.parametrize("trained", [FROZEN, TRAINED], ids="+".join)
def test_an_illegal_row_is_nan_and_has_no_gradient(cuda, trained):
    kwargs = reference.sample((2, 4), ref=False)
    kwargs["mask"], kwargs["token_ids"] = None, kwargs["token_ids"].clamp(0)
    temperature = torch.ones(2, 4)
    kwargs["token_ids"][0, 2], temperature[1, 1] = 127, -1.0
    got = statistics(kwargs, trained, NAMES[:2], temperature=temperature)
    wrong = torch.zeros(2, 4, dtype=torch.bool)
    wrong[0, 2] = wrong[1, 1] = True
    assert all(x[wrong].isnan().all() and x[~wrong].isfinite().all() for x in got[:3])
    assert not got[3][wrong].any() and all(x.isfinite().all() for x in got[3:])


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 4.0, "temperature": 0.7, "reduction": "seq-mean-token-mean"},
        {"entropy_coef": 0.0, "kl_coef": 0.0},
    ],
    ids=["plain", "capped", "policy alone"],
)
@pytest.mark.parametrize("trained", [("hidden", "values"), (*TRAINED, "values")], ids="+".join)
def test_ppo_loss_and_gradients(cuda, dtype, options, trained):
    kwargs = ppo_reference.sample((3, 5), 150, dtype=dtype)
    options = {"entropy_coef": 0.01, "kl_coef": 0.1, **options}
    assert_ppo_parity(ppo(kwargs, trained, chunk_bytes=9000, **options), kwargs, trained, **options)


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_token_logprobs_backward", "linear_ppo_loss"])
def test_cuda_comes_before_triton(op):
    assert [cell.name for cell in OPS[op].backends] == ["cuda", "triton", "cpp", "reference"]


def test_doubles_are_left_to_the_next_backend_with_the_reason(cuda, monkeypatch):
    op = OPS["linear_token_logprobs"]
    monkeypatch.setattr(op, "declined", {})
    kwargs = reference.sample((2,), dtype=torch.float64)
    with rlhf_fast.use_backend("cuda"), pytest.raises(RuntimeError, match="fp64 is left to the reference"):
        rlhf_fast.linear_token_logprobs(**kwargs)
    assert op.declined == {("cuda", "fp64 is left to the reference"): 1}
    rlhf_fast.linear_token_logprobs(**kwargs)
    assert op.declined["cuda", "fp64 is left to the reference"] == 2
    rlhf_fast.whiten(torch.ones(3))


# Gradients that begin at any distance from 16 bytes, logits that begin there as well or not; chunks of 8,192.
@pytest.mark.parametrize("ref", [False, True], ids=["", "ref"])
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_a_narrow_gradient_is_the_wide_one_rounded(cuda, dtype, softcap, ref):
    N, V = 3, 9001
    kwargs = rows_reference.sample((N,), V, dtype=torch.float32, ref=ref)
    ids, mask = torch.tensor([0, V - 1, 4500]), torch.tensor([True, True, True])
    z, r = kwargs["logits"], kwargs.get("ref_logits")
    _, _, _, _, state = cell.forward(z, ids, mask, None, r, 0.9, softcap, True)
    grads = [torch.randn(N) for _ in range(4 if ref else 3)] + [None] * (not ref)
    wide = cell.backward_into(torch.full((N, V), NAN), z, ids, state, mask, None, r, grads, 0.9, softcap)
    others = torch.ones(N, V, dtype=torch.bool)
    others[torch.arange(N), ids] = False
    for offset, of_logits in ((0, 0), (1, 0), (3, 3), (7, 2)):
        grad, memory = at_offset(torch.full((N, V), NAN, dtype=dtype), offset, 5)
        moved, _ = at_offset(z, of_logits, 3)
        cell.backward_into(grad, moved, ids, state, mask, None, r, grads, 0.9, softcap)
        assert torch.equal(grad[others], wide.to(dtype)[others])
        assert_parity(grad[~others], wide.double()[~others], wide.to(dtype)[~others], "target")
        assert int(memory.isnan().sum()) == memory.numel() - N * V


def test_a_large_narrow_gradient_of_a_head(cuda):
    """Every row in several chunks of blocks."""
    kwargs = reference.sample((3,), 40001, 8, dtype=BF16, ref=False)
    got = statistics(kwargs, FROZEN, NAMES[:2], directions=NAMES[:2])
    with rlhf_fast.use_backend("reference"):
        truth, plain = (statistics(k, FROZEN, NAMES[:2]) for k in (double(kwargs), kwargs))
    for g, t, p, name in zip(got, truth, plain, (*NAMES[:3], "hidden"), strict=True):
        assert_parity(g, t, p, name)
