from __future__ import annotations

import pytest
import torch
from parity import assert_parity, double
from torch.library import opcheck

import rlhf_fast
from rlhf_fast.ops import cached_attention
from rlhf_fast.ops.cached_attention import attend
from rlhf_fast.reference.cached_attention import sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = ({}, {"softcap": 2.0}, {"window": 3}, {"window": 70, "scale": 0.3})


def run(x: dict, backend: str = "cpp", **options):
    with rlhf_fast.use_backend(backend):
        return cached_attention(**x, **options)


# Narrow heads, odd widths, whole vectors, values of another width; keys of less than a block and of several.
@pytest.mark.parametrize("shape", [(6, 2, 8, 8), (3, 3, 24, 40), (9, 3, 64, 64), (4, 1, 130, 16)], ids=str)
@pytest.mark.parametrize("lengths", [(11, 9), (150, 200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(shape, lengths, dtype):
    x = sample(13, *shape, prompt_length=lengths[0], room=lengths[1], dtype=dtype)
    for options in OPTIONS:
        plain = run(x, "reference", **options)
        assert_parity(run(x, **options), run(double(x), "reference", **options), plain)


def test_the_reference_is_softmax_attention_over_the_keys_side_by_side():
    x = double(sample(5, 6, 2, 16))
    got = run(x, "reference")
    for i in range(5):
        r, p = x["rows"][i], x["prefix_rows"][i]
        seen, n = slice(x["prefix_start"][i], x["prefix_stop"][i]), x["lengths"][i]
        k = torch.cat([x["prefix_keys"][p, :, seen], x["keys"][r, :, :n]], 1).repeat_interleave(3, 0)
        v = torch.cat([x["prefix_values"][p, :, seen], x["values"][r, :, :n]], 1).repeat_interleave(3, 0)
        expected = torch.nn.functional.scaled_dot_product_attention(x["query"][i][:, None], k, v)[:, 0]
        torch.testing.assert_close(got[i], expected)


PREFIX = ("prefix_keys", "prefix_values", "prefix_rows", "prefix_start", "prefix_stop")
SLOTS = ("keys", "values", "rows", "lengths")


def test_prefixes_alone_and_slots_alone():
    x = sample(7, 4, 2, 32)
    for names in (PREFIX, SLOTS):
        part = {name: x[name] for name in ("query", *names)}
        assert_parity(run(part), run(double(part), "reference"), run(part, "reference"))


def test_a_token_without_keys_gives_zero():
    x = sample(4, 4, 2, 16)
    x["lengths"][1] = 0
    x["prefix_stop"][1] = x["prefix_start"][1]
    for backend in ("cpp", "reference"):
        out = run(x, backend)
        assert (out[1] == 0).all() and out[0].abs().sum() > 0


def test_what_is_not_seen_is_not_read():
    x = sample(6, 4, 2, 16)
    expected = run(x)
    poisoned = {k: v.clone() for k, v in x.items()}
    for name, stops in (("keys", "lengths"), ("values", "lengths")):
        seen = torch.zeros(poisoned[name].shape[0], poisoned[name].shape[2], dtype=torch.bool)
        for row, stop in zip(x["rows"], x[stops], strict=True):
            seen[row, :stop] = True
        poisoned[name].masked_fill_(~seen[:, None, :, None], torch.nan)
    for name in ("prefix_keys", "prefix_values"):
        seen = torch.zeros(poisoned[name].shape[0], poisoned[name].shape[2], dtype=torch.bool)
        for row, start, stop in zip(x["prefix_rows"], x["prefix_start"], x["prefix_stop"], strict=True):
            seen[row, start:stop] = True
        poisoned[name].masked_fill_(~seen[:, None, :, None], torch.nan)
    assert torch.equal(run(poisoned), expected)


def test_a_token_has_the_same_bits_in_any_batch_behind_any_padding_and_thread_count():
    x = sample(40, 6, 2, 24, prompt_length=150, room=80, dtype=torch.bfloat16)
    whole = run(x)
    torch.set_num_threads(1)
    tokens = ("query", "rows", "lengths", "prefix_rows", "prefix_start", "prefix_stop")
    wider = {**x, **{n: torch.nn.functional.pad(x[n], (0, 0, 17, 0)) for n in ("prefix_keys", "prefix_values")}}
    wider |= {n: x[n] + 17 for n in ("prefix_start", "prefix_stop")}
    for i in range(40):
        alone = {**wider, **{n: wider[n][i : i + 1] for n in tokens}}
        assert torch.equal(run(alone)[0], whole[i])


def test_any_strides():
    x = sample(5, 4, 2, 16)
    expected = run(x)
    moved = {k: (v.transpose(1, 2).contiguous().transpose(1, 2) if v.dim() > 2 else v) for k, v in x.items()}
    assert torch.equal(run(moved), expected)
    spread = {k: (torch.stack([v, v], -1)[..., 0] if v.dim() == 4 else v) for k, v in x.items()}
    assert torch.equal(run(spread), expected)


def test_large_scores_do_not_overflow():
    x = sample(5, 4, 2, 16)
    x["query"] = x["query"] * 1e4
    assert_parity(run(x), run(double(x), "reference"), run(x, "reference"))


def test_new_keys_are_written_to_their_slots_before_they_are_read():
    x = sample(6, 6, 2, 16, dtype=torch.bfloat16)
    x["lengths"].clamp_(min=1)
    new_keys, new_values = torch.randn(2, 6, 2, 16).to(torch.bfloat16).unbind(0)
    stored = {k: v.clone() for k, v in x.items()}
    for i, (row, n) in enumerate(zip(x["rows"], x["lengths"], strict=True)):
        stored["keys"][row, :, n - 1], stored["values"][row, :, n - 1] = new_keys[i], new_values[i]
    expected = run(stored)
    args = [x[name] for name in ("query", *SLOTS, *PREFIX)]
    assert torch.equal(attend(*args, 16**-0.5, 0.0, 0, new_keys, new_values), expected)
    assert torch.equal(x["keys"], stored["keys"]) and torch.equal(x["values"], stored["values"])


def test_instruction_sets_agree(each_isa):
    x = sample(9, 6, 2, 40, prompt_length=100, room=50)
    (_, first), *others = each_isa(lambda: run(x, softcap=3.0))
    for _, other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-6)


def test_fp64_and_heads_too_wide_are_left_to_the_reference():
    for x in (double(sample(2, 2, 1, 8)), sample(2, 2, 1, 1040)):
        with rlhf_fast.use_backend(None):
            got = cached_attention(**x)
        assert torch.equal(got, run(x, "reference"))
        with rlhf_fast.use_backend("cpp"), pytest.raises(RuntimeError, match="declines this call"):
            cached_attention(**x)


def test_opcheck():
    x = sample(3, 4, 2, 8)
    args = tuple(x[name] for name in ("query", *SLOTS, *PREFIX))
    opcheck(torch.ops.rlhf_fast.cached_attention, (*args, 0.3, 0.0, 0))
    opcheck(torch.ops.rlhf_fast.cached_attention, (*args[:5], *[None] * 5, 0.3, 2.0, 4))


X = sample(3, 4, 2, 8)


@pytest.mark.parametrize(
    ("kind", "message", "change"),
    [
        (TypeError, "'query' got torch.int64", {"query": torch.zeros(3, 4, 8, dtype=torch.int64)}),
        (ValueError, "'query' got shape", {"query": torch.zeros(4, 8)}),
        (TypeError, "'keys' got torch.float64", {"keys": X["keys"].double()}),
        (ValueError, "'keys' got shape", {"keys": X["keys"][..., :6]}),
        (ValueError, "'keys' got shape", {"keys": X["keys"].repeat(1, 2, 1, 1)[:, :3], "values": X["values"].repeat(1, 2, 1, 1)[:, :3]}),
        (ValueError, "'values' got shape", {"values": X["values"][:2]}),
        (TypeError, "'lengths' got None", {"lengths": None}),
        (TypeError, "'rows' got torch.int32", {"rows": X["rows"].int()}),
        (ValueError, "'rows' got shape", {"rows": X["rows"][:2]}),
        (ValueError, "'rows' got 0 to 4", {"rows": torch.tensor([0, 4, 1])}),
        (ValueError, "'lengths' got 0 to 10", {"lengths": torch.tensor([0, 10, 1])}),
        (ValueError, "'prefix_stop' got -1 to 3", {"prefix_stop": torch.tensor([3, -1, 1])}),
        (TypeError, "'keys' got None", dict.fromkeys(X.keys() - {"query"})),
        (ValueError, "'softcap' got 0", {"softcap": 0.0}),
        (ValueError, "'window' got 0", {"window": 0}),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(kind, message, change):
    with pytest.raises(kind, match=f"cached_attention: argument {message}"):
        cached_attention(**{**X, **change})
