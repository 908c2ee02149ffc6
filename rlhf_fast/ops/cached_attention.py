"""Attention of single tokens over keys and values that lie where they were written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._native import DTYPES, contiguous, kernel
from rlhf_fast._op import Op, cpp, no_doubles, triton
from rlhf_fast.reference.cached_attention import cached_attention as reference

WIDTH = 1024
"""Largest head width of the C++ kernel (kAttentionWidth of csrc/cpu/ops.h)."""

TRITON_WIDTH = 256
"""Largest head width of the Triton kernel, which holds a tile of keys in registers."""


def cached_attention(
    query: Tensor,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    prefix_keys: Tensor | None = None,
    prefix_values: Tensor | None = None,
    prefix_rows: Tensor | None = None,
    prefix_start: Tensor | None = None,
    prefix_stop: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of N tokens, each over the keys of a prompt that many may share and then over those of its own slot.

    out = softmax(softcap tanh(scale q k / softcap)) v (Vaswani et al. 2017, arXiv 1706.03762, eq. 1) over the last `window` keys
    among [prefix_start, prefix_stop) of row prefix_rows of the prefixes, followed by [0, length) of row `rows` of the slots. Keys
    are read in place: none is copied for the query heads of its group or for the samples of its prompt, and padding is not read.
    The softmax is online (Milakov & Gimelshein 2018, arXiv 1805.02867) in fp32, in blocks counted from the first key: a token has
    the same bits in any batch.

    Args:
        query: (N, heads, D) fp32, bf16, fp16 or fp64, D contiguous.
        keys, values: (slots, kv_heads, room, D) and (slots, kv_heads, room, Dv) like query, the last dimension contiguous;
            kv_heads divides heads. None: there are only prefixes.
        rows, lengths: (N,) int64, slot of a token and how many of its keys are there. A length of 0 reads none.
        prefix_keys, prefix_values: (prompts, kv_heads, P, D) and (prompts, kv_heads, P, Dv), or None: there are only slots.
        prefix_rows, prefix_start, prefix_stop: (N,) int64, prompt of a token and its positions there.
        scale: of q k; None = D^-0.5.
        softcap: number > 0; None = none.
        window: integer > 0, how many keys a token sees, itself included; None = all.

    Returns:
        (N, heads, Dv) contiguous in the dtype of query; 0 for a token without keys. Not differentiable.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument. Indices and lengths out of range are
            found on the CPU alone.
    """
    op = "cached_attention"
    _check.floating(op, "query", query)
    if query.dim() != 3:
        raise _check.error(ValueError, op, "query", f"shape {tuple(query.shape)}", "(N, heads, D)")
    own = _checked_part(query, "", keys, values, {"rows": rows, "lengths": lengths})
    shared = _checked_part(
        query,
        "prefix_",
        prefix_keys,
        prefix_values,
        {"prefix_rows": prefix_rows, "prefix_start": prefix_start, "prefix_stop": prefix_stop},
    )
    if own is None and shared is None:
        raise _check.error(TypeError, op, "keys", None, "a tensor, or prefix_keys")
    if own is not None and shared is not None and own[1:] != shared[1:]:
        raise _check.error(ValueError, op, "prefix_keys", f"(kv_heads, Dv) {shared[1:]}", f"{own[1:]}, those of keys")
    width = query.shape[2]
    factor = width**-0.5 if scale is None else _check.number(op, "scale", scale)
    cap = 0.0 if softcap is None else _check.number(op, "softcap", softcap, 0.0, open_low=True)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise _check.error(ValueError, op, "window", repr(window), "an integer above 0")
    return _cached_attention(
        query.detach(), keys, values, rows, lengths, prefix_keys, prefix_values, prefix_rows, prefix_start, prefix_stop,
        factor, cap, window or 0,
    )  # fmt: skip


