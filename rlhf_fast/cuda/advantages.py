"""Scores, values and log-probs to advantages: csrc/cuda/advantages.cuh, and its adjoint by the kernels of the single ops."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.cuda import gae, kl_estimate, whiten
from rlhf_fast.cuda.common import run
from rlhf_fast.ops.kl_estimate import ALL_KINDS, KINDS
from rlhf_fast.reference.advantages import WHITEN_EPS, score_slots


def forward(
    scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, token_scores, kl_coef, kl_kind, clamp_in,
    clamp_out, score_clip, after_last, gamma, lam, decay_gaps, whitened, unbiased, floor_variance,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """(advantages, returns, rewards, kl), each like values (B, T) or packed (N,)."""
    outputs = tuple(torch.empty_like(values) for _ in range(4))
    scratch = whiten.moments_scratch(values) if whitened else None
    run(
        "advantages", values, scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, *outputs, scratch,
        *gae.rows_of(values, cu_seqlens), token_scores, kl_coef, ALL_KINDS.index(kl_kind) % len(KINDS),
        clamp_in, clamp_out, score_clip, after_last, gamma, lam, decay_gaps, whitened, unbiased, floor_variance, WHITEN_EPS,
    )  # fmt: skip
    return outputs


def backward(
    grad_advantages, grad_returns, grad_rewards, grad_kl, scores, values, mask, logprobs, ref_logprobs, bootstrap,
    cu_seqlens, token_scores, kl_coef, kl_kind, clamp_in, clamp_out, score_clip, after_last, gamma, lam, decay_gaps,
    whitened, unbiased, floor_variance,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Gradients of scores, values, logprobs, ref_logprobs and bootstrap, empty for those that are None."""
    slot, exists = score_slots(mask, cu_seqlens, after_last)
    slot = slot.clamp(max=max(0, values.numel() - 1))  # an empty last sequence points past the end
    valued = _with_slots(mask, slot, exists) if after_last else mask
    grad = grad_advantages.contiguous().where(mask, 0.0)
    if whitened:
        raw, *_ = forward(
            scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, token_scores, kl_coef, kl_kind, clamp_in,
            clamp_out, score_clip, after_last, gamma, lam, decay_gaps, False, unbiased, floor_variance,
        )  # fmt: skip
        grad = whiten.adjoint(grad, raw, mask, True, unbiased, floor_variance, WHITEN_EPS)
    shaped, into_values, into_bootstrap = gae.backward(grad, grad_returns, valued, cu_seqlens, gamma, lam, decay_gaps)
    shaped += grad_rewards  # rewards are an output too
    if token_scores:
        into_scores = shaped.where(valued, 0.0)
    elif shaped.numel():
        moves = exists & (scores.abs() <= score_clip)
        into_scores = shaped.reshape(-1)[slot].where(moves, 0.0)
    else:
        into_scores = torch.zeros_like(scores)
    empty = values.new_empty(0)
    into_logprobs = into_ref = empty
    if logprobs is not None:
        upstream = grad_kl - kl_coef * shaped
        into_logprobs = kl_estimate.backward(upstream, logprobs, ref_logprobs, mask, kl_kind, clamp_in, clamp_out)
        into_ref = -into_logprobs
    return into_scores, into_values, into_logprobs, into_ref, empty if bootstrap is None else into_bootstrap


def _with_slots(mask: Tensor, slot: Tensor, exists: Tensor) -> Tensor:
    """The mask, and the slots of the sequences that exist; without indexing by a mask, which would wait for the device."""
    if mask.numel() == 0:
        return mask
    added = torch.zeros(mask.numel(), dtype=torch.int32, device=mask.device).index_add_(0, slot, exists.to(torch.int32))
    return mask | (added > 0).view_as(mask)
