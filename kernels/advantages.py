"""The whole path of PPO from scores to advantages: one launch, and a second one for the whitening.

A program takes a row from its end to its beginning: per-token KL, reward shaping, the scan of gae.py, returns, and the moments of
the raw advantages of the row; the second launch is that of whiten.py.
"""

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels import whiten as whitening
from rlhf_fast.kernels.common import scan as rows
from rlhf_fast.kernels.common.launch import on_device
from rlhf_fast.kernels.common.layout import same_order, spread
from rlhf_fast.kernels.common.moments import MAX_PARTS, merged, moments_of, store_part
from rlhf_fast.kernels.common.scan import lane_of, last_real, left, mask_from, row_of
from rlhf_fast.kernels.common.token_losses import clamp_of, kl_token
from rlhf_fast.kernels.gae import adjoint_block, at_lane, gae_block, shape_of
from rlhf_fast.kernels.kl_estimate import kind_of
from torch import Tensor

from rlhf_fast.reference.advantages import WHITEN_EPS


@triton.jit
def _slot_of(last, size, AFTER: tl.constexpr):
    """Slot of the score of a row, the last one that counts: that of the last real token, or the one after it where there is one.

    -1 without a real token.
    """
    return tl.where(last < 0, last, tl.minimum(last + 1, size - 1)) if AFTER else last


