"""Log-probability, entropy, log-sum-exp and exact KL of tokens: csrc/cuda/token_logprobs.cuh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast._native import DTYPES, contiguous
from rlhf_fast.cuda.common import run
from rlhf_fast.ops.token_logprobs import _ids, _layout, state_shape

SLICE, THREADS, SLICE_FLOATS, REF_SLICE_FLOATS = 65536, 256, 3, 8
"""The constants of csrc/cuda/ops.h."""

FEW_ROWS = 512
"""From here on a block a row keeps every GPU busy, and nothing needs to be put together afterwards."""


def forward(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    ref_logits: Tensor | None,
    temperature_value: float,
    softcap: float,
    keep_state: bool,
) -> tuple[Tensor | None, ...]:
    """logits, ref_logits (..., V); token_ids, mask, temperature (...). (logprobs, entropy, logsumexp, kl, state)."""
    rows, vocab = token_ids.numel(), logits.shape[-1]
    logits, ref_logits, layout = _layout(logits, ref_logits)
    token_ids, mask, temperature = _ids(token_ids), contiguous(mask), contiguous(temperature)
    logprobs = torch.empty_like(token_ids, dtype=torch.float32)
    entropy, logsumexp = torch.empty_like(logprobs), torch.empty_like(logprobs)
    kl = None if ref_logits is None else torch.empty_like(logprobs)
    state = logprobs.new_empty(state_shape(rows, ref_logits)) if keep_state else None
    slices, scratch = -(-vocab // SLICE), None
    if slices > 1 and rows < FEW_ROWS:
        floats = SLICE_FLOATS if ref_logits is None else REF_SLICE_FLOATS
        scratch = logprobs.new_empty(rows * slices * floats * THREADS)
    run(
        "token_logprobs", logits, logits, ref_logits, token_ids, mask, temperature, logprobs, entropy, logsumexp, kl, state,
        scratch, rows, vocab, *layout, temperature_value, softcap, DTYPES[logits.dtype], token_ids.dtype is torch.int32,
    )  # fmt: skip
    return logprobs, entropy, logsumexp, kl, state


def backward_into(
    grad: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    state: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    ref_logits: Tensor | None,
    grads: Any,
    temperature_value: float,
    softcap: float,
) -> Tensor:
    """The backward into `grad`, (..., V) contiguous or (N, V) with rows any distance apart, which may be the logits
    themselves or, of fp32 logits, have another dtype. grads: four of (...) or None."""
    rows, vocab = token_ids.numel(), logits.shape[-1]
    if grads[3] is None:
        ref_logits = None
    logits, ref_logits, layout = _layout(logits, ref_logits)
    token_ids, mask, temperature = _ids(token_ids), contiguous(mask), contiguous(temperature)
    grads = [g if g is None else g.to(state.dtype).contiguous() for g in grads]
    run(
        "token_logprobs_backward", logits, logits, ref_logits, token_ids, mask, temperature, state, *grads, grad,
        rows, vocab, *layout, state.shape[-1], grad.stride(0) if grad.dim() == 2 else vocab, temperature_value, softcap,
        DTYPES[logits.dtype], DTYPES[grad.dtype], token_ids.dtype is torch.int32,
    )  # fmt: skip
    return grad


def backward(
    logits, token_ids, state, mask, temperature, ref_logits, g_logprobs, g_entropy, g_logsumexp, g_kl, temperature_value,
    softcap,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """d logits (..., V), contiguous, from the upstream gradients (...) or None of the four results."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grads = (g_logprobs, g_entropy, g_logsumexp, g_kl)
    return backward_into(
        grad, logits, token_ids, state, mask, temperature, ref_logits, grads, temperature_value, softcap
    )
