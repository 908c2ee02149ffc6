"""Per-token KL estimators: csrc/cuda/kl_estimate.cuh."""

from __future__ import annotations

import torch

from rlhf_fast.cuda.common import run
from rlhf_fast.ops.kl_estimate import ALL_KINDS, KINDS


def forward(logprobs, ref_logprobs, mask, kind, clamp_in, clamp_out):  # type: ignore[no-untyped-def]
    """One estimate per token, like logprobs."""
    out = torch.empty_like(logprobs)
    number = ALL_KINDS.index(kind) % len(KINDS)
    run("kl_estimate", logprobs, logprobs, ref_logprobs, mask, out, out.numel(), number, clamp_in, clamp_out)
    return out


def backward(grad, logprobs, ref_logprobs, mask, kind, clamp_in, clamp_out):  # type: ignore[no-untyped-def]
    """d logprobs; that of ref_logprobs is its negative."""
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    number = ALL_KINDS.index(kind) % len(KINDS)
    run(
        "kl_estimate_backward", grad, grad, logprobs, ref_logprobs, mask, out, grad.numel(), number, kind[-1] == "+",
        clamp_in, clamp_out,
    )  # fmt: skip
    return out
