"""Advantages relative to a group, and their adjoint, without a sort and without asking the host.

The first launch finds where every sample goes in an order that has the groups one after the other, by comparing all pairs of ids:
integers, 8192 samples are 67 million comparisons. In the second a program takes some samples and walks the members of the group of
each. Members go in their order in the batch, masked ones left out, so the sums of a group do not depend on the rest of the batch.
reinforce++ takes a third launch: its whitening is over the batch.
"""

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels.common.launch import on_device
from rlhf_fast.kernels.common.layout import same_order, spread
from rlhf_fast.kernels.common.scan import mask_at
from torch import Tensor

from rlhf_fast.reference.group_advantages import KINDS, WHITEN_EPS

SAMPLES, OTHERS, MEMBERS, WARPS = 32, 32, 16, 4
BLOCK = 256

GRPO, DR_GRPO, RLOO, REINFORCE, OPO, REMAX, PASS_AT_K = (tl.constexpr(i) for i in range(len(KINDS)))


@same_order
def _order(group_ids, mask, order, first, size, n, SAMPLES: tl.constexpr, OTHERS: tl.constexpr):
    """order: samples by group, then by place; first, size: where the group of a sample begins in it, and its real members."""
    i = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    own = mask_at(mask, i, i < n)
    ids = tl.load(group_ids + i, own)[:, None]
    before = tl.zeros((SAMPLES, OTHERS), tl.int32)
    members = tl.zeros((SAMPLES, OTHERS), tl.int32)
    earlier = tl.zeros((SAMPLES, OTHERS), tl.int32)
    for start in range(0, n, OTHERS):
        j = tl.arange(0, OTHERS).to(tl.int64) + start
        real = mask_at(mask, j, j < n)
        others = tl.load(group_ids + j, real)[None, :]
        same = real[None, :] & (others == ids)
        before += (real[None, :] & (others < ids)).to(tl.int32)
        members += same.to(tl.int32)
        earlier += (same & (j[None, :] < i[:, None])).to(tl.int32)
    begin = tl.sum(before, 1)
    tl.store(first + i, begin, i < n)
    tl.store(size + i, tl.sum(members, 1), i < n)
    tl.store(order + begin + tl.sum(earlier, 1), i.to(tl.int32), own)


@triton.jit
def _sum_of(x):
    return tl.sum(x, 1)[:, None]


@triton.jit
def _members(order, first, size, start, MEMBERS: tl.constexpr):
    """Members start, start + 1, ... of the groups: (samples they are, whether they exist)."""
    k = start + tl.arange(0, MEMBERS)[None, :]
    there = k < size
    return tl.load(order + first + k, there), there


