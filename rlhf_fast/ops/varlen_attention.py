"""Causal attention within sequences that lie end to end."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check
from rlhf_fast._native import DTYPES, kernel
from rlhf_fast._op import Op, cpp, no_doubles, reference_backward
from rlhf_fast.reference.varlen_attention import varlen_attention as reference

OP = "varlen_attention"


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the keys of the query's own sequence up to its place (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    Scores, weights and sums are fp32. Scores exist for a few queries at a time (as in FlashAttention, Dao et al. 2022, arXiv
    2205.14135) and are computed again for the gradients, which need nothing but the inputs and two numbers per query and head.

    Args:
        query: (N, heads, D), N tokens of all sequences, any strides.
        key: (N, kv_heads, D) in the dtype of query; kv_heads divides heads, and head h reads those of h kv_heads / heads.
        value: (N, kv_heads, Dv) in the dtype of query.
        cu_seqlens: (S + 1,) boundaries of S sequences, from 0 to N.
        scale: of the scores; None: D^-1/2.
        window: keys that a query sees at most, its own included; None: all.

    Returns:
        (N, heads, Dv) in the dtype of query; differentiable towards query, key and value.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or boundaries; names the argument.
    """
    _check.floating(OP, "query", query)
    if query.dim() != 3 or not query.shape[2]:
        raise _check.error(ValueError, OP, "query", f"shape {tuple(query.shape)}", "(N, heads, D) with D above 0")
    N, heads, D = query.shape
    for name, x in (("key", key), ("value", value)):
        _check.floating(OP, name, x)
        _check.device(OP, name, x, query, "query")
        if x.dtype is not query.dtype:
            raise _check.error(TypeError, OP, name, x.dtype, f"{query.dtype} (the dtype of query)")
    if key.dim() != 3 or key.shape[0] != N or key.shape[2] != D or not key.shape[1] or heads % key.shape[1]:
        expected = f"({N}, kv_heads, {D}) with kv_heads that divide {heads}, as query"
        raise _check.error(ValueError, OP, "key", f"shape {tuple(key.shape)}", expected)
    if value.dim() != 3 or value.shape[:2] != key.shape[:2] or not value.shape[2]:
        expected = f"({N}, {key.shape[1]}, Dv) with Dv above 0, as key"
        raise _check.error(ValueError, OP, "value", f"shape {tuple(value.shape)}", expected)
    cu_seqlens = _check.cu_seqlens(OP, cu_seqlens, N, query)
    scale = D**-0.5 if scale is None else _check.number(OP, "scale", scale)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise _check.error(ValueError, OP, "window", repr(window), "an integer above 0, or None")
    return apply(query, key, value, cu_seqlens, scale, window or 0)


def apply(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float, window: int) -> Tensor:
    """The op on checked arguments, as its schema has them."""
    out, _ = _varlen_attention(query, key, value, cu_seqlens, scale, window)
    return out


def _run(query, key, value, grad, cu_seqlens, state, outs, scale, window):  # type: ignore[no-untyped-def]
    """The kernel; outs: (out, of query, of key, of value), of which it writes those of its pass."""
    if not query.shape[0] or not query.shape[1]:
        return
    threads = torch.get_num_threads()
    longest = int(cu_seqlens.diff().max())
    sizes = (query.shape[0], len(cu_seqlens) - 1, longest, query.shape[1], *key.shape[1:], value.shape[2])
    strides = [s for x in (query, key, value, grad) for s in ((0, 0) if x is None else x.stride()[:2])]

    def call(workspace: Tensor | None) -> int:
        return kernel(OP)(
            query, key, value, grad, cu_seqlens, state, *outs, workspace, *sizes, *strides, window, scale,
            DTYPES[query.dtype], threads,
        )  # fmt: skip

    call(_buffers.empty((call(None) * threads,), torch.float32))


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Stride 1 along the last dimension: what the kernel takes."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _forward(query, key, value, cu_seqlens, scale, window):  # type: ignore[no-untyped-def]
    query, key, value = _dense(query, key, value)
    out, state = _fake(query, key, value)
    _run(query, key, value, None, cu_seqlens, state, (out, None, None, None), scale, window)
    return out, state


def _backward_cpp(grad, query, key, value, cu_seqlens, state, scale, window):  # type: ignore[no-untyped-def]
    grad, query, key, value = _dense(grad, query, key, value)
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    _run(query, key, value, grad, cu_seqlens, state, (None, *found), scale, window)
    return tuple(found)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    return query.new_empty(*query.shape[:2], value.shape[2]), query.new_empty(*query.shape[:2], 2, dtype=wide)


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens"

_varlen_attention_backward = Op(
    f"{OP}_backward",
    f"(Tensor grad, {_INPUTS}, Tensor state, float scale, int window) -> (Tensor, Tensor, Tensor)",
    reference=lambda grad, query, key, value, cu_seqlens, _, *rest: reference_backward(
        lambda *args: reference(*args)[0], (query, key, value, cu_seqlens, *rest), (0, 1, 2), (grad,)
    ),
    fake=lambda grad, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:3]),
    backends=[cpp(_backward_cpp, no_doubles)],
    strided=True,
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.rest = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    none = (None,) * 3
    if grad is None:
        return *none, *none
    found = _varlen_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *(g if want else None for g, want in zip(found, ctx.needs_input_grad, strict=False)), *none


_varlen_attention = Op(
    OP,
    f"({_INPUTS}, float scale, int window) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=[cpp(_forward, no_doubles)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0, 1, 2),
    strided=True,
)
