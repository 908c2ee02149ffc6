"""Generalised advantage estimation and its adjoint: csrc/cuda/gae.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.cuda.common import run


def rows_of(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """(rows, length, slots) of padded (B, T) input, (sequences, 0, slots) of packed input."""
    rows, length = (x.shape[0], x.shape[1]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)
    return rows, length, x.numel()


def forward(rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, decay_gaps):  # type: ignore[no-untyped-def]
    """rewards, values (B, T) or packed (N,). (advantages, returns) like them."""
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    run(
        "gae", rewards, rewards, values, mask, bootstrap, cu_seqlens, advantages, returns, *rows_of(rewards, cu_seqlens),
        gamma, lam, decay_gaps,
    )  # fmt: skip
    return advantages, returns


def backward(grad_advantages, grad_returns, mask, cu_seqlens, gamma, lam, decay_gaps):  # type: ignore[no-untyped-def]
    """(d rewards, d values, d bootstrap (B,) or (S,))."""
    grad_advantages, grad_returns = grad_advantages.contiguous(), grad_returns.contiguous()
    grad_rewards, grad_values = torch.empty_like(grad_advantages), torch.empty_like(grad_advantages)
    rows, length, slots = rows_of(grad_advantages, cu_seqlens)
    grad_bootstrap = grad_advantages.new_empty(rows)
    run(
        "gae_backward", grad_advantages, grad_advantages, grad_returns, mask, cu_seqlens, grad_rewards, grad_values,
        grad_bootstrap, rows, length, slots, gamma, lam, decay_gaps,
    )  # fmt: skip
    return grad_rewards, grad_values, grad_bootstrap
