"""Direct preference losses: sums over the tokens, loss, rewards and both gradients in one launch (the scheme of ppo_loss.py).

A program takes whole pairs, at most MAX_PARTS programs all of them. It sums the tokens of both answers, and then writes what it found
at every real token of them: log-probs are read once, token masks a second time, out of a cache. Sums are fp64, since a loss sees the
difference of thousands of nats.
"""

import triton
import triton.language as tl
from rlhf_fast.kernels.common.grid import add_count, is_last, reset, take_ticket, whole_count
from rlhf_fast.kernels.common.launch import on_device
from rlhf_fast.kernels.common.layout import same_order, spread
from rlhf_fast.kernels.common.moments import MAX_PARTS
from rlhf_fast.kernels.common.scan import left, mask_from, row_of
from rlhf_fast.kernels.common.token_losses import exp_of, log1p_of
from torch import Tensor, float64

from rlhf_fast._counters import counters_for
from rlhf_fast.reference.dpo_loss import CURVES

BLOCK, WARPS = 1024, 8

LOGISTIC, HINGE, SQUARE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Order of reference CURVES."""


@triton.jit
def _real(mask, pair):
    """Whether a pair is in the batch."""
    if mask is None:
        return tl.full((), True, tl.int1)
    else:
        return tl.load(mask + pair) != 0


@triton.jit
def _block(logprobs, ref, mask, begin, size, start, BLOCK: tl.constexpr):
    """(what is summed of the block of an answer that begins at its token `start`, fp64; its real tokens)"""
    lane = tl.arange(0, BLOCK)
    first = begin + start
    real = mask_from(mask, first, lane, lane < left(size, start, BLOCK))
    x = tl.load(logprobs + first + lane, real, other=0.0).to(tl.float64)
    if ref is not None:
        x -= tl.load(ref + first + lane, real, other=0.0).to(tl.float64)
    return x, real.to(tl.int32)


@triton.jit
def _mean(total, count, AVERAGE: tl.constexpr):
    """(what is compared of an answer, its derivative towards a log-prob), fp64: the sum or, with AVERAGE, the mean of its real tokens."""
    part = tl.full((), 1.0, tl.float64)
    if AVERAGE:
        part = part / tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
    return tl.sum(total, 0) * part, part


@triton.jit
def _fill(grad, mask, begin, size, real, value, BLOCK: tl.constexpr):
    """`value` at the real tokens of the answer of a `real` pair, 0 at the others."""
    lane = tl.arange(0, BLOCK)
    for i in range(tl.cdiv(size, BLOCK)):
        first = begin + i * BLOCK
        inside = lane < left(size, i * BLOCK, BLOCK)
        tl.store(grad + first + lane, tl.where(mask_from(mask, first, lane, inside & real), value, 0.0), inside)


@triton.jit
def _term(x, win, lose, CURVE: tl.constexpr):
    """(loss, its derivative) at x, fp64: win log(1 + e^-x) + lose log(1 + e^x), max(0, 1 - x), or x^2."""
    if CURVE == HINGE:
        short = 1.0 - x
        flat = tl.where(x == x, 0.0, x)
        return tl.where(short > 0, short, flat), tl.where(short > 0, -1.0, flat)
    elif CURVE == SQUARE:
        return x * x, 2.0 * x
    else:
        rounded = x.to(tl.float32)
        size = tl.abs(rounded)
        tail = exp_of(-size)
        # What the rounding took from |x| is lost to a large x, but not to e^-|x|.
        tail = tl.where(tail > 0, tail - tail * (tl.abs(x) - size.to(tl.float64)).to(tl.float32), tail)
        negative = rounded < 0.0
        near = log1p_of(tail)
        down = tl.div_rn(tl.where(negative, 1.0, tail), 1.0 + tail)  # s(-x)
        up = tl.div_rn(tl.where(negative, tail, 1.0), 1.0 + tail)  # s(x)
        loss = win * (near + tl.where(negative, size, 0.0))
        loss += tl.where(lose != 0, lose * (near + tl.where(negative, 0.0, size)), 0.0)  # 0 times infinity would be NaN
        return loss.to(tl.float64), (lose * up - win * down).to(tl.float64)


@same_order
def _loss(
    chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, mask, weights, normalizer, chosen_cu_seqlens,
    rejected_cu_seqlens, loss, rewards, grad_chosen, grad_rejected, parts, counters, chosen_tokens, rejected_tokens,
    chosen_length, rejected_length, pairs, pairs_per_part, n_parts, beta, scale, offset, win, lose, divisor,
    COUNTED: tl.constexpr, AVERAGE: tl.constexpr, CURVE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """COUNTED: the real pairs replace `divisor` as the denominator."""
    part = take_ticket(counters)
    if COUNTED:
        if part < n_parts:
            counted = tl.zeros((), tl.int64)
            for pair in range(part * pairs_per_part, tl.minimum((part + 1) * pairs_per_part, pairs)):
                counted += _real(mask, pair).to(tl.int32)
            add_count(counters, counted)
            return
        part -= n_parts
        denominator = whole_count(counters, n_parts).to(tl.float64)
    elif normalizer is not None:
        denominator = tl.load(normalizer).to(tl.float64)
    else:
        denominator = tl.zeros((), tl.float64) + divisor
    share = tl.where(denominator > 0, 1.0 / denominator, 0.0)

    total = tl.zeros((), tl.float64)
    for pair in range(part * pairs_per_part, tl.minimum((part + 1) * pairs_per_part, pairs)):
        real = _real(mask, pair)
        chosen_begin, chosen_size = row_of(chosen_cu_seqlens, pair, chosen_tokens, chosen_length)
        rejected_begin, rejected_size = row_of(rejected_cu_seqlens, pair, rejected_tokens, rejected_length)
        # Both answers in one loop: twice the loads are under way at a time.
        up_sum, up_count = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
        down_sum, down_count = up_sum, up_count
        longer = tl.where(real, tl.maximum(chosen_size, rejected_size), 0)
        for i in range(tl.cdiv(longer, BLOCK)):
            x, there = _block(chosen, ref_chosen, chosen_mask, chosen_begin, chosen_size, i * BLOCK, BLOCK)
            up_sum += x
            up_count += there
            x, there = _block(rejected, ref_rejected, rejected_mask, rejected_begin, rejected_size, i * BLOCK, BLOCK)
            down_sum += x
            down_count += there
        up, up_part = _mean(up_sum, up_count, AVERAGE)
        down, down_part = _mean(down_sum, down_count, AVERAGE)
        tl.store(rewards + pair, (beta * up).to(tl.float32))
        tl.store(rewards + pairs + pair, (beta * down).to(tl.float32))
        weight = share
        if weights is not None:
            weight *= tl.load(weights + pair, real).to(tl.float64)
        term, slope = _term(scale * (up - down) - offset, win, lose, CURVE)
        total += tl.where(real, weight * term, 0.0)
        slope *= weight * scale
        if grad_chosen is not None:
            value = (slope * up_part).to(tl.float32)
            _fill(grad_chosen, chosen_mask, chosen_begin, chosen_size, real, value, BLOCK)
        if grad_rejected is not None:
            value = (-slope * down_part).to(tl.float32)
            _fill(grad_rejected, rejected_mask, rejected_begin, rejected_size, real, value, BLOCK)
    tl.store(parts + part, total)
    if is_last(counters, n_parts):
        lane = tl.arange(0, PARTS)
        total = tl.sum(tl.load(parts + lane, lane < n_parts, other=0.0), 0)
        tl.store(loss, tl.where(share > 0, total, 0.0).to(tl.float32))
        reset(counters)


def forward(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None, chosen_mask: Tensor | None,
    rejected_mask: Tensor | None, mask: Tensor | None, weights: Tensor | None, normalizer: Tensor | None,
    chosen_cu_seqlens: Tensor | None, rejected_cu_seqlens: Tensor | None, beta: float, scale: float, offset: float, curve: str,
    win: float, lose: float, average: bool, divisor: float, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(loss, rewards (2, B), gradient of chosen, of rejected, or None where it is not wanted)."""
    pairs = chosen.shape[0] if chosen_cu_seqlens is None else chosen_cu_seqlens.shape[0] - 1
    rewards = chosen.new_empty(2, pairs)
    grad_chosen, grad_rejected = (
        x.new_empty(x.shape) if want else None for x, want in zip((chosen, rejected), wanted, strict=True)
    )
    if pairs == 0:
        return chosen.new_zeros(()), rewards, grad_chosen, grad_rejected
    loss = chosen.new_empty(())
    counted = mask is not None and normalizer is None and not divisor
    pairs_per_part = triton.cdiv(pairs, MAX_PARTS)
    count = triton.cdiv(pairs, pairs_per_part)
    parts = chosen.new_empty(count, dtype=float64)
    with on_device(chosen):
        _loss[(2 * count if counted else count,)](
            chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, mask, weights, normalizer,
            chosen_cu_seqlens, rejected_cu_seqlens, loss, rewards, grad_chosen, grad_rejected, parts, counters_for(chosen),
            chosen.numel(), rejected.numel(), chosen.shape[-1], rejected.shape[-1], pairs, pairs_per_part, count, beta, scale,
            offset, win, lose, divisor or float(pairs), counted, average, list(CURVES).index(curve), BLOCK,
            triton.next_power_of_2(count), **spread(WARPS),
        )  # fmt: skip
    return loss, rewards, grad_chosen, grad_rejected
