"""Attention of single tokens over keys and values in place: two launches, keys and values read once for the heads that share them.

A decode step has few queries, so the keys of a token are cut into parts of a fixed number, one program each (Flash-Decoding, Dao et
al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html): the first launch leaves the softmax of every part relative to its
own maximum, the second one adds the parts up in their order. Parts are counted from the first key of the prompt and from that of the
slot: what a token gives depends on its keys alone, whatever is in the batch and however much room there is. Where a token brings a
key of its own, the one program that reads its place writes it there first: a decode step needs no launch for that.

Queries of a group of heads are the rows of one product, fp32 without TF32; weights are rounded to the dtype of the values, sums are
fp32. No tile has 64 rows, from which on Triton would take other instructions of sm_90 and sm_100 for a product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels.common.launch import ceil_div, next_power_of_2, on_device
from rlhf_fast.kernels.common.layout import spread
from rlhf_fast.kernels.common.softmax import LOG2_E, capped

from rlhf_fast._native import contiguous
from rlhf_fast.ops.cached_attention import _dense

PART, WARPS = 256, 8
"""Keys of a part, and warps of a program."""

_NUMBERS = ["slots", "room", "prompts", "prompt_length", "own_parts", "parts", "scale", "softcap", "window"]


@triton.jit
def _count(row, rows, length, room):
    """Keys that are there: none in a row out of range."""
    return tl.where((row >= 0) & (row < rows), tl.minimum(tl.maximum(length, 0), room), 0)


@triton.jit
def _sum_part(
    q, keys, values, key_step, value_step, first, last, scale, softcap,
    CAP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """(largest exponent in base 2, sum e, sum e v) of the keys [first, last), of each query."""
    d, dv, k = tl.arange(0, D), tl.arange(0, DV), tl.arange(0, KEYS)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    found = tl.zeros([HEADS, DV], tl.float32)
    for begin in range(first, last, KEYS):
        there = k < last - begin
        at = keys + begin * key_step + k[None, :] * key_step + d[:, None]
        key = tl.load(at, there[None, :] & (d < WIDTH)[:, None], other=0.0)
        at = values + begin * value_step + k[:, None] * value_step + dv[None, :]
        value = tl.load(at, there[:, None] & (dv < VALUE_WIDTH)[None, :], other=0.0)
        score = capped(tl.dot(q, key, input_precision="ieee") * scale, softcap, CAP) * LOG2_E
        score = tl.where(there[None, :], score, float("-inf"))
        to = tl.maximum(top, tl.max(score, 1))
        factor = tl.exp2(top - to)
        e = tl.exp2(score - to[:, None])
        total = total * factor + tl.sum(e, 1)
        found = tl.dot(e.to(value.dtype), value, found * factor[:, None], input_precision="ieee")
        top = to
    return top, total, found


@triton.jit(do_not_specialize=_NUMBERS)
def _attend(
    query,  # (tokens, heads, width)
    keys,  # (slots, kv_heads, room, width)
    values,
    rows,  # (tokens,), as the following
    lengths,
    prefix_keys,  # (prompts, kv_heads, prompt_length, width)
    prefix_values,
    prefix_rows,
    prefix_start,
    prefix_stop,
    new_keys,  # (tokens, kv_heads, width)
    new_values,
    stats,  # (tokens, heads, parts, 2): largest exponent, sum e
    sums,  # (tokens, heads, parts, value_width)
    query_token, query_head, key_row, key_head, key_step, value_row, value_head, value_step,
    prefix_key_row, prefix_key_head, prefix_key_step, prefix_value_row, prefix_value_head, prefix_value_step,
    new_key_token, new_key_head, new_value_token, new_value_head,
    slots, room, prompts, prompt_length, own_parts, parts, scale, softcap, window,
    OWN: tl.constexpr, NEW: tl.constexpr, PREFIX: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    part, of_token = program % parts, program // parts
    head, token = of_token % KV_HEADS, of_token // KV_HEADS
    row, own, prompt, start, shared = token * 0, token * 0, token * 0, token * 0, token * 0
    if OWN:
        row = tl.load(rows + token)
        own = _count(row, slots, tl.load(lengths + token), room)
    if PREFIX:
        prompt = tl.load(prefix_rows + token)
        start = tl.maximum(tl.load(prefix_start + token), 0)
        shared = _count(prompt, prompts, tl.load(prefix_stop + token), prompt_length)
        shared = tl.maximum(shared - start, 0)
    unseen = token * 0
    if WINDOW:
        unseen = tl.maximum(shared + own - window, 0)

    h, d, dv = tl.arange(0, HEADS), tl.arange(0, D), tl.arange(0, DV)
    of_group = h < GROUP
    q = tl.load(
        query + token * query_token + (head * GROUP + h[:, None]) * query_head + d[None, :],
        of_group[:, None] & (d < WIDTH)[None, :],
        other=0.0,
    )
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    found = tl.zeros([HEADS, DV], tl.float32)
    if OWN and part < own_parts:
        first = part * PART
        last = tl.minimum(first + PART, own)
        if NEW and (first < own) & (own == last):
            at, to = new_keys + token * new_key_token + head * new_key_head, keys + row * key_row + head * key_head
            inside = d < WIDTH
            tl.store(to + (own - 1) * key_step + d, tl.load(at + d, inside), inside)
            at = new_values + token * new_value_token + head * new_value_head
            to = values + row * value_row + head * value_head
            inside = dv < VALUE_WIDTH
            tl.store(to + (own - 1) * value_step + dv, tl.load(at + dv, inside), inside)
            tl.debug_barrier()  # other threads read them
        top, total, found = _sum_part(
            q, keys + row * key_row + head * key_head, values + row * value_row + head * value_head, key_step, value_step,
            tl.maximum(first, unseen - shared), last, scale, softcap, CAP, WIDTH, VALUE_WIDTH, HEADS, D, DV, KEYS,
        )  # fmt: skip
    if PREFIX and part >= own_parts:
        first = (part - own_parts) * PART
        last = tl.minimum(first + PART, shared)
        top, total, found = _sum_part(
            q, prefix_keys + prompt * prefix_key_row + head * prefix_key_head + start * prefix_key_step,
            prefix_values + prompt * prefix_value_row + head * prefix_value_head + start * prefix_value_step,
            prefix_key_step, prefix_value_step, tl.maximum(first, unseen), last, scale, softcap,
            CAP, WIDTH, VALUE_WIDTH, HEADS, D, DV, KEYS,
        )  # fmt: skip
    place = (token * (KV_HEADS * GROUP) + head * GROUP + h) * parts + part
    tl.store(stats + place * 2, top, of_group)
    tl.store(stats + place * 2 + 1, total, of_group)
    if tl.max(total, 0) != 0.0:  # a part without keys has a sum of 0, and nothing else is read of it
        tl.store(
            sums + place[:, None] * VALUE_WIDTH + dv[None, :], found, of_group[:, None] & (dv < VALUE_WIDTH)[None, :]
        )


@triton.jit(do_not_specialize=["parts"])
def _combine(stats, sums, out, parts, VALUE_WIDTH: tl.constexpr, DV: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)  # of a token
    dv = tl.arange(0, DV)
    inside = dv < VALUE_WIDTH
    stats += head * parts * 2
    sums += head * parts * VALUE_WIDTH
    top = float("-inf")
    for part in range(parts):
        top = tl.maximum(top, tl.load(stats + part * 2))
    total = 0.0
    found = tl.zeros([DV], tl.float32)
    for part in range(parts):
        own = tl.load(stats + part * 2 + 1)
        if own != 0.0:
            factor = tl.exp2(tl.load(stats + part * 2) - top)
            total += factor * own
            found += factor * tl.load(sums + part * VALUE_WIDTH + dv, inside)
    found = tl.where(total == 0.0, 0.0, tl.div_rn(found, tl.where(total == 0.0, 1.0, total)))
    tl.store(out + head * VALUE_WIDTH + dv, found.to(out.dtype.element_ty), inside)


def forward(  # type: ignore[no-untyped-def]
    query, keys, values, rows, lengths, prefix_keys, prefix_values, prefix_rows, prefix_start, prefix_stop, scale, softcap,
    window, new_keys=None, new_values=None,
):  # fmt: skip
    """The cell of cached_attention. A token whose row is out of range has no keys there.

    new_keys, new_values: as in ops.cached_attention.attend.
    """
    query, prefix_keys, prefix_values, new_keys, new_values = map(
        _dense, (query, prefix_keys, prefix_values, new_keys, new_values)
    )
    if new_keys is None:
        keys, values = _dense(keys), _dense(values)
    places = [contiguous(x) for x in (rows, lengths, prefix_rows, prefix_start, prefix_stop)]
    own, shared = keys is not None, prefix_keys is not None
    tokens, heads, width = query.shape
    of_values = values if own else prefix_values
    kv_heads, value_width = of_values.shape[1], of_values.shape[3]
    out = query.new_empty(tokens, heads, value_width)
    slots, _, room = keys.shape[:3] if own else (0, 0, 0)
    prompts, _, prompt_length = prefix_keys.shape[:3] if shared else (0, 0, 0)
    own_parts = ceil_div(room, PART)
    parts = own_parts + ceil_div(prompt_length, PART)
    if not out.numel():
        return out
    if not parts:
        return out.zero_()
    stats = query.new_empty(tokens, heads, parts, 2, dtype=torch.float32)
    sums = query.new_empty(tokens, heads, parts, value_width, dtype=torch.float32)
    strides = [
        s for x in (keys, values, prefix_keys, prefix_values) for s in ((0,) * 3 if x is None else x.stride()[:3])
    ]
    strides += [s for x in (new_keys, new_values) for s in ((0,) * 2 if x is None else x.stride()[:2])]
    group = heads // kv_heads
    d, dv = (max(16, next_power_of_2(n)) for n in (width, value_width))
    with on_device(query):
        _attend[(tokens * kv_heads * parts,)](
            query, keys, values, places[0], places[1], prefix_keys, prefix_values, *places[2:], new_keys, new_values, stats, sums,
            *query.stride()[:2], *strides, slots, room, prompts, prompt_length, own_parts, parts, scale, softcap, window,
            OWN=own, NEW=new_keys is not None, PREFIX=shared, CAP=softcap > 0, WINDOW=window > 0, GROUP=group, KV_HEADS=kv_heads, WIDTH=width,
            VALUE_WIDTH=value_width, HEADS=max(16, next_power_of_2(group)), D=d, DV=dv, KEYS=min(32, max(16, 2048 // max(d, dv))),  # a thread holds few of a tile
            PART=PART, num_stages=1, **spread(WARPS),
        )  # fmt: skip
        _combine[(tokens * heads,)](stats, sums, out, parts, value_width, dv, **spread(1 if dv <= 64 else 4))
    return out