@same_order
def _compare(
    grad, scores, lengths, greedy, mask, order, first, size, out, upstream, parts, n, eps,
    KIND: tl.constexpr, UNBIASED: tl.constexpr, SAMPLES: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Advantages, or with `grad` the gradient of the scores.

    reinforce++: the centred scores and upstream gradients, and the parts (2, programs) of the sums over the batch.
    """
    i = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    real = mask_at(mask, i, i < n)
    score = tl.load(scores + i, real)[:, None]
    own = tl.zeros((SAMPLES, 1), tl.float32)
    if grad is not None:
        own = tl.load(grad + i, real, other=0.0)[:, None]
    if KIND == REMAX:
        if grad is not None:
            result = own
        else:
            result = score - tl.load(greedy + i, real)[:, None]
    else:
        begin = tl.load(first + i, real)[:, None]
        count = tl.load(size + i, real, other=0)[:, None]
        most = tl.max(count)
        # Around the first score of the group, so that equal scores are zeros and leave no rounding to be scaled up.
        start = tl.load(order + begin, count > 0)
        base = tl.load(scores + start, count > 0)
        members = tl.maximum(count, 1).to(tl.float32)
        zeros = tl.zeros((SAMPLES, MEMBERS), tl.float32)
        if KIND == PASS_AT_K:
            best = tl.full((SAMPLES, 1), float("-inf"), tl.float32)
            second = best
            who = tl.full((SAMPLES, 1), -1, tl.int32)
            next_who = who
            for k in range(0, most, MEMBERS):
                j, there = _members(order, begin, count, k, MEMBERS)
                r = tl.load(scores + j, there, other=float("-inf"))
                top = tl.max(r, 1)[:, None]
                top_who = tl.min(tl.where(there & (r == top), j, n), 1)[:, None]
                rest = tl.where(j == top_who, float("-inf"), r)
                low = tl.max(rest, 1)[:, None]
                low_who = tl.min(tl.where(there & (rest == low) & (j != top_who), j, n), 1)[:, None]
                leads = top > best
                # The second best is the best but one of the two bests and two seconds.
                loser, loser_who = tl.where(leads, best, top), tl.where(leads, who, top_who)
                keeps = tl.where(leads, low, second) > loser
                second = tl.where(keeps, tl.where(leads, low, second), loser)
                next_who = tl.where(keeps, tl.where(leads, low_who, next_who), loser_who)
                best = tl.where(leads, top, best)
                who = tl.where(leads, top_who, who)
            wins = (count > 1) & (best > second)
            me = i[:, None].to(tl.int32)
            if grad is not None:
                winner = tl.load(grad + who, wins)
                result = tl.where(me == who, own, tl.where(me == next_who, -winner, 0.0))
            else:
                result = tl.where(me == who, score - second, 0.0)
            result = tl.where(wins, result, 0.0)
        elif KIND == OPO:
            weight_sum = zeros
            product_sum = zeros
            for k in range(0, most, MEMBERS):
                j, there = _members(order, begin, count, k, MEMBERS)
                weight = tl.load(lengths + j, there, other=0).to(tl.float32)
                weight_sum += weight
                if grad is not None:
                    product_sum += tl.load(grad + j, there, other=0.0)
                else:
                    product_sum += weight * tl.where(there, tl.load(scores + j, there) - base, 0.0)
            whole = _sum_of(weight_sum)
            share = tl.div_rn(_sum_of(product_sum), tl.where(whole > 0, whole, 1.0))
            if grad is not None:
                result = own - tl.load(lengths + i, real)[:, None].to(tl.float32) * share
            else:
                result = (score - base) - share
            result = tl.where(whole > 0, result, 0.0)
        else:
            total = zeros
            upstream_total = zeros
            for k in range(0, most, MEMBERS):
                j, there = _members(order, begin, count, k, MEMBERS)
                total += tl.where(there, tl.load(scores + j, there) - base, 0.0)
                if grad is not None:
                    upstream_total += tl.load(grad + j, there, other=0.0)
            mean = tl.div_rn(_sum_of(total), members)
            centred = (score - base) - mean
            result = centred
            if grad is not None:
                result = own - tl.div_rn(_sum_of(upstream_total), members)
            if KIND == RLOO:
                result = tl.where(count > 1, result * tl.div_rn(members, tl.maximum(members - 1.0, 1.0)), 0.0)
            if KIND == GRPO:
                square_sum = zeros
                dot_sum = zeros
                for k in range(0, most, MEMBERS):
                    j, there = _members(order, begin, count, k, MEMBERS)
                    gap = tl.where(there, (tl.load(scores + j, there) - base) - mean, 0.0)
                    square_sum += gap * gap
                    if grad is not None:
                        dot_sum += gap * tl.load(grad + j, there, other=0.0)
                divisor = tl.maximum(members - 1.0, 1.0) if UNBIASED else members
                std = tl.sqrt_rn(tl.div_rn(_sum_of(square_sum), divisor))
                varies = std > 0
                spread = tl.where(varies, std, 1.0) + eps
                result = tl.div_rn(result, spread)
                if grad is not None:
                    below = divisor * tl.where(varies, std, 1.0) * spread * spread
                    result -= centred * tl.div_rn(_sum_of(dot_sum), below)
                result = tl.where(varies | (std != std), result, 0.0)
            if KIND == REINFORCE:
                part = tl.program_id(0)
                kept = tl.where(real[:, None], centred, 0.0)
                tl.store(parts + part, tl.sum(kept * kept))
                tl.store(parts + tl.num_programs(0) + part, tl.sum(kept * own))
                if grad is not None:
                    tl.store(upstream + i[:, None], result, i[:, None] < n)
                result = centred
    tl.store(out + i[:, None], tl.where(real[:, None], result, 0.0), i[:, None] < n)


@same_order
def _whiten(
    out, upstream, mask, parts, n_parts, n, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """reinforce++ from the centred scores in `out`: y = x s, s = 1 / sqrt(var + eps) over the batch, whose mean is 0.

    With `upstream`: dx = s (g - group mean of g) - s^3 x sum(g x) / divisor, what the group mean takes off it being 0.
    """
    squares = tl.zeros((BLOCK,), tl.float32)
    dots = tl.zeros((BLOCK,), tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(0, n_parts, BLOCK):
        squares += tl.load(parts + start + lane, start + lane < n_parts, other=0.0)
        dots += tl.load(parts + n_parts + start + lane, start + lane < n_parts, other=0.0)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        counts += mask_at(mask, start + lane, start + lane < n).to(tl.int32)
    divisor = tl.maximum(tl.sum(counts, 0) - 1, 1).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares, 0), divisor) + eps))
    at = tl.program_id(0).to(tl.int64) * BLOCK + lane
    x = tl.load(out + at, at < n)
    if upstream is not None:
        slope = tl.div_rn(scale * scale * scale * tl.sum(dots, 0), divisor)
        real = mask_at(mask, at, at < n)
        y = tl.where(real, scale * tl.load(upstream + at, real) - slope * x, 0.0)
    else:
        y = x * scale
    tl.store(out + at, y, at < n)


def _run(
    grad: Tensor | None, scores: Tensor, group_ids: Tensor, mask: Tensor | None, lengths: Tensor | None,
    greedy_scores: Tensor | None, kind: str, unbiased: bool, eps: float,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(scores)
    n = out.numel()
    if n == 0:
        return out
    programs = triton.cdiv(n, SAMPLES)
    order = first = size = upstream = parts = None
    if kind == "reinforce++":
        parts = scores.new_empty(2, programs)
        upstream = None if grad is None else torch.empty_like(scores)
    with on_device(scores):
        if kind != "remax":
            order, first, size = (torch.empty(n, dtype=torch.int32, device=scores.device) for _ in range(3))
            _order[(programs,)](group_ids, mask, order, first, size, n, SAMPLES, OTHERS, **spread(WARPS))
        _compare[(programs,)](
            grad, scores, lengths, greedy_scores, mask, order, first, size, out, upstream, parts, n, eps,
            KINDS.index(kind), unbiased, SAMPLES, MEMBERS, **spread(WARPS),
        )  # fmt: skip
        if kind == "reinforce++":
            _whiten[(triton.cdiv(n, BLOCK),)](
                out, upstream, mask, parts, programs, n, WHITEN_EPS, BLOCK, **spread(WARPS)
            )
    return out


def forward(
    scores: Tensor, group_ids: Tensor, mask: Tensor | None, lengths: Tensor | None, greedy_scores: Tensor | None, kind: str,
    unbiased: bool, eps: float,
) -> Tensor:  # fmt: skip
    """(N,) advantages: 2 launches, remax 1, reinforce++ 3."""
    return _run(None, scores, group_ids, mask, lengths, greedy_scores, kind, unbiased, eps)


def backward(
    grad: Tensor, scores: Tensor, group_ids: Tensor, mask: Tensor | None, lengths: Tensor | None, kind: str, unbiased: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    """(N,) gradient of the scores, in as many launches."""
    return _run(grad.contiguous(), scores, group_ids, mask, lengths, None, kind, unbiased, eps)
