from __future__ import annotations

import math

import pytest
import tolerances
import torch
from gpu.interpreter.per_token import check, in_every_order, poisoned, same, sanitized

import rlhf_fast
from rlhf_fast.ops.kl_estimate import ALL_KINDS
from rlhf_fast.reference import kl_estimate as reference
from rlhf_fast.reference.kl_estimate import KINDS

LEAVES = ("logprobs", "ref_logprobs")


def call(**kwargs):
    return {"kl": rlhf_fast.kl_estimate(**kwargs)}


# Empty; one token; short of a block; a block; two blocks and a bit.
@pytest.mark.parametrize("shape", [(0,), (1,), (5, 7), (1024,), (3, 689)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity(shape, dtype):
    kwargs = reference.sample(shape, dtype=dtype)
    for masked in (True, False):
        run = check(call, kwargs if masked else {**kwargs, "mask": None}, LEAVES)
        assert len(run.launches) == (2 if run.results["kl"].numel() else 0)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("clamp", [None, 0.5, (0.3, None), (20.0, 10.0)], ids=str)
def test_every_kind_and_bound(kind, clamp):
    check(lambda **k: call(**k, kind=kind, clamp=clamp), reference.sample((9, 31)), LEAVES)


def test_k3_keeps_its_digits_from_tiny_to_large_log_ratios():
    x = torch.cat([s * torch.logspace(-8, 1, 500, dtype=torch.float64) for s in (1, -1)]).float()
    got = sanitized(lambda **k: call(**k, kind="k3"), {"logprobs": torch.zeros_like(x), "ref_logprobs": x}, LEAVES)
    exact = torch.special.expm1(x.double()) - x.double()
    series = sum(x.double() ** n / math.factorial(n) for n in range(2, 14))
    exact = torch.where(x.abs() < 0.5, series, exact)
    assert ((got.results["kl"] - exact) / exact).abs().max() <= tolerances.K3_RELATIVE
    slope = got.results["d ref_logprobs"] / torch.linspace(-1, 1.5, len(x))
    assert (
        (slope - torch.special.expm1(x.double())) / torch.special.expm1(x.double())
    ).abs().max() <= tolerances.K3_RELATIVE


def test_infinite_and_nan_log_ratios_are_those_of_the_reference():
    x = torch.tensor([-math.inf, math.nan, 88.7, -100.0, -86.5, 20.0, 0.0])
    for kind in KINDS:
        check(lambda **k: call(**k, kind=kind), {"logprobs": torch.zeros(7), "ref_logprobs": x})  # noqa: B023


def test_masked_tokens_are_never_read_and_every_byte_moves_once():
    kwargs = reference.sample((4, 700))
    clean = in_every_order(lambda **k: call(**k, kind="k3"), kwargs, LEAVES)
    for poison in (math.nan, math.inf):
        dirty = poisoned(kwargs, kwargs["mask"], poison)
        assert same(clean, sanitized(lambda **k: call(**k, kind="k3"), dirty, LEAVES))
    assert not any(x[~kwargs["mask"]].any() for x in clean.results.values())
    real, n = int(kwargs["mask"].sum()), kwargs["mask"].numel()
    forward, backward = clean.launches
    assert (forward.load_bytes, forward.store_bytes) == (n + 8 * real, 4 * n)
    assert (backward.load_bytes, backward.store_bytes) == (n + 12 * real, 4 * n)
