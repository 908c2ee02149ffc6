from __future__ import annotations

import math

import pytest
import torch
from gpu.interpreter.per_token import check, in_every_order, same, sanitized
from gpu.tools.on_cpu import on_cpu
from gpu.tools.sanitizer import Sanitizer
from rlhf_fast.kernels import cached_attention as kernels

import rlhf_fast
from rlhf_fast.reference.cached_attention import sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOTS = ("keys", "values", "rows", "lengths")
PREFIX = ("prefix_keys", "prefix_values", "prefix_rows", "prefix_start", "prefix_stop")


def call(**kwargs):
    return {"out": rlhf_fast.cached_attention(**kwargs)}


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr(kernels, "PART", 32)


# Heads of a group of their own, of several groups, more than a tile has; narrow, odd and wide heads.
@pytest.mark.parametrize("shape", [(6, 2, 8, 8), (3, 3, 24, 40), (20, 1, 64, 64), (4, 2, 130, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(shape, dtype, short_parts):
    kwargs = sample(5, *shape, prompt_length=90, room=70, dtype=dtype)
    for options in ({}, {"softcap": 2.0, "scale": 0.3}, {"window": 3}, {"window": 70, "softcap": 2.0}):
        run = check(lambda options=options, **k: call(**k, **options), kwargs, order="shuffle")
        assert [launch.kernel for launch in run.launches] == ["_attend", "_combine"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_the_length_that_is_shipped(dtype):
    check(call, sample(2, 4, 2, 32, prompt_length=300, room=270, dtype=dtype))


def test_prefixes_alone_and_slots_alone(short_parts):
    kwargs = sample(5, 4, 2, 32, prompt_length=90, room=70)
    for names in (PREFIX, SLOTS):
        check(call, {name: kwargs[name] for name in ("query", *names)})


def test_a_token_without_keys_gives_zero_and_rows_out_of_range_have_none():
    kwargs = sample(6, 4, 2, 16)
    kwargs["lengths"][1:3] = 0
    kwargs["prefix_stop"][1] = kwargs["prefix_start"][1]
    assert not check(call, kwargs).results["out"][1].any()
    arguments = [kwargs[k] for k in ("query", *SLOTS, *PREFIX)]
    arguments[3], arguments[7] = torch.tensor([0, 7, -1, 7, -1, 7]), torch.tensor([0, 3, -1, 3, -1, 3])
    with Sanitizer() as s:
        out = kernels.forward(*arguments, 0.25, 0.0, 0)
    s.check()
    assert out[0].any() and not out[1:].any()


def test_what_is_not_seen_is_not_read(short_parts):
    kwargs = sample(6, 4, 2, 16, prompt_length=90, room=70)
    expected = sanitized(call, kwargs)
    poisoned = {k: v.clone() for k, v in kwargs.items()}
    for names, stops, row_of in ((SLOTS, "lengths", "rows"), (PREFIX, "prefix_stop", "prefix_rows")):
        for name in names[:2]:
            seen = torch.zeros(poisoned[name].shape[0], poisoned[name].shape[2], dtype=torch.bool)
            starts = kwargs["prefix_start"] if names is PREFIX else torch.zeros(6, dtype=torch.int64)
            for row, start, stop in zip(kwargs[row_of], starts, kwargs[stops], strict=True):
                seen[row, start:stop] = True
            poisoned[name].masked_fill_(~seen[:, None, :, None], math.nan)
    assert same(expected, sanitized(call, poisoned))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_in_any_batch_room_and_order_of_programs(dtype, short_parts):
    kwargs = sample(5, 6, 2, 24, prompt_length=90, room=70, dtype=dtype)
    whole = in_every_order(call, kwargs).results["out"]
    roomy = dict(kwargs)
    for name in ("keys", "values", "prefix_keys", "prefix_values"):
        wide = torch.full((*kwargs[name].shape[:2], 201, 31), math.nan, dtype=dtype)
        wide[:, :, : kwargs[name].shape[2], 3:27] = kwargs[name]
        roomy[name] = wide[..., 3:27]
    per_token = ("query", "rows", "lengths", "prefix_rows", "prefix_start", "prefix_stop")
    for i in range(5):
        alone = {k: v[i : i + 1] if k in per_token else v for k, v in roomy.items()}
        assert torch.equal(sanitized(call, alone).results["out"], whole[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [(16, 16), (24, 33)], ids=str)
def test_a_token_is_written_to_its_place_and_nowhere_else_and_is_seen(width, dtype, short_parts):
    """The first and the last place of a part, of the room, and none; keys of a slot whose positions do not follow each other."""
    kwargs = sample(6, 4, 2, *width, prompt_length=40, room=70, dtype=dtype)
    kwargs["lengths"] = torch.tensor([1, 32, 33, 0, 70, 64])
    new = [torch.randn(6, 2, 2 * w, generator=torch.Generator().manual_seed(w)).to(dtype)[..., ::2] for w in width]
    new[1] = new[1].contiguous()
    for name in SLOTS[:2]:
        kwargs[name] = kwargs[name].transpose(1, 2).contiguous().transpose(1, 2)
    written = {k: v.clone() for k, v in kwargs.items()}
    for i, (row, length) in enumerate(zip(kwargs["rows"], kwargs["lengths"], strict=True)):
        if length:
            for name, x in zip(SLOTS[:2], new, strict=True):
                kwargs[name][row, :, length - 1] = math.nan
                written[name][row, :, length - 1] = x[i]
    for options in ((0.25, 0.0, 0), (0.25, 2.0, 3)):
        given = {k: v.clone(memory_format=torch.preserve_format) for k, v in kwargs.items()}
        with Sanitizer(order="shuffle", seed=1) as s:
            out = kernels.forward(*(given[k] for k in ("query", *SLOTS, *PREFIX)), *options, *new)
            assert s.unwritten(out) == 0
        s.check()
        with Sanitizer():
            expected = kernels.forward(*(written[k] for k in ("query", *SLOTS, *PREFIX)), *options)
        assert torch.equal(out, expected)
        assert all(torch.equal(given[k], written[k]) for k in given) and out.isfinite().all()
        assert [launch.kernel for launch in s.launches] == ["_attend", "_combine"]


def test_a_row_out_of_range_writes_nothing():
    kwargs = sample(4, 4, 2, 16)
    kwargs["rows"] = torch.tensor([-1, 5, 0, 9])
    arguments = [kwargs[k].clone() for k in ("query", *SLOTS, *PREFIX)]
    new = torch.ones(4, 2, 16)
    with Sanitizer() as s:
        kernels.forward(*arguments, 0.25, 0.0, 0, new, new)
    s.check()
    for before, after in zip((kwargs["keys"], kwargs["values"]), arguments[1:3], strict=True):
        before[0, :, kwargs["lengths"][2] - 1] = 1.0
        assert kwargs["lengths"][2] > 0 and torch.equal(before, after)


def test_keys_are_read_once_for_the_heads_that_share_them():
    kwargs = sample(4, 8, 2, 64, prompt_length=40, room=30, dtype=torch.bfloat16)
    attend, combine = sanitized(call, kwargs).launches
    keys = int((kwargs["prefix_stop"] - kwargs["prefix_start"] + kwargs["lengths"]).sum())
    parts = int((kwargs["prefix_stop"] > kwargs["prefix_start"]).sum() + (kwargs["lengths"] > 0).sum())
    of_token = 5 * 8 + 8 * 64 * 2  # places and the query
    heads, both = 2 * 2 * 64 * 2, 2 * 2  # keys and values of a position; kv heads, parts of a token
    assert attend.load_bytes == keys * heads + 4 * (both * 5 * 8 + 2 * 8 * 64 * 2)
    assert attend.load_first <= keys * heads + 4 * of_token
    assert attend.store_bytes == 4 * 2 * 8 * 8 + parts * 8 * 64 * 4
    assert combine.store_bytes == 4 * 8 * 64 * 2


def test_no_token_and_no_key():
    kwargs = sample(4, 4, 2, 16)
    assert not check(
        call, {k: v[:0] if k in ("query", *SLOTS[2:], *PREFIX[2:]) else v for k, v in kwargs.items()}
    ).launches
    empty = {**kwargs, "lengths": kwargs["lengths"] * 0, "prefix_start": kwargs["prefix_stop"]}
    for name in ("keys", "values", "prefix_keys", "prefix_values"):
        empty[name] = kwargs[name][:, :, :0]
    empty |= {"prefix_start": kwargs["lengths"] * 0, "prefix_stop": kwargs["lengths"] * 0}
    assert not check(call, empty).results["out"].any()


def test_doubles_and_wide_heads_are_declined():
    for kwargs, reason in (
        (sample(2, dtype=torch.float64), "fp64 is left to the reference"),
        (sample(2, 2, 1, 300), "heads are wider than 256"),
    ):
        with on_cpu("triton"), pytest.raises(RuntimeError, match=reason):
            call(**kwargs)
