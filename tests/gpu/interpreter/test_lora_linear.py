from __future__ import annotations

import math

import pytest
import torch
from gpu.interpreter.per_token import check, in_every_order, same, sanitized
from gpu.tools.on_cpu import on_cpu
from rlhf_fast.kernels import lora_linear as kernels

import rlhf_fast
from rlhf_fast.reference import lora_linear as reference

LEAVES = ("x", "lora_a", "lora_b")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Ranks of the segments; rows, in, out around the tiles: 32 rows, 64 or 128 columns, 16 or 64 of a rank.
SHAPES = [
    ((16, 16), 192, 128, 256),
    ((4, 8), 24, 40, 33),
    ((1,), 2, 1, 1),
    ((5, 1, 33), 140, 65, 129),
    ((256, 100), 99, 17, 70),
    ((), 7, 20, 9),
    ((0, 6), 12, 20, 9),
]


def call(**kwargs):
    return {"y": rlhf_fast.lora_linear(**kwargs)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(shape, dtype):
    ranks, rows, in_features, out_features = shape
    kwargs = reference.sample(rows, in_features, out_features, ranks, dtype=dtype)
    run = check(call, kwargs, LEAVES, order="shuffle")
    assert [launch.kernel for launch in run.launches] == (["_shrink", "_expand"] * 2 if any(ranks) else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_of_any_strides_and_dtypes_in_any_order_of_programs(dtype):
    kwargs = reference.sample(70, 40, 33, (4, 8), dtype=dtype)
    kwargs["lora_input"] = kwargs["x"] * (torch.rand(70, 40) > 0.5) * 2
    names = (*LEAVES, "lora_input")
    expected = in_every_order(call, kwargs, names)
    assert not expected.results["d lora_input"][23:46].any()  # rows without an adapter
    kwargs["lora_a"] = kwargs["lora_a"].t().contiguous().t()
    kwargs["lora_b"] = torch.cat([kwargs["lora_b"], torch.full((33, 5), math.nan)], 1)[:, :12]
    assert same(expected, sanitized(call, kwargs, names))
    kwargs |= {"lora_a": kwargs["lora_a"].to(dtype), "lora_b": kwargs["lora_b"].to(dtype)}
    check(call, kwargs, names)


@pytest.mark.parametrize("wanted", [("x",), ("lora_a",), ("lora_b",), ("x", "lora_b"), ("lora_input",)], ids=str)
def test_gradients_come_only_where_asked(wanted):
    kwargs = reference.sample(24, 40, 33, (4, 8))
    kwargs["lora_input"] = kwargs["x"].flip(0)
    full = sanitized(call, kwargs, (*LEAVES, "lora_input"))
    alone = sanitized(call, kwargs, wanted)
    assert all(torch.equal(alone.results[f"d {name}"], full.results[f"d {name}"]) for name in wanted)
    launches = {("lora_b",): 2, ("x",): 2, ("x", "lora_b"): 2, ("lora_a",): 3}
    assert len(alone.launches) == launches.get(wanted, 4)  # the product of x alone is PyTorch's


def test_more_segments_than_one_launch_has(monkeypatch):
    monkeypatch.setattr(kernels, "SEGMENTS", 4)
    kwargs = reference.sample(80, 40, 33, (3, 1, 4, 1, 5, 0, 2))
    run = check(call, kwargs, LEAVES)
    assert len(run.launches) == 8


def test_segments_without_rows_and_ranks():
    kwargs = reference.sample(90, 40, 33, (4, 8, 3, 2))
    kwargs |= {"segments": [(0, 0), (5, 40), (40, 40), (41, 90)], "ranks": [4, 0, 8, 5]}
    run = check(call, kwargs, LEAVES)
    assert len(run.launches) == 4
    kwargs["segments"] = [(0, 0), (0, 5), (5, 5), (90, 90)]
    assert not check(call, kwargs, LEAVES).launches


def test_doubles_are_declined():
    with on_cpu("triton"), pytest.raises(RuntimeError, match="fp64 is left to the reference"):
        call(**reference.sample(dtype=torch.float64))


def test_every_byte_of_an_update_moves_once():
    kwargs = reference.sample(96, 128, 256, (16, 16), dtype=torch.bfloat16, bias=False)
    shrink, expand = sanitized(call, kwargs).launches
    assert (shrink.load_first, shrink.store_bytes) == (64 * 128 * 2 + 32 * 128 * 4, 64 * 16 * 4)
    assert (expand.load_first, expand.store_bytes) == (64 * 256 * 2 + 64 * 16 * 4 + 32 * 256 * 4, 64 * 256 * 2)
