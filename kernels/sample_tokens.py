"""A token per row of logits, its log-probability and the entropy of its distribution: two launches, one read of the logits from memory.

Few rows have to fill a device, so a row is cut into parts of a fixed number of classes, one program each: the first launch leaves the
sums of every part relative to its own maximum (Milakov & Gimelshein 2018, arXiv 1805.02867, Algorithm 3). In the second one, a
program of each row adds the parts up in fp64, finds the one in which the cumulative probability exceeds the row's number, and reads
that part again, which is still in the cache: of 151,936 classes in bf16, 303,872 bytes from memory, 8,192 from the cache and 456 of
sums written and read again.

A class is taken with a probability of its own alone (> 0 in fp32). What a row gives follows from its classes and its number:
parts are counted from the first class, whatever else is in the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels.common.launch import ceil_div, next_power_of_2, on_device
from rlhf_fast.kernels.common.layout import spread
from rlhf_fast.kernels.common.softmax import (
    LARGEST,
    LN_2,
    LOG2_E,
    add_terms,
    capped,
    finite_or_nan,
    log_of,
    point_of,
    raised,
    scale_of,
    widened,
)
from rlhf_fast.kernels.token_logprobs import _bytes, _row_of, _scale, aligned

from rlhf_fast._native import contiguous

LARGE, CLASSES, WARPS = 4096, (32 * 32, 64 * 64), (2, 8)
"""A vocabulary up to LARGE has parts of the first size, a larger one of the second: 16 logits a thread."""

_NUMBERS = ["bans", "inner", "outer_stride", "inner_stride", "vocab", "scale_value", "softcap", "parts"]
"""Arguments whose value is no reason to compile again; `VECTOR` tells what there is to know about the strides."""


@triton.jit
def _read(row, mask, temperature, scale_value, MASK: tl.constexpr, TEMPERATURE: tl.constexpr, GREEDY: tl.constexpr):
    """(whether the row counts, whether its temperature is in range, 1 / temperature, whether that is 0)."""
    real = row >= 0
    if MASK:
        real = tl.load(mask + row) != 0
    legal = row >= 0
    greedy = row < 0
    scale = scale_value
    if TEMPERATURE:
        given = tl.load(temperature + row, mask=real)
        legal = (given >= 0.0) & (given < float("inf"))
        greedy = given == 0.0
        scale = tl.where(greedy, 1.0, scale_of(given))
    if GREEDY:
        greedy = row >= 0
    return real, legal, scale, greedy


@triton.jit
def _part_of(
    z,
    begin,
    banned,
    bans,
    vocab,
    softcap,
    BANS: tl.constexpr,
    CAP: tl.constexpr,
    VECTOR: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """The capped logits of a part, -inf past the end and where a class is banned."""
    lanes = tl.arange(0, CLASSES)
    inside = lanes < tl.multiple_of(vocab - begin, VECTOR)
    y = capped(widened(tl.load(z + begin + lanes, mask=inside)), softcap, CAP)
    y = tl.where(inside, y, float("-inf"))
    if BANS:
        for k in range(bans):
            at = tl.load(banned + k) - begin
            if (at >= 0) & (at < CLASSES):
                y = tl.where(lanes == at, float("-inf"), y)
    return y


@triton.jit(do_not_specialize=_NUMBERS)
def _sum_parts(
    logits,  # rows of `vocab`
    banned,  # (bans,)
    mask,  # (rows,) uint8, as the following
    temperature,
    sums,  # (rows, 3, parts): largest logit, sum e, sum e d
    bans,
    inner,
    outer_stride,
    inner_stride,
    vocab,
    scale_value,
    softcap,
    parts,
    MASK: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    GREEDY: tl.constexpr,
    BANS: tl.constexpr,
    CAP: tl.constexpr,
    VECTOR: tl.constexpr,
    CLASSES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts
    real, legal, scale, _ = _read(row, mask, temperature, scale_value, MASK, TEMPERATURE, GREEDY)
    if not (real & legal):
        return
    z = _row_of(logits, row, inner, outer_stride, inner_stride, VECTOR)
    y = _part_of(z, part * CLASSES, banned, bans, vocab, softcap, BANS, CAP, VECTOR, CLASSES)
    top = tl.max(y, 0)
    place, offset, _ = point_of(top, tl.minimum(scale * LOG2_E, LARGEST))
    nothing = tl.zeros([CLASSES], tl.float32)
    e, weighted = add_terms(y, place, offset, nothing, nothing)
    sums += row * (3 * parts) + part
    tl.store(sums, top)
    tl.store(sums + parts, tl.sum(e, 0))
    tl.store(sums + 2 * parts, tl.sum(weighted, 0))


@triton.jit
def _first_alive(e, left, SIZE: tl.constexpr):
    """(the first place with e > 0 where the sum up to it exceeds `left`, or the last with e > 0; what is left of `left` before it)."""
    at = tl.arange(0, SIZE)
    alive = e > 0.0
    place = tl.min(tl.where(alive & (tl.cumsum(e, 0) > left), at, SIZE), 0)
    if place == SIZE:  # rounding keeps the sum below
        place = tl.max(tl.where(alive, at, 0), 0)
    return place, left - tl.sum(tl.where(at < place, e, 0.0), 0)


@triton.jit
def _first_above(e, left, CLASSES: tl.constexpr, WIDTH: tl.constexpr):
    """The same of a part, WIDTH classes at a time and then one: a scan of all of them would hold each in several registers."""
    lines = tl.reshape(e, [CLASSES // WIDTH, WIDTH])
    line, left = _first_alive(tl.sum(lines, 1), left, CLASSES // WIDTH)
    here = tl.arange(0, CLASSES // WIDTH)[:, None] == line
    place, _ = _first_alive(tl.sum(tl.where(here, lines, 0.0), 0), left, WIDTH)
    return line * WIDTH + place


@triton.jit(do_not_specialize=_NUMBERS)
def _choose(
    logits,
    banned,
    uniform,  # (rows,) fp64
    mask,
    temperature,
    sums,
    token_ids,  # (rows,), as the following
    logprobs,
    entropy,
    bans,
    inner,
    outer_stride,
    inner_stride,
    vocab,
    scale_value,
    softcap,
    parts,
    MASK: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    GREEDY: tl.constexpr,
    BANS: tl.constexpr,
    CAP: tl.constexpr,
    VECTOR: tl.constexpr,
    CLASSES: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    real, legal, scale, greedy = _read(row, mask, temperature, scale_value, MASK, TEMPERATURE, GREEDY)
    number = tl.full((), 0.0, tl.float64)
    if not GREEDY:
        number = tl.load(uniform + row, mask=real)
        legal = legal & (greedy | ((number >= 0.0) & (number < 1.0)))
    if not (real & legal):
        nothing = tl.where(real, float("nan"), 0.0)
        tl.store(token_ids + row, tl.where(real, -1, 0))
        tl.store(logprobs + row, nothing)
        tl.store(entropy + row, nothing)
        return

    lanes = tl.arange(0, PARTS)
    there = lanes < parts
    sums += row * (3 * parts)
    tops = tl.load(sums + lanes, there, other=float("-inf"))
    part_sums = tl.load(sums + parts + lanes, there, other=0.0)
    part_weighted = tl.load(sums + 2 * parts + lanes, there, other=0.0)
    scale2 = tl.minimum(scale * LOG2_E, LARGEST)
    top = tl.max(tops, 0)
    place, offset, rest = point_of(top, scale2)
    _, _, part_rest = point_of(tops, scale2)
    part_sums, part_weighted = raised(part_sums, part_weighted, tops, part_rest, top, place, rest)
    weights = part_sums.to(tl.float64)
    total = tl.sum(weights, 0)

    every, of_top = total.to(tl.float32), tl.exp2(rest)
    log_sum = finite_or_nan(log_of(tl.div_rn(every, of_top)), top)
    # sum e (d - rest), whose largest term is taken out as it came in: a certain row has an entropy of 0
    below = (tl.sum(part_weighted, 0) - of_top * rest) - rest * (every - of_top)
    mean = log_sum - LN_2 * tl.div_rn(below, every)
    mean = tl.where(mean < 0.0, 0.0, mean)
    if log_sum != log_sum:
        tl.store(token_ids + row, tl.full((), -1, tl.int64))
        tl.store(logprobs + row, log_sum)
        tl.store(entropy + row, log_sum)
        return

    if greedy:
        here = tops == top
    else:
        # The largest logit of a part has a probability, or none has: the test is that of the classes below, to the bit.
        here = tl.exp2(tl.fma(tops, place, -offset)) > 0.0
    part, left = _first_alive(tl.where(here, weights, 0.0), tl.where(greedy, -1.0, number * total), PARTS)

    z = _row_of(logits, row, inner, outer_stride, inner_stride, VECTOR)
    begin = part.to(tl.int64) * CLASSES
    y = _part_of(z, begin, banned, bans, vocab, softcap, BANS, CAP, VECTOR, CLASSES)
    at = tl.arange(0, CLASSES)
    if greedy:
        chosen = tl.min(tl.where(y == top, at, CLASSES - 1), 0)
    else:
        chosen = _first_above(tl.exp2(tl.fma(y, place, -offset)), left.to(tl.float32), CLASSES, WIDTH)
    of_token = tl.max(tl.where(at == chosen, y, float("-inf")), 0)
    tl.store(token_ids + row, begin + chosen)
    tl.store(logprobs + row, (of_token - top) * scale - log_sum)
    tl.store(entropy + row, mean)


def forward(  # type: ignore[no-untyped-def]
    logits, uniform, mask, temperature, banned_ids, temperature_value, softcap
):
    """The cell of sample_tokens. A row whose number or temperature is out of range has no token: -1 and NaN."""
    rows, vocab = logits.shape[:-1], logits.shape[-1]
    logits, _, layout, vectors = aligned(logits)
    uniform, temperature, banned_ids = map(contiguous, (uniform, temperature, banned_ids))
    mask = _bytes(mask)
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs, entropy = (torch.empty_like(token_ids, dtype=torch.float32) for _ in range(2))
    count = token_ids.numel()
    if count:
        classes, warps = CLASSES[vocab > LARGE], WARPS[vocab > LARGE]
        parts = ceil_div(vocab, classes)
        sums = logprobs.new_empty(count, 3, parts)
        greedy = temperature is None and temperature_value == 0
        numbers = (
            0 if banned_ids is None else banned_ids.numel(), *layout[:3], vocab,
            1.0 if temperature is not None or greedy else _scale(temperature_value), softcap, parts,
        )  # fmt: skip
        options = {
            "MASK": mask is not None, "TEMPERATURE": temperature is not None, "GREEDY": greedy,
            "BANS": banned_ids is not None, "CAP": softcap > 0,
            "VECTOR": vectors["VECTOR"], "CLASSES": classes,
        }  # fmt: skip
        with on_device(logits):
            _sum_parts[(count * parts,)](
                logits, banned_ids, mask, temperature, sums, *numbers, **options, **spread(warps)
            )
            _choose[(count,)](
                logits, banned_ids, uniform, mask, temperature, sums, token_ids, logprobs, entropy, *numbers,
                PARTS=next_power_of_2(parts), WIDTH=64 if vocab > LARGE else 32, **options, **spread(warps),
            )  # fmt: skip
    return token_ids, logprobs, entropy