def _checked_part(
    query: Tensor, prefix: str, keys: Tensor | None, values: Tensor | None, places: dict[str, Tensor | None]
) -> tuple[int, int, int] | None:
    """(positions, kv_heads, Dv) of the slots or of the prefixes, or None where there are none."""
    op = "cached_attention"
    given = {f"{prefix}keys": keys, f"{prefix}values": values, **places}
    if all(x is None for x in given.values()):
        return None
    tensors: dict[str, Tensor] = {}
    for name, x in given.items():
        if x is None:
            raise _check.error(TypeError, op, name, None, f"a tensor, as the others of {', '.join(given)} are")
        tensors[name] = x
        _check.device(op, name, _check.tensor(op, name, x), query, "query")
    k, v = tensors[f"{prefix}keys"], tensors[f"{prefix}values"]
    for name, x in ((f"{prefix}keys", k), (f"{prefix}values", v)):
        if x.dtype is not query.dtype:
            raise _check.error(TypeError, op, name, x.dtype, f"{query.dtype}, the dtype of query")
        if x.dim() != 4:
            raise _check.error(ValueError, op, name, f"shape {tuple(x.shape)}", "(rows, kv_heads, positions, D)")
    heads, width = query.shape[1:]
    if k.shape[3] != width or k.shape[1] == 0 or heads % k.shape[1]:
        expected = f"(rows, kv_heads, positions, {width}) with kv_heads dividing {heads}"
        raise _check.error(ValueError, op, f"{prefix}keys", f"shape {tuple(k.shape)}", expected)
    _check.shape(op, f"{prefix}values", v, (*k.shape[:3], v.shape[3]), f"{prefix}keys without D")
    known = query.is_cpu and type(query) is Tensor and not torch.compiler.is_compiling()
    limits = {"rows": k.shape[0] - 1, "prefix_rows": k.shape[0] - 1}
    for name in places:
        x = tensors[name]
        if x.dtype is not torch.int64:
            raise _check.error(TypeError, op, name, x.dtype, "torch.int64")
        _check.shape(op, name, x, query.shape[:1], "query without heads and D")
        high = limits.get(name, k.shape[2])
        if known and x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= high:
            raise _check.error(ValueError, op, name, f"{int(x.min())} to {int(x.max())}", f"numbers from 0 to {high}")
    return k.shape[2], k.shape[1], v.shape[3]


def _dense(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last dimension."""
    return x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def attend(  # type: ignore[no-untyped-def]
    query, keys, values, rows, lengths, prefix_keys, prefix_values, prefix_rows, prefix_start, prefix_stop, scale,
    softcap, window, new_keys=None, new_values=None,
):  # fmt: skip
    """The C++ kernel; arguments as checked by cached_attention, softcap 0: none, window 0: all keys.

    new_keys, new_values: (N, kv_heads, D) and (N, kv_heads, Dv) of the tokens themselves; with them keys and values are written
    first, at position length - 1 of each token's slot, and may not be shared between tokens.
    """
    query, prefix_keys, prefix_values, new_keys, new_values = map(
        _dense, (query, prefix_keys, prefix_values, new_keys, new_values)
    )
    if new_keys is None:
        keys, values = _dense(keys), _dense(values)
    some_keys, some_values = (prefix_keys, prefix_values) if keys is None else (keys, values)
    tokens, heads, width = query.shape
    value_width = some_values.shape[3]
    out = torch.empty((tokens, heads, value_width), dtype=query.dtype)
    strides: list[int] = []
    for x, strided in ((keys, 3), (values, 3), (new_keys, 2), (new_values, 2), (prefix_keys, 3), (prefix_values, 3)):
        strides += (0,) * strided if x is None else x.stride()[:strided]
    kernel("cached_attention")(
        query, keys, values, new_keys, new_values, prefix_keys, prefix_values,
        *map(contiguous, (rows, lengths, prefix_rows, prefix_start, prefix_stop)),
        out, tokens, heads, some_keys.shape[1], width, value_width, query.stride(0), query.stride(1), *strides, window,
        scale, softcap, DTYPES[query.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _up_to(widest: int) -> Callable[..., str | None]:
    """`declines` of kernels that keep a head in registers or on the stack, and compute in fp32."""

    def declines(query: Tensor, keys: Any, values: Tensor | None, *rest: Any) -> str | None:
        of_values = rest[3] if values is None else values
        if max(query.shape[2], of_values.shape[3]) > widest:
            return f"heads are wider than {widest}"
        return no_doubles(query)

    return declines


def _fake(query: Tensor, keys: Any, values: Tensor | None, *rest: Any) -> Tensor:
    of_values = rest[3] if values is None else values
    return query.new_empty(*query.shape[:2], of_values.shape[3])


_cached_attention = Op(
    "cached_attention",
    "(Tensor query, Tensor? keys, Tensor? values, Tensor? rows, Tensor? lengths, Tensor? prefix_keys, Tensor? prefix_values, "
    "Tensor? prefix_rows, Tensor? prefix_start, Tensor? prefix_stop, float scale, float softcap, int window) -> Tensor",
    reference=reference,
    fake=_fake,
    backends=[triton("cached_attention", declines=_up_to(TRITON_WIDTH)), cpp(attend, _up_to(WIDTH))],
    strided=True,
)
