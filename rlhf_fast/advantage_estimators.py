"""Advantage estimators that are not a row of kernels: lambda-returns and V-trace by a parallel scan, GDPO, VAPO's lambda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._scan import Steps
from rlhf_fast.ops.group_advantages import group_advantages
from rlhf_fast.ops.whiten import whiten


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
    discount (0 ends an episode inside a row), and the scan is plain PyTorch in 64 + log2(T / 64) steps.

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
    x = _inputs(op, rewards, values, mask, gamma, lam, bootstrap, cu_seqlens)
    constant = x.rewards + x.gamma * (1 - x.lam) * x.next_values
    # Past the last token G is V, so the whole of its next value counts there.
    constant = torch.where(x.steps.last, x.rewards + x.gamma * x.next_values, constant)
    return x.back(x.steps.accumulate(x.gamma * x.lam, constant))


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
    rho_clip = _check.number(op, "rho_clip", rho_clip, 0.0, open_low=True)
    pg_clip = _check.number(op, "pg_clip", pg_clip, 0.0, open_low=True)
    x = _inputs(
        op, rewards, values, mask, gamma, lam, bootstrap, cu_seqlens, logprobs=logprobs, old_logprobs=old_logprobs
    )
    rho = (x.others[0] - x.others[1]).exp()
    delta = rho.clamp(max=rho_clip) * (x.rewards + x.gamma * x.next_values - x.values)
    errors = x.steps.accumulate(x.gamma * x.lam * rho.clamp(max=1), delta)
    q = x.rewards + x.gamma * (x.next_values + x.lam * x.steps.next(errors, None))
    return VTrace(x.back(rho.clamp(max=pg_clip) * (q - x.values)), x.back(x.values + errors))


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
class _Inputs:
    """Checked inputs in one dtype, like the rewards, 0 where masked."""

    steps: Steps
    rewards: Tensor
    values: Tensor
    next_values: Tensor
    gamma: float | Tensor
    lam: float | Tensor
    others: tuple[Tensor, ...]

    def back(self, x: Tensor) -> Tensor:
        return x.where(self.steps.real, 0.0)


def _inputs(
    op: str,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    **others: Tensor,
) -> _Inputs:
    _check.floating(op, "rewards", rewards)
    expected = "(B, T), or cu_seqlens" if cu_seqlens is None else "(N,) with cu_seqlens"
    if rewards.dim() != (2 if cu_seqlens is None else 1):
        raise _check.error(ValueError, op, "rewards", f"shape {tuple(rewards.shape)}", expected)
    if cu_seqlens is not None:
        cu_seqlens = _check.cu_seqlens(op, cu_seqlens, rewards.shape[0], rewards)
    mask = _check.mask_like(op, mask, rewards, "rewards")
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    for name, x in {"values": values, **others}.items():
        _check.like(op, name, x, rewards, "rewards")
    count = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
    if isinstance(gamma, Tensor):
        _check.like(op, "gamma", gamma, rewards, "rewards")
    else:
        gamma = _check.number(op, "gamma", gamma, 0.0, 1.0)
    per_sequence = {} if bootstrap is None else {"bootstrap": bootstrap}
    if isinstance(lam, Tensor):
        per_sequence["lam"] = lam
    else:
        lam = _check.number(op, "lam", lam, 0.0, 1.0)
    for name, x in per_sequence.items():
        _check.floating(op, name, x)
        _check.shape(op, name, x, (count,), "one per sequence")
        _check.device(op, name, x, rewards, "rewards")
    wide = _check.common_wide(rewards, values, *others.values(), bootstrap)
    r, v, *rest = (x.where(mask, 0.0) for x in wide[:-1] if x is not None)
    steps = Steps.of(mask, cu_seqlens)
    return _Inputs(
        steps=steps,
        rewards=r,
        values=v,
        next_values=steps.next(v, wide[-1]),
        gamma=gamma.detach().to(r.dtype).where(mask, 0.0) if isinstance(gamma, Tensor) else gamma,
        lam=steps.each(lam.detach().to(r.dtype)) if isinstance(lam, Tensor) else lam,
        others=tuple(rest),
    )
