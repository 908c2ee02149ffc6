"""The PPO loss, its gradients and its statistics in one launch.

The tokens are cut into at most MAX_PARTS parts, whole rows for the seq-* reductions and where a row shares one ratio. A program
takes one part block by block, stores the sums and moments of it, and the last program to finish combines them in the order of the
parts (common/grid.py). Where the denominator is a count that the gradients need, as many programs count the mask first: one byte
a token more. The ratio of a row comes from a loop over the row before the one that has its gradients, out of the caches.
"""

import triton
import triton.language as tl
from rlhf_fast.kernels.common.grid import add_count, is_last, reset, take_ticket, whole_count
from rlhf_fast.kernels.common.launch import on_device
from rlhf_fast.kernels.common.layout import same_order, spread
from rlhf_fast.kernels.common.moments import MAX_PARTS, merged, moments_of, pooled
from rlhf_fast.kernels.common.scan import left, mask_from, row_of
from rlhf_fast.kernels.common.token_losses import (
    CLIP,
    SEQUENCE_TOKEN,
    TOKEN,
    k3_of,
    kl_token,
    ratio_token,
    row_ratio,
    row_slope,
    surrogate_token,
    value_token,
)
from rlhf_fast.kernels.kl_estimate import kind_of
from torch import Tensor

from rlhf_fast._counters import counters_for
from rlhf_fast.reference.ppo_loss import LEVELS, STATS, SURROGATES

BLOCK, WARPS = 512, 8

NOTHING, TOKENS, SEQUENCES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What is counted before the gradients."""

# Columns of the parts (N_COLUMNS, n_parts), fp32. A part is shorter than 2^24 tokens, so its counts are exact.
_POLICY, _VALUE, _BONUS, _PENALTY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # weighted
_ENTROPY, _KL, _SQUARE, _K3 = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_CLIPPED, _CAPPED, _CLAMPED, _VALUE_CLIPPED = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
_LOW, _HIGH, _TOKENS = tl.constexpr(12), tl.constexpr(13), tl.constexpr(14)
_RATIO, _RETURN, _ERROR = tl.constexpr(15), tl.constexpr(18), tl.constexpr(21)  # centre, offset, squares of each
N_COLUMNS = 24


@triton.jit
def _real_tokens(mask, begin, size, BLOCK: tl.constexpr):
    """Real tokens among mask[begin : begin + size]."""
    count = tl.zeros((BLOCK,), tl.int32)
    lane = tl.arange(0, BLOCK)
    for i in range(tl.cdiv(size, BLOCK)):
        count += mask_from(mask, begin + i * BLOCK, lane, lane < left(size, i * BLOCK, BLOCK)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _row_sums(
    logprobs, old_logprobs, advantages, mask, importance_weights, begin, size, ratio_clamp,
    CARRIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(real tokens of a row, sum of their log-ratios, sums of their advantages that are not below 0 and of those that are).

    The last two are of advantages times importance weights, and 0 unless CARRIED.
    """
    count = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    gains = tl.zeros((BLOCK,), tl.float32)
    losses = tl.zeros((BLOCK,), tl.float32)
    lane = tl.arange(0, BLOCK)
    for i in range(tl.cdiv(size, BLOCK)):
        first = begin + i * BLOCK
        real = mask_from(mask, first, lane, lane < left(size, i * BLOCK, BLOCK))
        logp = tl.load(logprobs + first + lane, real, other=0.0)
        old = tl.load(old_logprobs + first + lane, real, other=0.0)
        log_ratio, _, _ = ratio_token(logp, old, ratio_clamp)
        count += real.to(tl.int32)
        total += log_ratio
        if CARRIED:
            advantage = tl.load(advantages + first + lane, real, other=0.0)
            weighed = advantage
            if importance_weights is not None:
                weighed *= tl.load(importance_weights + first + lane, real, other=0.0)
            gains += tl.where(advantage < 0.0, 0.0, weighed)
            losses += tl.where(advantage < 0.0, weighed, 0.0)
    return tl.sum(count, 0), tl.sum(total, 0), tl.sum(gains, 0), tl.sum(losses, 0)


