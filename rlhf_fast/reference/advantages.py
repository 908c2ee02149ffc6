"""From scores and log-probs to advantages: the composition of four ops."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.reference.gae import gae
from rlhf_fast.reference.kl_estimate import kl_estimate
from rlhf_fast.reference.whiten import standardise

WHITEN_EPS = 1e-8


def bounds_of(rows: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(first slot, end) of every sequence in flat positions: padded `rows` (B, T) or packed (N,)."""
    if cu_seqlens is not None:
        return cu_seqlens[:-1], cu_seqlens[1:]
    B, T = rows.shape
    begin = torch.arange(B, device=rows.device) * T
    return begin, begin + T


def last_real(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Flat position of the last real token of every sequence; before its first slot when there is none."""
    begin, end = bounds_of(mask, cu_seqlens)
    flat = mask.reshape(-1)
    position = torch.arange(flat.numel(), device=mask.device)
    marked = torch.where(flat, position, -1)
    running = torch.cat([marked.new_full((1,), -1), marked.cummax(0).values if marked.numel() else marked])
    return torch.maximum(running[end], begin - 1)


def score_slots(mask: Tensor, cu_seqlens: Tensor | None, after_last: bool) -> tuple[Tensor, Tensor]:
    """(slot of the score of every sequence in flat positions, whether the sequence has a real token)."""
    begin, end = bounds_of(mask, cu_seqlens)
    last = last_real(mask, cu_seqlens)
    exists = last >= begin
    slot = torch.minimum(last + 1, end - 1) if after_last else last
    return torch.where(exists, slot, begin), exists


def with_slot_after(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The mask, and the slot after the last real token of every sequence that has one."""
    slot, exists = score_slots(mask, cu_seqlens, True)
    longer = mask.reshape(-1).clone()
    longer[slot[exists]] = True
    return longer.view_as(mask)


def advantages(
    scores: Tensor,
    values: Tensor,
    mask: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    token_scores: bool,
    kl_coef: float,
    kl_kind: str,
    clamp_in: float,
    clamp_out: float,
    score_clip: float,
    after_last: bool,
    gamma: float,
    lam: float,
    decay_gaps: bool,
    whiten: bool,
    unbiased: bool,
    floor_variance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL estimate -> reward shaping -> GAE -> returns -> whitening; (advantages, returns, rewards, kl), each like values.

    scores: like values with token_scores, otherwise one per sequence.
    """
    valued = with_slot_after(mask, cu_seqlens) if after_last else mask  # slots with a value, a reward and a return
    if logprobs is None or ref_logprobs is None:
        kl = torch.zeros_like(values)
    else:
        kl = kl_estimate(logprobs, ref_logprobs, mask, kl_kind, clamp_in, clamp_out)
    rewards = -kl_coef * kl
    if token_scores:
        rewards = rewards + scores.where(valued, 0.0)
    else:
        slot, exists = score_slots(mask, cu_seqlens, after_last)
        placed = scores.clamp(-score_clip, score_clip).where(exists, 0.0)
        flat = rewards.reshape(-1)
        if flat.numel():
            flat = flat.index_add(0, slot.clamp(max=flat.numel() - 1), placed)  # an empty last sequence adds 0
        rewards = flat.view_as(rewards)
    raw, returns = gae(rewards, values, valued, bootstrap, cu_seqlens, gamma, lam, decay_gaps)
    result = standardise(raw, mask, unbiased, WHITEN_EPS, floor_variance) if whiten else raw
    return result.where(mask, 0.0), returns, rewards, kl


def sample(
    shape: tuple[int, int] = (4, 33),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gaps: bool = True,
    token_scores: bool = False,
) -> dict[str, Tensor]:
    """Keyword arguments of ops.advantages: ragged rows, tool gaps, a reference, a bootstrap value."""
    B, T = shape
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, T + 1, (B,), generator=g)
    mask = torch.arange(T)[None] < lengths[:, None]
    if gaps:
        mask &= torch.rand(B, T, generator=g) > 0.2
    draw = lambda *size: torch.randn(size, generator=g, dtype=torch.float64)
    logprobs = -draw(B, T).abs()
    return {
        "scores": draw(*((B, T) if token_scores else (B,))).to(dtype),
        "values": draw(B, T).to(dtype),
        "mask": mask,
        "logprobs": logprobs.to(dtype),
        "ref_logprobs": (logprobs + 0.3 * draw(B, T)).to(dtype),
        "bootstrap": draw(B).to(dtype),
    }
