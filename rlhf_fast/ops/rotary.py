"""Rotary position embedding of queries and keys, in one pass over both."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._native import DTYPES, kernel
from rlhf_fast._op import Op, cpp, no_doubles, reference_backward
from rlhf_fast.reference.rotary import rotary as reference

OP = "rotary"


def rotary(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Each head x to x cos + rotate_half(x) sin (Su et al. 2021, arXiv 2104.09864, eq. 34, with the halves of a head as its pairs).

    rotate_half((a, b)) = (-b, a). Computed in fp32 and rounded once.

    Args:
        query: (B, heads, T, D), D even, any strides.
        key: (B, kv_heads, T, D), any strides.
        cosine, sine: (B or 1, T, D) in the dtype of query. Constants.

    Returns:
        (query, key) turned, in their shapes and dtype; the heads of a token lie side by side, as models lay them. Differentiable
        towards both.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, tables that require a gradient; names the argument.
    """
    _check.floating(OP, "query", query)
    if query.dim() != 4 or query.shape[-1] % 2:
        raise _check.error(ValueError, OP, "query", f"shape {tuple(query.shape)}", "(B, heads, T, D) with an even D")
    B, _, T, D = query.shape
    for name, x in (("key", key), ("cosine", cosine), ("sine", sine)):
        _check.floating(OP, name, x)
        _check.device(OP, name, x, query, "query")
        if x.dtype is not query.dtype:
            raise _check.error(TypeError, OP, name, x.dtype, f"{query.dtype} (the dtype of query)")
    if key.dim() != 4 or (key.shape[0], *key.shape[2:]) != (B, T, D):
        raise _check.error(ValueError, OP, "key", f"shape {tuple(key.shape)}", f"({B}, kv_heads, {T}, {D}), as query")
    for name, x in (("cosine", cosine), ("sine", sine)):
        if tuple(x.shape) not in ((B, T, D), (1, T, D)):
            raise _check.error(ValueError, OP, name, f"shape {tuple(x.shape)}", f"({B} or 1, {T}, {D})")
        if x.requires_grad:
            raise _check.error(ValueError, OP, name, "requires_grad=True", "a constant: it gets no gradient")
    return _rotary(query, key, cosine, sine)


def _turn(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    query, key, cosine, sine = (
        x if x.stride(-1) == 1 or not x.numel() else x.contiguous() for x in (query, key, cosine, sine)
    )
    B, heads, T, D = query.shape
    outs = [torch.empty((B, T, x.shape[1], D), dtype=x.dtype) for x in (query, key)]
    tables = [stride for x in (cosine, sine) for stride in (x.stride(0) if len(x) > 1 else 0, x.stride(1))]
    kernel(OP)(
        query, key, cosine, sine, *outs, B, T, heads, key.shape[1], D, *query.stride()[:3], *key.stride()[:3], *tables,
        transposed, DTYPES[query.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)


def _fake(query: Tensor, key: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    B, _heads, T, D = query.shape
    made = [x.new_empty(B, T, x.shape[1], D).transpose(1, 2) for x in (query, key)]
    return made[0], made[1]


def _backward_reference(grad_query, grad_key, cosine, sine):  # type: ignore[no-untyped-def]
    # Linear in its inputs: any place to differentiate at will do.
    return reference_backward(reference, (grad_query, grad_key, cosine, sine), (0, 1), (grad_query, grad_key))


_rotary_backward = Op(
    f"{OP}_backward",
    "(Tensor grad_query, Tensor grad_key, Tensor cosine, Tensor sine) -> (Tensor, Tensor)",
    reference=_backward_reference,
    fake=_fake,
    backends=[cpp(lambda *args: _turn(*args, True), no_doubles)],
    strided=True,
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx, grad_query, grad_key):  # type: ignore[no-untyped-def]
    found = _rotary_backward(grad_query, grad_key, *ctx.saved_tensors)
    return *(g if want else None for g, want in zip(found, ctx.needs_input_grad, strict=False)), None, None


_rotary = Op(
    OP,
    "(Tensor query, Tensor key, Tensor cosine, Tensor sine) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=[cpp(lambda *args: _turn(*args, False), no_doubles)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0, 1),
    strided=True,
)
