from __future__ import annotations

import math

import pytest
import torch
from gpu.interpreter.per_token import check, in_every_order, poisoned, same, sanitized
from rlhf_fast.kernels import whiten as kernels

import rlhf_fast
from rlhf_fast.reference import whiten as reference


def call(**kwargs):
    return {"y": rlhf_fast.whiten(**kwargs)}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "BLOCKS", 2)
    monkeypatch.setattr(kernels, "MAX_PARTS", 4)


# A scalar; empty; one entry; short of a block; one part and its neighbours; several.
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 7), (4095,), (4097,), (33, 650)], ids=str)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_parity(shape, shift_mean):
    kwargs = reference.sample(shape)
    for unbiased, eps in ((True, 1e-8), (False, 0.3)):
        run = check(lambda **k: call(**k, shift_mean=shift_mean, unbiased=unbiased, eps=eps), kwargs, ["x"])  # noqa: B023
        assert len(run.launches) == (4 if kwargs["x"].numel() else 0)


@pytest.mark.parametrize("n", [15, 16, 33, 100, 129, 500])
@pytest.mark.parametrize("masked", ["some", "none", "all", "most"])
def test_parts_of_many_sizes(n, masked, small_blocks):
    kwargs = reference.sample((n,), dtype=torch.float16)
    kwargs["mask"] = {
        "some": kwargs["mask"], "none": None, "all": torch.zeros(n, dtype=torch.bool), "most": torch.arange(n) == n - 2,
    }[masked]  # fmt: skip
    check(call, kwargs, ["x"], order="shuffle")


def test_a_mean_far_from_zero_costs_no_digits(small_blocks):
    x = 1e4 + torch.arange(300.0) / 64
    near, far = sanitized(call, {"x": x - 1e4}), sanitized(call, {"x": x})
    torch.testing.assert_close(far.results["y"], near.results["y"], atol=1e-6, rtol=0)
    x[0] = -1e6  # an outlier in front
    check(call, {"x": x})


def test_equal_entries_give_exactly_zero(small_blocks):
    for n in (3, 37, 99):
        assert not sanitized(call, {"x": torch.full((n,), 0.1)}).results["y"].any()


def test_masked_entries_are_never_read_and_every_byte_moves_once():
    kwargs = reference.sample((9, 1000))
    clean = in_every_order(call, kwargs, ["x"])
    for poison in (math.nan, math.inf):
        assert same(clean, sanitized(call, poisoned(kwargs, kwargs["mask"], poison), ["x"]))
    real, n = int(kwargs["mask"].sum()), kwargs["mask"].numel()
    moments, standardise, products, adjoint = clean.launches
    parts = 3
    assert (moments.load_bytes, moments.store_bytes) == (n + 4 * real, 16 * parts)
    assert (standardise.load_first, standardise.store_bytes) == (n + 4 * real + 16 * parts, 4 * n)
    assert (products.load_bytes, products.store_bytes) == (n + 8 * real, 24 * parts)
    assert (adjoint.load_first, adjoint.store_bytes) == (n + 8 * real + 24 * parts, 4 * n)


def test_a_nan_spreads_to_every_real_entry():
    x = torch.randn(50)
    x[7] = math.nan
    check(call, {"x": x, "mask": torch.arange(50) < 40})