@triton.jit
def _column(parts, n_parts, column: tl.constexpr, other, PARTS: tl.constexpr):
    lane = tl.arange(0, PARTS)
    return tl.load(parts + column * n_parts + lane, lane < n_parts, other=other)


@triton.jit
def _sum(parts, n_parts, column: tl.constexpr, PARTS: tl.constexpr):
    return tl.sum(_column(parts, n_parts, column, 0.0, PARTS), 0)


@triton.jit
def _count(parts, n_parts, column: tl.constexpr, PARTS: tl.constexpr):
    """The sum of counts, exact up to the rounding of the result."""
    return tl.sum(_column(parts, n_parts, column, 0.0, PARTS).to(tl.int64), 0).to(tl.float32)


@triton.jit
def _moments(parts, n_parts, column: tl.constexpr, PARTS: tl.constexpr):
    return pooled(
        _column(parts, n_parts, _TOKENS, 0.0, PARTS),
        _column(parts, n_parts, column, 0.0, PARTS),
        _column(parts, n_parts, column + 1, 0.0, PARTS),
        _column(parts, n_parts, column + 2, 0.0, PARTS),
    )


@triton.jit
def _write(
    parts, n_parts, share, loss, stats, entropy, ref_logprobs, values, old_values, entropy_coef, kl_coef, value_coef,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Loss and statistics, in the order of STATS, from all parts."""
    tokens = _count(parts, n_parts, _TOKENS, PARTS)
    n = tl.maximum(tokens, 1.0)
    policy = _sum(parts, n_parts, _POLICY, PARTS) * share
    all_terms = policy
    value, bonus, kl, value_clipped, explained = 0.0, 0.0, 0.0, 0.0, 0.0
    if values is not None:
        value = _sum(parts, n_parts, _VALUE, PARTS) * share
        all_terms += value_coef * value
        _, _, _, returns = _moments(parts, n_parts, _RETURN, PARTS)
        _, _, _, errors = _moments(parts, n_parts, _ERROR, PARTS)
        explained = tl.where(returns == 0, 0.0, 1.0 - tl.div_rn(errors, tl.where(returns == 0, 1.0, returns)))
        if old_values is not None:
            value_clipped = tl.div_rn(_count(parts, n_parts, _VALUE_CLIPPED, PARTS), n)
    if entropy is not None:
        bonus = tl.div_rn(_sum(parts, n_parts, _ENTROPY, PARTS), n)
        all_terms -= entropy_coef * (_sum(parts, n_parts, _BONUS, PARTS) * share)
    if ref_logprobs is not None:
        kl = tl.div_rn(_sum(parts, n_parts, _KL, PARTS), n)
        all_terms += kl_coef * (_sum(parts, n_parts, _PENALTY, PARTS) * share)
    _, centre, offset, squares = _moments(parts, n_parts, _RATIO, PARTS)
    ratio = centre + offset
    valid = (tokens > 0) & (ratio == ratio)
    tl.store(loss, all_terms)
    tl.store(stats, policy)
    tl.store(stats + 1, value)
    tl.store(stats + 2, bonus)
    tl.store(stats + 3, kl)
    tl.store(stats + 4, tl.div_rn(_count(parts, n_parts, _CLIPPED, PARTS), n))
    tl.store(stats + 5, tl.div_rn(_count(parts, n_parts, _CAPPED, PARTS), n))
    tl.store(stats + 6, value_clipped)
    tl.store(stats + 7, tl.div_rn(_sum(parts, n_parts, _SQUARE, PARTS), n) * 0.5)
    tl.store(stats + 8, tl.div_rn(_sum(parts, n_parts, _K3, PARTS), n))
    tl.store(stats + 9, ratio)
    tl.store(stats + 10, tl.div_rn(squares, n))
    tl.store(stats + 11, tl.where(valid, tl.min(_column(parts, n_parts, _LOW, float("inf"), PARTS), 0), ratio))
    tl.store(stats + 12, tl.where(valid, tl.max(_column(parts, n_parts, _HIGH, 0.0, PARTS), 0), ratio))
    tl.store(stats + 13, _count(parts, n_parts, _CLAMPED, PARTS))
    tl.store(stats + 14, explained)
    tl.store(stats + 15, tokens)


@same_order
def _loss(
    logprobs, old_logprobs, advantages, mask, entropy, ref_logprobs, values, old_values, returns, importance_weights,
    normalizer, cu_seqlens, loss, stats, grad_logprobs, grad_entropy, grad_values, parts, counters,
    tokens, rows, length, rows_per_part, n_parts, low, high, dual_clip, ratio_clamp, entropy_coef, kl_coef, kl_in, kl_out,
    value_clip, value_coef, divisor,
    COUNTED: tl.constexpr, TOKEN_MEANS: tl.constexpr, LEVEL: tl.constexpr, SURROGATE: tl.constexpr, KIND: tl.constexpr,
    THROUGH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """COUNTED: what replaces `divisor` as the denominator, unless a normalizer does. TOKEN_MEANS: rows are averaged first."""
    # The gradient goes through the ratio of the row, to each of its tokens alike.
    CARRIED: tl.constexpr = SURROGATE == CLIP and (LEVEL != TOKEN and LEVEL != SEQUENCE_TOKEN)
    part = take_ticket(counters)
    if COUNTED != NOTHING:
        if part < n_parts:
            counted = tl.zeros((), tl.int64)
            for row in range(part * rows_per_part, tl.minimum((part + 1) * rows_per_part, rows)):
                begin, size = row_of(cu_seqlens, row, tokens, length)
                found = _real_tokens(mask, begin, size, BLOCK)
                counted += found if COUNTED == TOKENS else (found > 0).to(tl.int32)
            add_count(counters, counted)
            return
        part -= n_parts
        denominator = whole_count(counters, n_parts).to(tl.float32)
    elif normalizer is not None:
        denominator = tl.load(normalizer)
    else:
        denominator = divisor
    share = tl.where(denominator > 0, tl.div_rn(1.0, denominator), 0.0)

    policy_sum, value_sum, bonus_sum, penalty_sum = 0.0, 0.0, 0.0, 0.0
    entropy_sum, kl_sum, square_sum, k3_sum = 0.0, 0.0, 0.0, 0.0
    clipped_sum, capped_sum, clamped_sum, value_clipped_sum = 0.0, 0.0, 0.0, 0.0
    least, most = float("inf"), 0.0
    count = 0.0
    ratio_c, ratio_o, ratio_q = 0.0, 0.0, 0.0
    return_c, return_o, return_q = 0.0, 0.0, 0.0
    error_c, error_o, error_q = 0.0, 0.0, 0.0
    lane = tl.arange(0, BLOCK)
    for row in range(part * rows_per_part, tl.minimum((part + 1) * rows_per_part, rows)):
        begin, size = row_of(cu_seqlens, row, tokens, length)
        weight = 1.0  # of a token of the row, times share
        if LEVEL != TOKEN:
            found, total, gains, losses = _row_sums(
                logprobs, old_logprobs, advantages, mask, importance_weights, begin, size, ratio_clamp, CARRIED, BLOCK
            )
        elif TOKEN_MEANS:
            found = _real_tokens(mask, begin, size, BLOCK)
        if TOKEN_MEANS:
            weight = tl.div_rn(1.0, tl.maximum(found, 1).to(tl.float32))
        if LEVEL != TOKEN:
            shared, moves = row_ratio(total, tl.maximum(found, 1).to(tl.float32), LEVEL)
            if CARRIED:
                carried = share * weight * (moves * row_slope(shared, gains, losses, low, high, dual_clip))
        for i in range(tl.cdiv(size, BLOCK)):
            first = begin + i * BLOCK
            inside = lane < left(size, i * BLOCK, BLOCK)
            real = mask_from(mask, first, lane, inside)
            logp = tl.load(logprobs + first + lane, real, other=0.0)
            old = tl.load(old_logprobs + first + lane, real, other=0.0)
            advantage = tl.load(advantages + first + lane, real, other=0.0)
            log_ratio, ratio, clamped = ratio_token(logp, old, ratio_clamp)
            stopped = clamped
            if LEVEL != TOKEN:
                ratio = tl.where(real, shared, 1.0)
                stopped = clamped | (tl.where(real, moves, 1.0) == 0)
            term, slope, clipped, capped = surrogate_token(
                logp, ratio, stopped, advantage, low, high, dual_clip, SURROGATE
            )
            if importance_weights is not None:
                importance = tl.load(importance_weights + first + lane, real, other=0.0)
                term *= importance
                slope *= importance
            if CARRIED:
                grad = tl.where(real & ~clamped, carried, 0.0)
            else:
                grad = share * weight * slope
            policy_sum += weight * tl.sum(term, 0)
            square_sum += tl.sum(log_ratio * log_ratio, 0)
            k3_sum += tl.sum(k3_of(log_ratio), 0)
            least = tl.minimum(least, tl.min(tl.where(real, ratio, float("inf")), 0))
            most = tl.maximum(most, tl.max(tl.where(real, ratio, 0.0), 0))
            n2, c2, o2, q2 = moments_of(ratio, real)
            _, ratio_c, ratio_o, ratio_q = merged(count, ratio_c, ratio_o, ratio_q, n2, c2, o2, q2)
            # Ten bits for each count of a block, which is shorter than 1024.
            event = clipped.to(tl.int32) + (capped.to(tl.int32) << 10) + (clamped.to(tl.int32) << 20)
            events = tl.sum(event, 0)
            clipped_sum += (events & 1023).to(tl.float32)
            capped_sum += ((events >> 10) & 1023).to(tl.float32)
            clamped_sum += (events >> 20).to(tl.float32)
            if ref_logprobs is not None:
                ref = tl.load(ref_logprobs + first + lane, real, other=0.0)
                kl, kl_slope = kl_token(logp, ref, kl_in, kl_out, KIND, THROUGH)
                grad += tl.where(real, share * weight * kl_coef * kl_slope, 0.0)
                kl_total = tl.sum(kl, 0)
                kl_sum += kl_total
                penalty_sum += weight * kl_total
            if grad_logprobs is not None:
                tl.store(grad_logprobs + first + lane, grad, inside)
            if entropy is not None:
                bonus = tl.sum(tl.load(entropy + first + lane, real, other=0.0), 0)
                entropy_sum += bonus
                bonus_sum += weight * bonus
                if grad_entropy is not None:
                    tl.store(grad_entropy + first + lane, tl.where(real, -(share * weight * entropy_coef), 0.0), inside)
            if values is not None:
                value = tl.load(values + first + lane, real, other=0.0)
                target = tl.load(returns + first + lane, real, other=0.0)
                if old_values is not None:
                    before = tl.load(old_values + first + lane, real, other=0.0)
                    value_term, value_slope, value_clipped = value_token(value, before, target, value_clip)
                    value_clipped_sum += tl.sum(value_clipped.to(tl.float32), 0)
                else:
                    value_term, value_slope, _ = value_token(value, value, target, float("inf"))
                value_sum += weight * tl.sum(value_term, 0)
                if grad_values is not None:
                    tl.store(grad_values + first + lane, share * weight * value_coef * value_slope, inside)
                _, c2, o2, q2 = moments_of(target, real)
                _, return_c, return_o, return_q = merged(count, return_c, return_o, return_q, n2, c2, o2, q2)
                _, c2, o2, q2 = moments_of(target - value, real)
                _, error_c, error_o, error_q = merged(count, error_c, error_o, error_q, n2, c2, o2, q2)
            count += n2

    own = parts + part
    tl.store(own + _POLICY * n_parts, policy_sum)
    tl.store(own + _SQUARE * n_parts, square_sum)
    tl.store(own + _K3 * n_parts, k3_sum)
    tl.store(own + _CLIPPED * n_parts, clipped_sum)
    tl.store(own + _CAPPED * n_parts, capped_sum)
    tl.store(own + _CLAMPED * n_parts, clamped_sum)
    tl.store(own + _LOW * n_parts, least)
    tl.store(own + _HIGH * n_parts, most)
    tl.store(own + _TOKENS * n_parts, count)
    tl.store(own + _RATIO * n_parts, ratio_c)
    tl.store(own + (_RATIO + 1) * n_parts, ratio_o)
    tl.store(own + (_RATIO + 2) * n_parts, ratio_q)
    if entropy is not None:
        tl.store(own + _ENTROPY * n_parts, entropy_sum)
        tl.store(own + _BONUS * n_parts, bonus_sum)
    if ref_logprobs is not None:
        tl.store(own + _KL * n_parts, kl_sum)
        tl.store(own + _PENALTY * n_parts, penalty_sum)
    if values is not None:
        tl.store(own + _VALUE * n_parts, value_sum)
        tl.store(own + _VALUE_CLIPPED * n_parts, value_clipped_sum)
        tl.store(own + _RETURN * n_parts, return_c)
        tl.store(own + (_RETURN + 1) * n_parts, return_o)
        tl.store(own + (_RETURN + 2) * n_parts, return_q)
        tl.store(own + _ERROR * n_parts, error_c)
        tl.store(own + (_ERROR + 1) * n_parts, error_o)
        tl.store(own + (_ERROR + 2) * n_parts, error_q)
    if is_last(counters, n_parts):
        _write(
            parts, n_parts, share, loss, stats, entropy, ref_logprobs, values, old_values, entropy_coef, kl_coef, value_coef,
            PARTS,
        )  # fmt: skip
        reset(counters)


def partition(rows: int, length: int, n: int, by_rows: bool) -> tuple[int, int, int, int]:
    """(parts, rows, length of a row, rows of a part) of n tokens; without `by_rows` a row is what a program takes."""
    if not by_rows:
        length = triton.cdiv(triton.cdiv(n, MAX_PARTS), BLOCK) * BLOCK
        rows = triton.cdiv(n, length)
    each = triton.cdiv(rows, MAX_PARTS)
    return triton.cdiv(rows, each), rows, length, each


def forward(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, entropy: Tensor | None,
    ref_logprobs: Tensor | None, values: Tensor | None, old_values: Tensor | None, returns: Tensor | None,
    importance_weights: Tensor | None, normalizer: Tensor | None, cu_seqlens: Tensor | None, low: float, high: float,
    dual: float, clamp: float, bonus: float, kl_coef: float, kl_kind: str, kl_in: float, kl_out: float, value_clip: float,
    value_coef: float, reduction: str, divisor: float, level: str, surrogate: str, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(loss, stats, gradients stacked).

    Every array is read and written once, the mask twice where tokens or rows are counted; where a row shares one ratio, the row
    is read again by the program that has just read it: log-probs and mask, and for the clip advantages and importance weights.
    """
    n = logprobs.numel()
    grads = grad_logprobs = grad_entropy = grad_values = None
    if gradients:
        given = [x is not None for x in (logprobs, entropy, values)]
        grads = logprobs.new_empty((sum(given), *logprobs.shape))
        each = iter(grads.unbind())
        grad_logprobs, grad_entropy, grad_values = (next(each) if wanted else None for wanted in given)
    if n == 0:
        return logprobs.new_zeros(()), logprobs.new_zeros(len(STATS)), grads
    loss, stats = logprobs.new_empty(()), logprobs.new_empty(len(STATS))
    sequences = reduction.startswith("seq")
    by_rows = sequences or level != "token"
    if by_rows and cu_seqlens is not None:
        rows, length = cu_seqlens.shape[0] - 1, 0
    else:
        length = logprobs.shape[-1]
        rows = n // length
    count, rows, length, rows_per_part = partition(rows, length, n, by_rows)
    if reduction == "token-sum" and not divisor:
        divisor = 1.0
    counted = NOTHING
    if normalizer is None and not divisor:
        counted = SEQUENCES if sequences else TOKENS
    parts = logprobs.new_empty(N_COLUMNS, count)
    with on_device(logprobs):
        _loss[(count if counted is NOTHING else 2 * count,)](
            logprobs, old_logprobs, advantages, mask, entropy, ref_logprobs, values, old_values, returns, importance_weights,
            normalizer, cu_seqlens if by_rows else None, loss, stats, grad_logprobs, grad_entropy, grad_values, parts,
            counters_for(logprobs), n, rows, length, rows_per_part, count, 1 - low, 1 + high, dual, clamp, bonus, kl_coef,
            kl_in, kl_out, value_clip, value_coef, divisor, counted.value, reduction == "seq-mean-token-mean",
            LEVELS.index(level), SURROGATES.index(surrogate), kind_of(kl_kind), kl_kind.endswith("+"), BLOCK,
            triton.next_power_of_2(count), **spread(WARPS),
        )  # fmt: skip
    return loss, stats, grads
