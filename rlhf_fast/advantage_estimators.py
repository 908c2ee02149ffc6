"""Advantage estimators that are not a row of kernels: lambda-returns and V-trace by a parallel scan, GDPO, VAPO's lambda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_fast import _check
from rlhf_fast.ops.group_advantages import group_advantages
from rlhf_fast.ops.whiten import whiten
from rlhf_fast.reference._reduce import sums

CHUNK = 64
"""Steps of the scan that are taken one after another; as many again as there are chunks follow."""


class VTrace(NamedTuple):
    """Results of `vtrace`, like its rewards, 0 where masked; constants."""

    advantages: Tensor
    """For the policy gradient."""
    returns: Tensor
    """Targets of the value function."""


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """G_t = r_t + gamma_t ((1 - lam) V_{t+1} + lam G_{t+1}) (Sutton & Barto 2018, section 12.1).

    With one gamma these are the returns of `gae`, which computes them in one fused pass; here every step may have its own
    discount (0 ends an episode inside a row), and the scan is plain PyTorch in 64 + T / 64 steps.

    Args:
        rewards: (B, T) reward per token; (N,) packed when cu_seqlens is given.
        values: like rewards; value of the state before the token.
        mask: like rewards, True = real token; None = all real. Masked slots are skipped, never read, and give 0.
        gamma: discount in [0, 1], or like rewards: the discount after each token. A constant.
        lam: in [0, 1], or one per sequence, (B,) or (S,). A constant.
        bootstrap: (B,) or (S,) value of the state after the last real token; None = 0.
        cu_seqlens: (S+1,) boundaries of S packed sequences.

    Returns:
        Like rewards, fp32 (fp64 when an input is fp64); differentiable towards rewards, values and bootstrap.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    op = "lambda_returns"
    rows = _rows(op, rewards, mask, cu_seqlens)
    steps = _steps(op, rows, rewards, values, gamma, lam, bootstrap)
    constant = steps.rewards + steps.gamma * (1 - steps.lam) * steps.next_values
    # Past the last token G is V, so the whole of its next value counts there.
    constant = torch.where(rows.last, steps.rewards + steps.gamma * steps.next_values, constant)
    return rows.back(_scan(steps.gamma * steps.lam, constant))


