"""Bradley-Terry loss of a reward model: loss, statistics and both gradients in one launch (the scheme of ppo_loss.py)."""

import triton
import triton.language as tl
from rlhf_fast.kernels.common.grid import add_count, is_last, reset, take_ticket, whole_count
from rlhf_fast.kernels.common.launch import on_device
from rlhf_fast.kernels.common.layout import same_order, spread
from rlhf_fast.kernels.common.moments import MAX_PARTS
from rlhf_fast.kernels.common.scan import mask_at
from rlhf_fast.kernels.common.token_losses import exp_of, log1p_of
from torch import Tensor

from rlhf_fast._counters import counters_for
from rlhf_fast.reference.reward_loss import STATS

BLOCK, WARPS = 1024, 4

N_COLUMNS = 6
"""Of the parts (N_COLUMNS, n_parts), fp32: sums of loss, gap, chosen, rejected and centre, and twice the pairs in order."""


@triton.jit
def _total(parts, n_parts, column: tl.constexpr, PARTS: tl.constexpr):
    lane = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + column * n_parts + lane, lane < n_parts, other=0.0), 0)


@same_order
def _loss(
    chosen, rejected, margin, mask, loss, stats, grads, parts, counters, n, size, n_parts, center_coef, smoothing,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part = take_ticket(counters)
    pairs = tl.zeros((), tl.int64) + n
    if mask is not None:
        if part < n_parts:
            count = tl.zeros((BLOCK,), tl.int32)
            for i in range(0, size, BLOCK):
                at = part * size + i + tl.arange(0, BLOCK)
                count += mask_at(mask, at, at < n).to(tl.int32)
            add_count(counters, tl.sum(count, 0))
            return
        part -= n_parts
        pairs = whole_count(counters, n_parts)
    share = tl.div_rn(1.0, tl.maximum(pairs, 1).to(tl.float32))

    loss_sum, gap_sum, chosen_sum, rejected_sum, center_sum, ordered_sum = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(0, size, BLOCK):
        at = part * size + i + tl.arange(0, BLOCK)
        real = mask_at(mask, at, at < n)
        up = tl.load(chosen + at, real, other=0.0)
        down = tl.load(rejected + at, real, other=0.0)
        gap = up - down
        x = gap
        if margin is not None:
            x = gap - tl.load(margin + at, real)
        # (1 - e) softplus(-x) + e softplus(x) and its derivative, without overflow.
        tail = exp_of(-tl.abs(x))
        smoothed = tl.where(smoothing != 0, smoothing * x, 0.0)  # 0 times infinity would be NaN
        term = tl.where(x < 0.0, -x, 0.0) + log1p_of(tail) + smoothed
        slope = smoothing - tl.div_rn(tl.where(x < 0.0, 1.0, tail), 1.0 + tail)
        both = up + down
        ordered = (gap > 0).to(tl.float32) + (gap >= 0).to(tl.float32)
        loss_sum += tl.sum(tl.where(real, term, 0.0), 0)
        gap_sum += tl.sum(gap, 0)
        chosen_sum += tl.sum(up, 0)
        rejected_sum += tl.sum(down, 0)
        center_sum += tl.sum(both * both, 0)
        ordered_sum += tl.sum(tl.where(real, ordered, 0.0), 0)
        if grads is not None:
            centre = 2.0 * center_coef * both
            tl.store(grads + at, tl.where(real, (centre + slope) * share, 0.0), at < n)
            tl.store(grads + n + at, tl.where(real, (centre - slope) * share, 0.0), at < n)
    own = parts + part
    tl.store(own, loss_sum)
    tl.store(own + n_parts, gap_sum)
    tl.store(own + 2 * n_parts, chosen_sum)
    tl.store(own + 3 * n_parts, rejected_sum)
    tl.store(own + 4 * n_parts, center_sum)
    tl.store(own + 5 * n_parts, ordered_sum)
    if is_last(counters, n_parts):
        center = _total(parts, n_parts, 4, PARTS) * share
        centred = tl.where(center_coef != 0, center_coef * center, 0.0)
        tl.store(loss, _total(parts, n_parts, 0, PARTS) * share + centred)
        tl.store(stats, _total(parts, n_parts, 5, PARTS) * 0.5 * share)
        tl.store(stats + 1, _total(parts, n_parts, 1, PARTS) * share)
        tl.store(stats + 2, _total(parts, n_parts, 2, PARTS) * share)
        tl.store(stats + 3, _total(parts, n_parts, 3, PARTS) * share)
        tl.store(stats + 4, center)
        tl.store(stats + 5, pairs.to(tl.float32))
        reset(counters)


def forward(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, mask: Tensor | None, center_coef: float, label_smoothing: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(loss, stats, gradients stacked); every array is read and written once, the mask twice."""
    n = chosen.numel()
    grads = chosen.new_empty((2, *chosen.shape)) if gradients else None
    if n == 0:
        return chosen.new_zeros(()), chosen.new_zeros(len(STATS)), grads
    loss, stats = chosen.new_empty(()), chosen.new_empty(len(STATS))
    size = triton.cdiv(triton.cdiv(n, MAX_PARTS), BLOCK) * BLOCK
    count = triton.cdiv(n, size)
    parts = chosen.new_empty(N_COLUMNS, count)
    with on_device(chosen):
        _loss[(count if mask is None else 2 * count,)](
            chosen, rejected, margin, mask, loss, stats, grads, parts, counters_for(chosen), n, size, count, center_coef,
            label_smoothing, BLOCK, triton.next_power_of_2(count), **spread(WARPS),
        )  # fmt: skip
    return loss, stats, grads
