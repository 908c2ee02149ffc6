"""KL estimators on the log-probs of sampled tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check
from rlhf_fast._native import kernel
from rlhf_fast._op import Op, cpp, cuda, no_doubles, reference_backward, triton
from rlhf_fast.reference.kl_estimate import KINDS
from rlhf_fast.reference.kl_estimate import kl_estimate as reference

ALL_KINDS = (*KINDS, *(f"{k}+" for k in KINDS))

Clamp = float | tuple[float | None, float | None] | None


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: str = "k1",
    *,
    clamp: Clamp = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Estimate of KL(policy || reference) per sampled token, in nats (Schulman, "Approximating KL divergence").

    With x = ref_logprobs - logprobs: k1 -x; k2 x^2 / 2; k3 e^x - 1 - x (a series below |x| = 0.25, so that it keeps its
    digits where policy and reference are close); abs |x|. "k1+", "k2+", "k3+", "abs+" have the value of the named kind and
    the gradient of k2, the one whose expectation is the gradient of the reverse KL.

    Args:
        logprobs: (...) of the policy, in nats.
        ref_logprobs: like logprobs.
        kind: one of the eight above.
        clamp: bound of the estimate (+-), or (bound of x, bound of the estimate) with None for no bound: 10.0 is OpenRLHF's
            rule, (20.0, 10.0) verl's rule for k3. Beyond a bound the gradient is 0 ("+" kinds: still that of k2).
        mask: like logprobs, True = real token. Masked tokens are never read and give 0.

    Returns:
        (...) fp32 (fp64 when an input is fp64); differentiable towards both log-probs.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, kind or bound; names the argument.
    """
    if type(logprobs) is not Tensor or logprobs.dtype not in _check.FLOATS:
        _check.floating("kl_estimate", "logprobs", logprobs)
    ready = _check.alike("kl_estimate", logprobs, "logprobs", {"ref_logprobs": ref_logprobs})
    if mask is not None:
        mask = _check.mask_like("kl_estimate", mask, logprobs, "logprobs")
    _check.choice("kl_estimate", "kind", kind, ALL_KINDS)
    clamp_in, clamp_out = (math.inf, math.inf) if clamp is None else bounds("kl_estimate", "clamp", clamp)
    if not ready:
        logprobs, ref_logprobs = _check.common_wide(logprobs, ref_logprobs)  # type: ignore[assignment]
    return _kl_estimate(logprobs, ref_logprobs, mask, kind, clamp_in, clamp_out)


def bounds(op: str, argument: str, clamp: Clamp) -> tuple[float, float]:
    """(bound of the log-ratio, bound of the estimate), infinity for none."""
    if isinstance(clamp, (tuple, list)):
        if len(clamp) != 2:
            raise _check.error(ValueError, op, argument, repr(clamp), "a number or a pair (log-ratio, estimate)")
        low, high = (math.inf if x is None else _check.number(op, argument, x, 0.0, open_low=True) for x in clamp)
        return low, high
    return math.inf, math.inf if clamp is None else _check.number(op, argument, clamp, 0.0, open_low=True)


def _forward(logprobs, ref_logprobs, mask, kind, clamp_in, clamp_out):  # type: ignore[no-untyped-def]
    out = _buffers.empty_like(logprobs)
    kernel("kl_estimate")(
        logprobs,
        ref_logprobs,
        mask,
        out,
        out.numel(),
        ALL_KINDS.index(kind) % len(KINDS),
        clamp_in,
        clamp_out,
        out.dtype is torch.float64,
        torch.get_num_threads(),
    )
    return out


def _backward_cpp(grad, logprobs, ref_logprobs, mask, kind, clamp_in, clamp_out):  # type: ignore[no-untyped-def]
    grad = grad.contiguous()
    grad_logprobs = _buffers.empty_like(grad)
    kernel("kl_estimate_backward")(
        grad,
        logprobs,
        ref_logprobs,
        mask,
        grad_logprobs,
        grad.numel(),
        ALL_KINDS.index(kind) % len(KINDS),
        kind.endswith("+"),
        clamp_in,
        clamp_out,
        grad.dtype is torch.float64,
        torch.get_num_threads(),
    )
    return grad_logprobs


def _backward_reference(grad, logprobs, ref_logprobs, mask, kind, clamp_in, clamp_out):  # type: ignore[no-untyped-def]
    inputs = (logprobs, ref_logprobs, mask, kind, clamp_in, clamp_out)
    return reference_backward(reference, inputs, (0,), (grad,))[0]


_kl_estimate_backward = Op(
    "kl_estimate_backward",
    "(Tensor grad, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, str kind, float clamp_in, float clamp_out) -> Tensor",
    reference=_backward_reference,
    fake=lambda grad, *_: torch.empty_like(grad, memory_format=torch.contiguous_format),
    backends=[
        cuda("kl_estimate", "backward", no_doubles),
        triton("kl_estimate", "backward", no_doubles),
        cpp(_backward_cpp),
    ],
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logprobs, ref_logprobs, mask, *ctx.rest = inputs
    ctx.save_for_backward(logprobs, ref_logprobs, mask)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    grad_logprobs = _kl_estimate_backward(grad, *ctx.saved_tensors, *ctx.rest)
    # Every estimator is a function of the difference alone.
    return grad_logprobs, -grad_logprobs if ctx.needs_input_grad[1] else None, None, None, None, None


_kl_estimate = Op(
    "kl_estimate",
    "(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, str kind, float clamp_in, float clamp_out) -> Tensor",
    reference=reference,
    fake=lambda logprobs, *_: torch.empty_like(logprobs, memory_format=torch.contiguous_format),
    backends=[cuda("kl_estimate", "forward", no_doubles), triton("kl_estimate", "forward", no_doubles), cpp(_forward)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0, 1),
)
