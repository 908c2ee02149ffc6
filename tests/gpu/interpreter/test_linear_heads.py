"""linear_token_logprobs and linear_ppo_loss on the Triton kernels of rows: chunks in buffers, nothing picked by content."""

from __future__ import annotations

import importlib

import pytest
import torch
from gpu.tools.on_cpu import on_cpu
from gpu.tools.sanitizer import Sanitizer
from head_parity import NAMES, assert_ppo_parity, assert_statistics_parity, leaves, ppo, statistics
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_fast
from rlhf_fast.ops._matmul import pitch
from rlhf_fast.reference import linear_ppo_loss as ppo_reference
from rlhf_fast.reference import linear_token_logprobs as reference

ppo_module = importlib.import_module("rlhf_fast.ops.linear_ppo_loss")
linear_module = importlib.import_module("rlhf_fast.ops.linear_token_logprobs")
NAN = float("nan")
FULL = {"entropy_coef": 0.01, "kl_coef": 0.1}


def sanitized(call, order="shuffle"):
    """(call() on the Triton cells, its launches)."""
    with Sanitizer(order=order, seed=2) as s, on_cpu("triton"):
        found = call()
    s.check()
    return found, [launch.kernel.removeprefix("token_logprobs_") for launch in s.launches]


def check(kwargs, trained=(), outputs=NAMES, **options):
    got, _ = sanitized(lambda: statistics(kwargs, trained, outputs, **options))
    assert_statistics_parity(got, kwargs, trained, outputs, **options)
    return got


