"""Per-token KL estimators and their derivative: one launch each, every byte once."""

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels.common.launch import EXACT, on_device
from rlhf_fast.kernels.common.scan import mask_at
from rlhf_fast.kernels.common.token_losses import kl_token
from torch import Tensor

from rlhf_fast.reference.kl_estimate import KINDS

BLOCK, WARPS = 1024, 4


@triton.jit
def _forward(logprobs, ref_logprobs, mask, out, n, clamp_in, clamp_out, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = mask_at(mask, at, at < n)
    logp = tl.load(logprobs + at, real, other=0.0)
    ref = tl.load(ref_logprobs + at, real, other=0.0)
    value, _ = kl_token(logp, ref, clamp_in, clamp_out, KIND, False)
    tl.store(out + at, value, at < n)


@triton.jit
def _backward(
    grad, logprobs, ref_logprobs, mask, grad_logprobs, n, clamp_in, clamp_out,
    KIND: tl.constexpr, THROUGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = mask_at(mask, at, at < n)
    logp = tl.load(logprobs + at, real, other=0.0)
    ref = tl.load(ref_logprobs + at, real, other=0.0)
    upstream = tl.load(grad + at, real, other=0.0)
    _, slope = kl_token(logp, ref, clamp_in, clamp_out, KIND, THROUGH)
    tl.store(grad_logprobs + at, upstream * slope, at < n)


def forward(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, kind: str, clamp_in: float, clamp_out: float
) -> Tensor:
    """13 bytes a token with a mask, of which 4 written."""
    out = torch.empty_like(logprobs)
    n = out.numel()
    if n:
        with on_device(logprobs):
            _forward[(triton.cdiv(n, BLOCK),)](
                logprobs,
                ref_logprobs,
                mask,
                out,
                n,
                clamp_in,
                clamp_out,
                kind_of(kind),
                BLOCK,
                num_warps=WARPS,
                **EXACT,
            )
    return out


def backward(
    grad: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    kind: str,
    clamp_in: float,
    clamp_out: float,
) -> Tensor:
    """d logprobs; 17 bytes a token with a mask, of which 4 written."""
    grad = grad.contiguous()
    grad_logprobs = torch.empty_like(grad)
    n = grad.numel()
    if n:
        with on_device(grad):
            _backward[(triton.cdiv(n, BLOCK),)](
                grad, logprobs, ref_logprobs, mask, grad_logprobs, n, clamp_in, clamp_out,
                kind_of(kind), kind.endswith("+"), BLOCK, num_warps=WARPS, **EXACT,
            )  # fmt: skip
    return grad_logprobs


def kind_of(kind: str) -> int:
    """Number of an estimator in token_losses.py."""
    return KINDS.index(kind.removesuffix("+"))