@torch.no_grad()
def vtrace(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    rho_clip: float = 1.0,
    pg_clip: float = 1.0,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> VTrace:
    """V-trace targets and advantages of tokens that an older policy sampled (Espeholt et al. 2018, arXiv 1802.01561, eq. 1).

    rho = exp(logprobs - old_logprobs); d_t = min(rho_clip, rho_t) (r_t + gamma V_{t+1} - V_t);
    e_t = d_t + gamma lam min(1, rho_t) e_{t+1}; returns_t = V_t + e_t;
    advantages_t = min(pg_clip, rho_t) (r_t + gamma (lam returns_{t+1} + (1 - lam) V_{t+1}) - V_t), as in rlax. On-policy both
    are those of `gae`. Not whitened.

    Args:
        rewards, values, mask, gamma, lam, bootstrap, cu_seqlens: as in `lambda_returns`.
        logprobs: like rewards, in nats, under the policy that learns.
        old_logprobs: like rewards, under the policy that sampled.
        rho_clip, pg_clip: > 0.

    Returns:
        VTrace(advantages, returns), each like rewards, fp32 (fp64 when an input is fp64), constants.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    op = "vtrace"
    rows = _rows(op, rewards, mask, cu_seqlens)
    for name, x in (("logprobs", logprobs), ("old_logprobs", old_logprobs)):
        _check.like(op, name, x, rewards, "rewards")
    rho_clip = _check.number(op, "rho_clip", rho_clip, 0.0, open_low=True)
    pg_clip = _check.number(op, "pg_clip", pg_clip, 0.0, open_low=True)
    steps = _steps(op, rows, rewards, values, gamma, lam, bootstrap, logprobs, old_logprobs)
    rho = (steps.others[0] - steps.others[1]).exp()
    delta = rho.clamp(max=rho_clip) * (steps.rewards + steps.gamma * steps.next_values - steps.values)
    errors = _scan(steps.gamma * steps.lam * rho.clamp(max=1), delta)
    q = steps.rewards + steps.gamma * (steps.next_values + steps.lam * _next(errors))
    advantages = rho.clamp(max=pg_clip) * (q - steps.values)
    return VTrace(rows.back(advantages), rows.back(steps.values + errors))


def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """1 - 1 / (alpha length), at least 0, for `gae(..., lam=)` (VAPO, Yue et al. 2025, arXiv 2504.05118).

    lengths: integer, real tokens per sequence. alpha: > 0, 0.05 in the paper. Returns fp32 like lengths.

    Raises TypeError or ValueError naming the argument.
    """
    _check.integer("length_adaptive_lambda", "lengths", lengths)
    alpha = _check.number("length_adaptive_lambda", "alpha", alpha, 0.0, open_low=True)
    return (1 - 1 / (alpha * lengths.clamp(min=1).double())).clamp(min=0).float()


def gdpo_advantages(
    scores: Tensor,
    group_ids: Tensor,
    weights: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    unbiased: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Advantages from several rewards, each normalised in its group before they are added (GDPO, Liu et al. 2026, arXiv 2601.05242).

    whiten(sum over k of weights_k (r_k - mean_k) / (std_k + eps)), mean and std over the group, whitened over the samples of
    the call: so a call needs the whole batch.

    Args:
        scores: (N, K), K rewards per sample.
        group_ids: (N,) any integers in any order.
        weights: (K,) constants; None = 1 each.
        mask: (N,) False = sample to leave out; or (N, K) False = reward that the sample does not have, and a sample without any
            is left out. What is left out is never read and gives 0.
        unbiased, eps: as in `group_advantages`; unbiased for the whitening too.

    Returns:
        (N,) fp32 (fp64 for fp64); differentiable towards scores. A reward that is equal in a group adds 0 there.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    op = "gdpo_advantages"
    _check.floating(op, "scores", scores)
    if scores.dim() != 2:
        raise _check.error(ValueError, op, "scores", f"shape {tuple(scores.shape)}", "(N, K)")
    _check.integer(op, "group_ids", group_ids)
    _check.shape(op, "group_ids", group_ids, scores.shape[:1], "scores without K")
    if weights is not None:
        _check.floating(op, "weights", weights)
        _check.shape(op, "weights", weights, scores.shape[1:], "a row of scores")
        _check.device(op, "weights", weights, scores, "scores")
    if mask is not None:
        _check.boolean(op, "mask", mask)
        mask = mask[:, None].expand(scores.shape) if mask.dim() == 1 and len(mask) == len(scores) else mask
    mask = _check.mask_like(op, mask, scores, "scores")
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    wide = _check.wide(scores)
    factors = wide.new_ones(wide.shape[1]) if weights is None else weights.detach().to(wide.dtype)
    total = wide.new_zeros(len(wide))
    for k in range(wide.shape[1]):
        part = group_advantages(wide[:, k], group_ids, "grpo", mask=mask[:, k], unbiased=unbiased, eps=eps)
        total = total + factors[k] * part
    return whiten(total, mask.any(1), unbiased=unbiased)


@dataclass(frozen=True)
class _Rows:
    """The real tokens of every sequence, moved to the left of a dense (R, L) block."""

    shape: torch.Size
    """Of the rewards."""
    source: Tensor
    """(K,) places of the real tokens in the flattened rewards; indices are several times as fast as masks."""
    target: Tensor
    """(K,) their places in the flattened block."""
    last: Tensor
    """(R, L), the last real token of each sequence."""

    def dense(self, x: Tensor) -> Tensor:
        return _move(x, self.source, self.target, self.last.shape)

    def back(self, x: Tensor) -> Tensor:
        return _move(x, self.target, self.source, self.shape)


def _move(x: Tensor, source: Tensor, target: Tensor, shape: torch.Size) -> Tensor:
    """x from its flat places `source` to the places `target` of zeros."""
    moved = x.reshape(-1).index_select(0, source)
    return moved.new_zeros(shape.numel()).index_copy(0, target, moved).view(shape)


@dataclass(frozen=True)
class _Steps:
    """Dense (R, L) inputs in one dtype, 0 past the end."""

    rewards: Tensor
    values: Tensor
    next_values: Tensor
    gamma: Tensor
    """Or (1, 1)."""
    lam: Tensor
    """(R, 1)."""
    others: tuple[Tensor, ...]


def _rows(op: str, rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> _Rows:
    _check.floating(op, "rewards", rewards)
    expected = "(B, T), or cu_seqlens" if cu_seqlens is None else "(N,) with cu_seqlens"
    if rewards.dim() != (2 if cu_seqlens is None else 1):
        raise _check.error(ValueError, op, "rewards", f"shape {tuple(rewards.shape)}", expected)
    if cu_seqlens is not None:
        cu_seqlens = _check.cu_seqlens(op, cu_seqlens, rewards.shape[0], rewards)
    mask = _check.mask_like(op, mask, rewards, "rewards")
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    lengths = sums(mask.long(), cu_seqlens)
    slots = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=rewards.device)
    source, target = (m.reshape(-1).nonzero()[:, 0] for m in (mask, slots < lengths[:, None]))
    return _Rows(mask.shape, source, target, slots == lengths[:, None] - 1)


def _steps(
    op: str,
    rows: _Rows,
    rewards: Tensor,
    values: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None,
    *others: Tensor,
) -> _Steps:
    _check.like(op, "values", values, rewards, "rewards")
    count = len(rows.last)
    if isinstance(gamma, Tensor):
        _check.like(op, "gamma", gamma, rewards, "rewards")
    else:
        gamma = _check.number(op, "gamma", gamma, 0.0, 1.0)
    if not isinstance(lam, Tensor):
        lam = torch.full((count,), _check.number(op, "lam", lam, 0.0, 1.0), dtype=torch.float64, device=rewards.device)
    for name, x in (("lam", lam), ("bootstrap", bootstrap)):
        if x is not None:
            _check.floating(op, name, x)
            _check.shape(op, name, x, (count,), "one per sequence")
            _check.device(op, name, x, rewards, "rewards")
    r, v, b, *rest = _check.common_wide(rewards, values, bootstrap, *others)
    assert r is not None and v is not None
    r, v = rows.dense(r), rows.dense(v)
    end = r.new_zeros(count) if b is None else b
    return _Steps(
        rewards=r,
        values=v,
        next_values=torch.where(rows.last, end[:, None], _next(v)),
        gamma=rows.dense(gamma.detach()).to(r.dtype) if isinstance(gamma, Tensor) else r.new_full((1, 1), gamma),
        lam=lam.detach().to(r.dtype)[:, None],
        others=tuple(rows.dense(x) for x in rest if x is not None),
    )


def _next(x: Tensor) -> Tensor:
    """x_{t + 1} along the rows of (R, L), 0 past their end."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """x_t = b_t + a_t x_{t+1} along the rows of (R, L), x_L = 0: chunks of CHUNK steps side by side, then the carries between
    them. No product is divided out, so nothing underflows, and the order depends on the position alone.
    """
    R, L = b.shape
    if L == 0:
        return b
    a, chunks = a.expand(R, L), -(-L // CHUNK)
    a, b = (pad(x, (0, chunks * CHUNK - L)).view(R, chunks, CHUNK).permute(2, 0, 1).contiguous() for x in (a, b))
    x, through = torch.zeros_like(b[0]), torch.ones_like(b[0])
    inner, products = [], []
    for step, offset in zip(reversed(a.unbind()), reversed(b.unbind()), strict=True):  # (R, chunks) each
        x, through = offset + step * x, step * through
        inner.append(x)
        products.append(through)
    carry = b.new_zeros(R)
    carries = [carry]
    for first, product in zip(reversed(x.unbind(1)[1:]), reversed(through.unbind(1)[1:]), strict=True):
        carry = first + product * carry
        carries.append(carry)
    entering = torch.stack(carries[::-1], 1)  # (R, chunks): x at the end of each chunk
    whole = [y + p * entering for y, p in zip(reversed(inner), reversed(products), strict=True)]
    return torch.stack(whole, 2).reshape(R, chunks * CHUNK)[:, :L]