# One row a chunk, a few rows with a ragged last chunk, all rows.
@pytest.mark.parametrize("chunk_bytes", [1, 127 * 4 * 2 * 7, None], ids=str)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("hidden", "weight", "bias")], ids="+".join)
def test_statistics_and_gradients(chunk_bytes, trained):
    check(reference.sample((2, 5) if chunk_bytes == 1 else (4, 5)), trained, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7}], ids=["plain", "capped"])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_every_dtype(dtype, options, trained):
    got = check(reference.sample((2, 4), 300, dtype=dtype), trained, chunk_bytes=9000, **options)
    assert got[0].dtype == torch.float32 and all(x.dtype == dtype for x in got[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("directions", [("logprobs", "entropy"), ("logprobs", "logsumexp", "kl")], ids="+".join)
def test_a_frozen_head_keeps_several_directions(dtype, directions):
    kwargs = reference.sample((3, 5), 140, dtype=dtype)
    check(kwargs, ("hidden",), directions, directions=directions, temperature=torch.rand(3, 5) + 0.5, chunk_bytes=9000)


def test_a_frozen_head_costs_one_launch_each_way_and_its_backward_none():
    kwargs = leaves(reference.sample((2, 4), ref=False), ("hidden",))
    (out, launches) = sanitized(lambda: rlhf_fast.linear_token_logprobs(**kwargs))
    assert launches == ["kernel", "backward_kernel"]
    _, launches = sanitized(lambda: torch.autograd.grad(out.logprobs.sum(), kwargs["hidden"]))
    assert launches == []


def test_chunks_of_one_budget_are_one_launch_each():
    kwargs = reference.sample((2, 4), ref=False)
    rows = 3 * (pitch(127) + 3 * 24) * 4
    _, launches = sanitized(lambda: statistics(kwargs, (), chunk_bytes=rows))
    assert launches == ["kernel"] * 3


def test_rows_have_the_same_bits_in_any_chunk_and_order():
    kwargs = reference.sample((3, 3))
    expected, _ = sanitized(lambda: statistics(kwargs, ("hidden",), NAMES[:1]))
    for order, budget in (("reverse", 1), ("shuffle", 127 * 4 * 2 * 7)):
        got, _ = sanitized(lambda b=budget: statistics(kwargs, ("hidden",), NAMES[:1], chunk_bytes=b), order)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
def test_masked_rows_never_show(trained):
    kwargs = reference.sample((3, 4))
    clean, _ = sanitized(lambda: statistics(kwargs, trained))
    bad = ~kwargs["mask"]
    dirty = {k: v.clone() for k, v in kwargs.items()}
    dirty["hidden"][bad] = NAN
    dirty["ref_hidden"][bad] = NAN
    dirty["token_ids"][bad] = 2**40
    temperature = torch.ones(3, 4).masked_fill(bad, NAN)
    got, _ = sanitized(lambda: statistics(dirty, trained, temperature=temperature))
    for a, b in zip(clean, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert bad.any() and all(not x[bad].any() for x in got[:5])


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
@pytest.mark.parametrize("outputs", [("logprobs",), ("logprobs", "entropy")], ids="+".join)
def test_an_illegal_row_is_nan_and_has_no_gradient(trained, outputs):
    kwargs = reference.sample((2, 4), ref=False)
    kwargs["mask"], kwargs["token_ids"] = None, kwargs["token_ids"].clamp(0)
    temperature = torch.ones(2, 4)
    kwargs["token_ids"][0, 2], temperature[1, 1] = 127, -1.0
    got, _ = sanitized(lambda: statistics(kwargs, trained, outputs, temperature=temperature))
    wrong = torch.zeros(2, 4, dtype=torch.bool)
    wrong[0, 2] = wrong[1, 1] = True
    assert all(x[wrong].isnan().all() and x[~wrong].isfinite().all() for x in got[:3])
    assert not got[3][wrong].any() and all(x.isfinite().all() for x in got[3:])
    right = {**kwargs, "mask": ~wrong}
    without, _ = sanitized(lambda: statistics(right, trained, outputs, temperature=temperature))
    for a, b in zip(got[3:], without[3:], strict=True):
        torch.testing.assert_close(a, b)


class _Waits(TorchDispatchMode):
    """Records operators whose result the host waits for on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_never_waits_for_the_device(dtype):
    k = reference.sample((2, 4), dtype=dtype)
    order = ("hidden", "weight", "bias", "token_ids", "mask")
    head = (*(k[n] for n in order), torch.ones(2, 4), k["ref_hidden"], k["ref_weight"], None, 1.0, 0.0, 5000)
    upstream = tuple(torch.ones(2, 4) for _ in range(4))
    with torch.no_grad(), _Waits() as waits:
        out = linear_module._forward_triton(*head, True, [True, True, False, False])
        linear_module._backward_triton(*head, out[4], *upstream, [True, True, True])
    assert waits.found == []
    with torch.no_grad(), _Waits() as waits:
        linear_module._forward(*head, True, [True, True, False, False])
    assert "nonzero" in waits.found  # the CPU looks at the mask
    p = ppo_reference.sample((2, 4), dtype=dtype)
    wide = {n: x.float() for n, x in p.items() if x.is_floating_point() and n not in order}
    args = (
        *(p[n] for n in order), None, wide["old_logprobs"], wide["advantages"], wide["ref_logprobs"], wide["values"],
        wide["old_values"], wide["returns"], wide["importance_weights"], None, None, 1.0, 0.0, 0.2, 0.2, float("inf"),
        float("inf"), 0.01, 0.1, "k3", float("inf"), float("inf"), 0.2, 0.1, "token-mean", 0.0, 5000, [True] * 4,
    )  # fmt: skip
    with torch.no_grad(), _Waits() as waits:
        found = ppo_module._forward_triton(*args)
    assert waits.found == [] and found[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 4.0, "temperature": 0.7, "reduction": "seq-mean-token-mean"},
        {"entropy_coef": 0.0, "kl_coef": 0.0},
    ],
    ids=["plain", "capped", "policy alone"],
)
@pytest.mark.parametrize("trained", [("hidden", "values"), ("hidden", "weight", "bias", "values")], ids="+".join)
def test_ppo_loss_and_gradients(dtype, options, trained):
    kwargs = ppo_reference.sample((3, 5), 150, dtype=dtype)
    options = {**FULL, **options}
    got, launches = sanitized(lambda: ppo(kwargs, trained, chunk_bytes=9000, **options))
    assert set(launches) == {"kernel", "backward_kernel", "_loss"}  # the last is that of ppo_loss
    assert_ppo_parity(got, kwargs, trained, **options)


def test_ppo_without_gradient_takes_no_backward_kernel():
    kwargs = ppo_reference.sample((2, 4))
    with torch.no_grad():
        out, launches = sanitized(lambda: rlhf_fast.linear_ppo_loss(**kwargs, **FULL))
    assert launches == ["kernel", "_loss"] and out.loss.isfinite()


def test_doubles_are_declined():
    with on_cpu("triton"), pytest.raises(RuntimeError, match="fp64 is left to the reference"):
        rlhf_fast.linear_token_logprobs(**reference.sample((2,), dtype=torch.float64))