@same_order
def _forward(
    scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, advantages, returns, rewards, kl, parts,
    tokens, length, n_rows, rows_per_part, kl_coef, clamp_in, clamp_out, score_clip, gamma, c,
    TOKEN_SCORES: tl.constexpr, KIND: tl.constexpr, AFTER: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """returns, rewards and kl: or None; parts: moments (4, programs) of the real advantages, or None."""
    part = tl.program_id(0)
    count, centre, offset, squares = 0.0, 0.0, 0.0, 0.0
    first_row = part.to(tl.int64) * rows_per_part
    lane = tl.arange(0, BLOCK)
    for row in range(first_row, tl.minimum(first_row + rows_per_part, n_rows)):
        begin, size = row_of(cu_seqlens, row, tokens, length)
        last = last_real(mask + begin, size, BLOCK)
        slot = _slot_of(last, size, AFTER)
        state = tl.zeros((), tl.float32)
        if bootstrap is not None:
            state = gamma * tl.load(bootstrap + row)
        if not TOKEN_SCORES:
            score = clamp_of(tl.load(scores + row), -score_clip, score_clip)
        live = tl.cdiv(slot + 1, BLOCK)
        for i in range(live, tl.cdiv(size, BLOCK)):
            first = begin + i * BLOCK
            inside = lane < left(size, i * BLOCK, BLOCK)
            zeros = tl.zeros((BLOCK,), tl.float32)
            tl.store(advantages + first + lane, zeros, inside)
            if returns is not None:
                tl.store(returns + first + lane, zeros, inside)
                tl.store(rewards + first + lane, zeros, inside)
                tl.store(kl + first + lane, zeros, inside)
        for i in range(live):
            start = (live - 1 - i) * BLOCK
            first = begin + start
            here = lane_of(slot, start, BLOCK)
            inside = lane < left(size, start, BLOCK)
            real = mask_from(mask, first, lane, inside)
            counts = (real | (lane == here)) if AFTER else real
            value = tl.load(values + first + lane, counts, other=0.0)
            reward = tl.zeros((BLOCK,), tl.float32)
            divergence = reward
            if logprobs is not None:
                logp = tl.load(logprobs + first + lane, real, other=0.0)
                ref = tl.load(ref_logprobs + first + lane, real, other=0.0)
                divergence, _ = kl_token(logp, ref, clamp_in, clamp_out, KIND, False)
                reward = -kl_coef * divergence
            if TOKEN_SCORES:
                reward += tl.load(scores + first + lane, counts, other=0.0)
            else:
                reward += tl.where(lane == here, score, 0.0)
            step = (lane < left(slot + 1, start, BLOCK)) if DECAY else counts
            advantage, future, state = gae_block(reward, value, step, state, gamma, c)
            raw = tl.where(real, advantage, 0.0)
            tl.store(advantages + first + lane, raw, inside)
            if returns is not None:
                tl.store(returns + first + lane, tl.where(counts, future, 0.0), inside)
                tl.store(rewards + first + lane, reward, inside)
                tl.store(kl + first + lane, divergence, inside)
            if parts is not None:
                m, o, d, q = moments_of(raw, real)
                count, centre, offset, squares = merged(count, centre, offset, squares, m, o, d, q)
    if parts is not None:
        store_part(parts, part, tl.num_programs(0), count, centre, offset, squares)


@same_order
def _adjoint(
    grad_raw, grad_returns, grad_rewards, grad_kl, scores, mask, logprobs, ref_logprobs, cu_seqlens,
    into_scores, into_values, into_logprobs, into_ref, into_bootstrap, tokens, length, kl_coef, clamp_in, clamp_out,
    score_clip, gamma, c,
    TOKEN_SCORES: tl.constexpr, KIND: tl.constexpr, THROUGH: tl.constexpr, AFTER: tl.constexpr, DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The adjoint of everything before the whitening; grad_raw is that of the advantages before it."""
    row = tl.program_id(0).to(tl.int64)
    begin, size = row_of(cu_seqlens, row, tokens, length)
    slot = _slot_of(last_real(mask + begin, size, BLOCK), size, AFTER)
    state = tl.zeros((), tl.float32)
    final = tl.zeros((), tl.float32)
    placed = tl.zeros((), tl.float32)
    lane = tl.arange(0, BLOCK)
    for i in range(tl.cdiv(size, BLOCK)):
        first = begin + i * BLOCK
        here = lane_of(slot, i * BLOCK, BLOCK)
        inside = lane < left(size, i * BLOCK, BLOCK)
        real = mask_from(mask, first, lane, inside)
        counts = (real | (lane == here)) if AFTER else real
        grad_advantage = tl.load(grad_raw + first + lane, real, other=0.0)
        grad_return = tl.load(grad_returns + first + lane, counts, other=0.0)
        into_reward, into_value, state = adjoint_block(grad_advantage, grad_return, counts, state, gamma, c, DECAY)
        final = at_lane(into_reward, lane, here, final)
        shaped = tl.where(counts, into_reward + tl.load(grad_rewards + first + lane, counts), 0.0)
        tl.store(into_values + first + lane, tl.where(counts, into_value, 0.0), inside)
        if TOKEN_SCORES:
            tl.store(into_scores + first + lane, shaped, inside)
        else:
            placed = at_lane(shaped, lane, here, placed)
        if logprobs is not None:
            logp = tl.load(logprobs + first + lane, real, other=0.0)
            ref = tl.load(ref_logprobs + first + lane, real, other=0.0)
            upstream = tl.load(grad_kl + first + lane, real, other=0.0) - kl_coef * tl.where(real, shaped, 0.0)
            _, slope = kl_token(logp, ref, clamp_in, clamp_out, KIND, THROUGH)
            into_logp = upstream * slope
            tl.store(into_logprobs + first + lane, into_logp, inside)
            tl.store(into_ref + first + lane, -into_logp, inside)
    if not TOKEN_SCORES:
        moves = (slot >= 0) & (tl.abs(tl.load(scores + row)) <= score_clip)
        tl.store(into_scores + row, tl.where(moves, placed, 0.0))
    tl.store(into_bootstrap + row, gamma * final)


def forward(
    scores: Tensor, values: Tensor, mask: Tensor, logprobs: Tensor | None, ref_logprobs: Tensor | None,
    bootstrap: Tensor | None, cu_seqlens: Tensor | None, token_scores: bool, kl_coef: float, kl_kind: str, clamp_in: float,
    clamp_out: float, score_clip: float, after_last: bool, gamma: float, lam: float, decay_gaps: bool, whiten: bool,
    unbiased: bool, floor_variance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(advantages, returns, rewards, kl), each like values: 29 bytes a token with log-probs, of which 16 written.

    The whitening adds 9: no advantage is known before all are.
    """
    outputs = tuple(torch.empty_like(values) for _ in range(4))
    if values.numel() and shape_of(values, cu_seqlens)[0]:
        parts = _launch(
            scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, outputs, token_scores, kl_coef, kl_kind,
            clamp_in, clamp_out, score_clip, after_last, gamma, lam, decay_gaps, whiten,
        )  # fmt: skip
        if parts is not None:
            with on_device(values):
                whitening.standardise(outputs[0], mask, outputs[0], parts, True, unbiased, floor_variance, WHITEN_EPS)
    return outputs  # type: ignore[return-value]


def _launch(
    scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, outputs, token_scores, kl_coef, kl_kind, clamp_in,
    clamp_out, score_clip, after_last, gamma, lam, decay_gaps, moments,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Raw advantages in outputs[0], and what else `outputs` has room for; their moments (4, P), if wanted."""
    n_rows, length = shape_of(values, cu_seqlens)
    each = triton.cdiv(n_rows, MAX_PARTS)
    count = triton.cdiv(n_rows, each)
    parts = values.new_empty(4, count) if moments else None
    with on_device(values):
        _forward[(count,)](
            scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, *outputs, parts, values.numel(), length,
            n_rows, each, kl_coef, clamp_in, clamp_out, score_clip, gamma, gamma * lam,
            token_scores, kind_of(kl_kind), after_last, decay_gaps, rows.BLOCK, **spread(rows.WARPS),
        )  # fmt: skip
    return parts


def backward(
    grad_advantages: Tensor, grad_returns: Tensor, grad_rewards: Tensor, grad_kl: Tensor, scores: Tensor, values: Tensor,
    mask: Tensor, logprobs: Tensor | None, ref_logprobs: Tensor | None, bootstrap: Tensor | None, cu_seqlens: Tensor | None,
    token_scores: bool, kl_coef: float, kl_kind: str, clamp_in: float, clamp_out: float, score_clip: float, after_last: bool,
    gamma: float, lam: float, decay_gaps: bool, whiten: bool, unbiased: bool, floor_variance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One launch; with whitening four: the raw advantages again, the two of the adjoint of the whitening, the adjoint of the rest."""
    empty = values.new_empty(0)
    into_scores, into_values = torch.empty_like(scores), torch.empty_like(values)
    n_rows, length = shape_of(values, cu_seqlens)
    into_logprobs = into_ref = empty
    if logprobs is not None:
        into_logprobs, into_ref = torch.empty_like(values), torch.empty_like(values)
    if not values.numel():
        into_scores.zero_()
        return (
            into_scores,
            into_values,
            into_logprobs,
            into_ref,
            empty if bootstrap is None else values.new_zeros(n_rows),
        )
    into_bootstrap = values.new_empty(n_rows)
    grad = grad_advantages.contiguous()
    if whiten:
        raw = torch.empty_like(values)
        _launch(
            scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, (raw, None, None, None), token_scores, kl_coef,
            kl_kind, clamp_in, clamp_out, score_clip, after_last, gamma, lam, decay_gaps, False,
        )  # fmt: skip
        grad = whitening.adjoint(grad, raw, mask, True, unbiased, floor_variance, WHITEN_EPS)
    with on_device(values):
        _adjoint[(n_rows,)](
            grad, grad_returns.contiguous(), grad_rewards.contiguous(), grad_kl.contiguous(), scores, mask, logprobs,
            ref_logprobs, cu_seqlens, into_scores, into_values, into_logprobs, into_ref, into_bootstrap, values.numel(), length,
            kl_coef, clamp_in, clamp_out, score_clip, gamma, gamma * lam, token_scores, kind_of(kl_kind),
            kl_kind.endswith("+"), after_last, decay_gaps, rows.BLOCK, **spread(rows.WARPS),
        )  # fmt: skip
    return into_scores, into_values, into_logprobs, into_ref, empty if bootstrap is None else into_bootstrap
