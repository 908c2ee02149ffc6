"""Generalised advantage estimation (arXiv 1506.02438, eq. 16) and its adjoint: one launch each, one program a row.

With W_t = gamma V_t + c A_t, c = gamma lambda, what a token gets from the one after it is a single number, and

    A_t + V_t = r_t + W_{t+1},   W_t = c W_{t+1} + c r_t + (gamma - c) V_t

is a linear scan that needs no value of the next real token: a skipped slot passes W on. For gamma = lambda = 1 it sums rewards
alone, and the values drop out instead of telescoping.
"""

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels.common import scan as rows
from rlhf_fast.kernels.common.launch import on_device
from rlhf_fast.kernels.common.layout import same_order, spread
from rlhf_fast.kernels.common.scan import lane_of, last_real, left, mask_from, row_of, scan
from torch import Tensor


@triton.jit
def gae_block(reward, value, step, state, gamma, c):
    """(advantages, returns, state before the block) of a block of slots, walked from its end; `state` is W of the slot after it.

    Reward and value are 0 where no token counts; step: slots that discount. A value that is not finite leaves NaN in its return and
    in every advantage before it, as the recursion does.
    """
    spoilt = value - value
    own = c * reward + (gamma - c) * value + spoilt
    after, state = scan(tl.where(step, c, 1.0), own, state, True)
    return reward + after - value, reward + after + spoilt, state


@same_order
def _forward(
    rewards, values, mask, bootstrap, cu_seqlens, advantages, returns, tokens, length, gamma, c,
    DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, size = row_of(cu_seqlens, row, tokens, length)
    rewards += begin
    values += begin
    advantages += begin
    returns += begin
    if mask is not None:
        mask += begin
    last = last_real(mask, size, BLOCK)
    state = tl.zeros((), tl.float32)
    if bootstrap is not None:
        state = gamma * tl.load(bootstrap + row)
    lane = tl.arange(0, BLOCK)
    live = tl.cdiv(last + 1, BLOCK)
    for i in range(live, tl.cdiv(size, BLOCK)):
        start = i * BLOCK
        inside = lane < left(size, start, BLOCK)
        tl.store(advantages + start + lane, tl.zeros((BLOCK,), tl.float32), inside)
        tl.store(returns + start + lane, tl.zeros((BLOCK,), tl.float32), inside)
    for i in range(live):
        start = (live - 1 - i) * BLOCK
        inside = lane < left(size, start, BLOCK)
        real = mask_from(mask, start, lane, inside)
        reward = tl.load(rewards + start + lane, real, other=0.0)
        value = tl.load(values + start + lane, real, other=0.0)
        step = (lane < left(last + 1, start, BLOCK)) if DECAY else real
        advantage, future, state = gae_block(reward, value, step, state, gamma, c)
        tl.store(advantages + start + lane, tl.where(real, advantage, 0.0), inside)
        tl.store(returns + start + lane, tl.where(real, future, 0.0), inside)


@triton.jit
def adjoint_block(grad_advantage, grad_return, counts, state, gamma, c, DECAY: tl.constexpr):
    """(d reward, d value, state after the block) of a block of slots, walked from its beginning.

    Both gradients are 0 where no token counts. The state is the adjoint of the advantage of the token before:
    s_t = gA_t + gR_t + c s_{t-1} is the adjoint of delta_t.
    """
    own = grad_advantage + grad_return
    kept = c if DECAY else 1.0
    before, state = scan(tl.where(counts, c, kept), own, state, False)
    into_reward = own + c * before
    return into_reward, grad_return - into_reward + gamma * before, state


@triton.jit
def at_lane(x, lane, here, found):
    """x of the lane `here`, or what was found before where that is -1."""
    return tl.where(here >= 0, tl.sum(tl.where(lane == here, x, 0.0), 0), found)


@same_order
def _backward(
    grad_advantages, grad_returns, mask, cu_seqlens, grad_rewards, grad_values, grad_bootstrap, tokens, length, gamma, c,
    DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, size = row_of(cu_seqlens, row, tokens, length)
    grad_advantages += begin
    grad_returns += begin
    grad_rewards += begin
    grad_values += begin
    if mask is not None:
        mask += begin
    last = last_real(mask, size, BLOCK)
    state = tl.zeros((), tl.float32)
    final = tl.zeros((), tl.float32)
    lane = tl.arange(0, BLOCK)
    for i in range(tl.cdiv(size, BLOCK)):
        start = i * BLOCK
        inside = lane < left(size, start, BLOCK)
        real = mask_from(mask, start, lane, inside)
        grad_advantage = tl.load(grad_advantages + start + lane, real, other=0.0)
        grad_return = tl.load(grad_returns + start + lane, real, other=0.0)
        into_reward, into_value, state = adjoint_block(grad_advantage, grad_return, real, state, gamma, c, DECAY)
        final = at_lane(into_reward, lane, lane_of(last, start, BLOCK), final)
        tl.store(grad_rewards + start + lane, tl.where(real, into_reward, 0.0), inside)
        tl.store(grad_values + start + lane, tl.where(real, into_value, 0.0), inside)
    tl.store(grad_bootstrap + row, gamma * final)


def shape_of(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(rows, length) of padded input, (sequences, 0) of packed input."""
    return (x.shape[0], x.shape[1]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)


def forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    decay_gaps: bool,
) -> tuple[Tensor, Tensor]:
    """rewards, values (B, T), or (N,) with cu_seqlens (S+1,): 17 bytes a token with a mask, of which 8 written."""
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    count, length = shape_of(rewards, cu_seqlens)
    if rewards.numel() and count:
        with on_device(rewards):
            _forward[(count,)](
                rewards, values, mask, bootstrap, cu_seqlens, advantages, returns, rewards.numel(), length, gamma, gamma * lam,
                decay_gaps, rows.BLOCK, **spread(rows.WARPS),
            )  # fmt: skip
    return advantages, returns


def backward(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    decay_gaps: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d rewards, d values, d bootstrap); 17 bytes a token with a mask, of which 8 written."""
    grad_advantages, grad_returns = grad_advantages.contiguous(), grad_returns.contiguous()
    grad_rewards, grad_values = torch.empty_like(grad_advantages), torch.empty_like(grad_advantages)
    count, length = shape_of(grad_advantages, cu_seqlens)
    if not grad_advantages.numel():
        return grad_rewards, grad_values, grad_advantages.new_zeros(count)
    grad_bootstrap = grad_advantages.new_empty(count)
    with on_device(grad_advantages):
        _backward[(count,)](
            grad_advantages, grad_returns, mask, cu_seqlens, grad_rewards, grad_values, grad_bootstrap,
            grad_advantages.numel(), length, gamma, gamma * lam, decay_gaps, rows.BLOCK, **spread(rows.WARPS),
        )  # fmt: skip
    return grad_rewards, grad_values, grad_bootstrap
