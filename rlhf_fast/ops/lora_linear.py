"""A frozen linear layer under the adapters of several roles: one product with the weight, and a low-rank one per segment of rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._native import DTYPES, kernel
from rlhf_fast._op import Op, cpp, no_doubles, reference_backward, triton
from rlhf_fast.ops import _matmul
from rlhf_fast.reference.lora_linear import lora_linear as reference
from rlhf_fast.reference.lora_linear import segments as each_segment

OP = "lora_linear"

Segments = Sequence[tuple[int, int]]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    lora_input: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | Sequence[float] = 1.0,
    segments: Segments | None = None,
    ranks: Sequence[int] | None = None,
) -> Tensor:
    """y = W x + b, plus `scale B (A x)` on segments of rows, each with factors of its own (Hu et al. 2021, arXiv 2106.09685, eq. 3).

    The weight is read once for all rows, whichever adapters they have; rows of no segment cost nothing more than the layer.
    Low-rank activations are summed and kept in fp32.

    Args:
        x: (..., in); its leading dimensions count as rows.
        weight: (out, in) frozen, in the dtype of x; may be the transpose of a stored (in, out). A constant.
        lora_a: (R, in) factors of all segments, one below the other, any float dtype.
        lora_b: (out, R), side by side.
        lora_input: like x, what the factors read instead of x: x after dropout; or None.
        bias: (out,), a constant; or None.
        scale: alpha / r of each segment, or one for all.
        segments: (first, last) row of each, the last excluded; rising, disjoint, within the rows. None: one of all rows.
        ranks: rank of each segment, R in total; None: R in equal parts.

    Returns:
        (..., out) in the dtype of x; differentiable towards x, lora_a, lora_b and lora_input.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or bounds, a weight that requires a gradient; names the argument.
    """
    _check.floating(OP, "x", x)
    for name, other in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
        if other is not None:
            _check.floating(OP, name, other)
            _check.device(OP, name, other, x, "x")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.requires_grad:
            raise _check.error(ValueError, OP, name, "requires_grad=True", "a frozen one: it gets no gradient")
    if weight.dtype is not x.dtype:
        raise _check.error(TypeError, OP, "weight", weight.dtype, f"{x.dtype} (the dtype of x)")
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        got = f"shape {tuple(weight.shape)} for x of shape {tuple(x.shape)}"
        raise _check.error(ValueError, OP, "weight", got, "(out, in) for x (..., in)")
    out_features, in_features = weight.shape
    total = lora_a.shape[0] if lora_a.dim() else 0
    _check.shape(OP, "lora_a", lora_a, (total, in_features), "R factors of in numbers")
    _check.shape(OP, "lora_b", lora_b, (out_features, total), "as many factors of out numbers as lora_a has")
    if bias is not None:
        _check.shape(OP, "bias", bias, (out_features,), "the rows of weight")
    if lora_input is not None:
        _check.like(OP, "lora_input", lora_input, x, "x")
        if lora_input.dtype is not x.dtype:
            raise _check.error(TypeError, OP, "lora_input", lora_input.dtype, f"{x.dtype} (the dtype of x)")
    rows = x.numel() // in_features if in_features else x.shape[:-1].numel()
    bounds = [0, rows] if segments is None else _bounds(segments, rows)
    count = len(bounds) // 2
    if isinstance(scale, (int, float)):
        scale = [scale] * count
    if len(scale) != count:
        raise _check.error(ValueError, OP, "scale", f"{len(scale)} numbers", f"one for each of {count} segments")
    scales = [_check.number(OP, "scale", s) for s in scale]
    if ranks is None:
        if total % max(count, 1):
            raise _check.error(
                ValueError, OP, "ranks", None, f"ranks of {count} segments, since {total} is no multiple"
            )
        ranks = [total // count] * count if count else []
    if len(ranks) != count or sum(ranks) != total or any(isinstance(r, bool) or r < 0 for r in ranks):
        raise _check.error(ValueError, OP, "ranks", list(ranks), f"{count} ranks that make {total} together")
    return apply(x, weight, lora_a, lora_b, lora_input, bias, scales, bounds, list(ranks))


def apply(x, weight, lora_a, lora_b, lora_input, bias, scales, bounds, ranks):  # type: ignore[no-untyped-def]
    """The op on checked arguments, as its schema has them."""
    y, _ = _lora_linear(x, weight, lora_a, lora_b, lora_input, bias, scales, bounds, ranks)
    return y


def _bounds(segments: Segments, rows: int) -> list[int]:
    flat = [int(bound) for segment in segments for bound in segment]
    if len(flat) != 2 * len(segments) or any(a > b for a, b in pairwise([0, *flat, rows])):
        raise _check.error(ValueError, OP, "segments", list(segments), f"rising (first, last) within {rows} rows")
    return flat


def _kept(lora_a: Tensor, bounds: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """Place for the low-rank activations of all segments, one after the other."""
    size = sum((bounds[2 * i + 1] - bounds[2 * i]) * rank for i, rank in enumerate(ranks))
    return lora_a.new_empty(size, dtype=torch.float32)


def _each(low: Tensor, scales: Sequence[float], bounds: Sequence[int], ranks: Sequence[int]):  # type: ignore[no-untyped-def]
    """Segments with the part (rows, rank) of `low` that is theirs."""
    done = 0
    for scale, rows, places in each_segment(scales, bounds, ranks):
        height, rank = rows.stop - rows.start, places.stop - places.start
        yield scale, rows, places, low[done : done + height * rank].view(height, rank)
        done += height * rank


def _layer(x, weight, bias, inputs, a, b, low, scales, bounds, ranks):  # type: ignore[no-untyped-def]
    """(..., out) = x W^T + bias of contiguous x, and on the rows of each segment + low b with low = scale inputs a, which is kept.

    Where `_matmul.native`, the sums of the update go on where those of the weight end, and y is written once: segment by segment,
    since the product packs the weight anew for every few hundred rows anyway. PyTorch's product elsewhere, which needs no conversion
    of its result. inputs: (rows, in); a: (in, R), b: (R, out) fp32.
    """
    each = _each(low, scales, bounds, ranks)
    if not _matmul.native(x.dtype):
        y = F.linear(x, weight, bias)
        for scale, rows, places, part in each:
            _update(inputs[rows], a[:, places], b[places], _rows(y)[rows], part, scale)
        return y
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    flat, out, done, factors = _rows(x), y.view(-1, weight.shape[0]), 0, weight.t()
    bias = bias if bias is None else bias.float().contiguous()
    for scale, rows, places, part in each:
        _matmul.matmul(flat[done : rows.start], factors, out[done : rows.start], bias=bias)
        _update(inputs[rows], a[:, places], b[places], None, part, scale)
        _matmul.matmul(flat[rows], factors, out[rows], bias=bias, low_rank=(part, b[places]))
        done = rows.stop
    _matmul.matmul(flat[done:], factors, out[done:], bias=bias)
    return y


def _update(x: Tensor, a: Tensor, b: Tensor, y: Tensor | None, low: Tensor, scale: float) -> None:
    """low (rows, r) = scale x a, and y += low b; x, y: rows of stride-1 elements; a (in, r), b (r, out): fp32, any strides."""
    a, b = (factor if 1 in factor.stride() else factor.contiguous() for factor in (a, b))  # as the product packs them
    kernel(OP)(
        x, a, b, low, y, _matmul.workspace(), x.shape[0], x.shape[1], b.shape[1], a.shape[1], x.stride(0), *a.stride(),
        *b.stride(), 0 if y is None else y.stride(0), scale, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """x as (rows, in), rows contiguous."""
    x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    return x if x.is_contiguous() else x.contiguous()


def _forward(x, weight, lora_a, lora_b, lora_input, bias, scales, bounds, ranks):  # type: ignore[no-untyped-def]
    x, low = x.contiguous(), _kept(lora_a, bounds, ranks)
    inputs = _rows(x if lora_input is None else lora_input)
    y = _layer(x, weight, bias, inputs, lora_a.float().t(), lora_b.float().t(), low, scales, bounds, ranks)
    return y, low  # y is no view: models add to it in place


def _backward_cpp(grad, x, weight, lora_a, lora_b, low, other_input, scales, bounds, ranks, wanted):  # type: ignore[no-untyped-def]
    flat, grad_y, a, b = _rows(x), _rows(grad), lora_a.float(), lora_b.float()
    grad_x, grad_low = None, torch.empty_like(low)
    grad_input = torch.zeros_like(flat) if wanted[3] else None
    done = wanted[0] and not other_input
    if done:
        grad_x = _layer(grad_y, weight.t(), None, grad_y, b, a, grad_low, scales, bounds, ranks)
    elif wanted[0]:
        grad_x = _layer(grad_y, weight.t(), None, grad_y, b, a, grad_low, (), (), ())
    grad_a = torch.zeros_like(a, memory_format=torch.contiguous_format) if wanted[1] else None
    grad_b = torch.zeros_like(b, memory_format=torch.contiguous_format) if wanted[2] else None
    narrow = x.dtype is not torch.float32
    each = zip(_each(low, scales, bounds, ranks), _each(grad_low, scales, bounds, ranks), strict=True)
    for (scale, rows, places, part), (*_, grad_part) in each:
        if not done and (grad_input is not None or grad_a is not None):
            into = None if grad_input is None else grad_input[rows]
            _update(grad_y[rows], b[:, places], a[places], into, grad_part, scale)
        if grad_a is not None and part.numel():
            _matmul.matmul(grad_part.t(), flat[rows], grad_a[places], narrow=narrow)
        if grad_b is not None and part.numel():
            # The few rows of low^T are packed once; those of grad_y^T would have to be, all of them.
            transposed = torch.empty(part.shape[1], grad_y.shape[1])
            _matmul.matmul(part.t(), grad_y[rows], transposed, narrow=narrow)
            grad_b[:, places] = transposed.t()
    return (
        x.new_zeros(0) if grad_x is None else grad_x.view(x.shape),
        lora_a.new_zeros(0) if grad_a is None else grad_a.to(lora_a.dtype),
        lora_b.new_zeros(0) if grad_b is None else grad_b.to(lora_b.dtype),
        x.new_zeros(0) if grad_input is None else grad_input.view(x.shape),
    )


def _backward_reference(grad, x, weight, lora_a, lora_b, low, other_input, scales, bounds, ranks, wanted):  # type: ignore[no-untyped-def]
    inputs = (x, weight, lora_a, lora_b, x if other_input else None, None, scales, bounds, ranks)
    of = (x, lora_a, lora_b, x)
    where = [place for place, want in zip((0, 2, 3, 4), wanted, strict=True) if want]
    found = iter(reference_backward(reference, inputs, where, (grad,)))
    return tuple(next(found) if want else t.new_zeros(0) for t, want in zip(of, wanted, strict=True))


def _fake_backward(grad, x, weight, lora_a, lora_b, low, other_input, scales, bounds, ranks, wanted):  # type: ignore[no-untyped-def]
    of = (x, lora_a, lora_b, x)
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip(of, wanted, strict=True))


_FACTORS = "Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b"
_SEGMENTS = "float[] scales, int[] bounds, int[] ranks"

_lora_linear_backward = Op(
    f"{OP}_backward",
    f"(Tensor grad, {_FACTORS}, Tensor low, bool other_input, {_SEGMENTS}, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_fake_backward,
    backends=[
        triton(OP, "backward", no_doubles),
        cpp(_backward_cpp, no_doubles),
    ],
    strided=True,
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, lora_a, lora_b, lora_input, _, *ctx.rest = inputs
    ctx.other_input = lora_input is not None
    # x itself is needed by nothing but the gradient of the factors that read it.
    ctx.save_for_backward(lora_input if ctx.other_input else x, weight, lora_a, lora_b, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    none = (None,) * 4
    if grad is None:
        return None, None, None, None, None, *none
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    found = _lora_linear_backward(grad, *ctx.saved_tensors, ctx.other_input, *ctx.rest, wanted)
    grad_x, grad_a, grad_b, grad_input = (g if want else None for g, want in zip(found, wanted, strict=True))
    return grad_x, None, grad_a, grad_b, grad_input, *none


_lora_linear = Op(
    OP,
    f"({_FACTORS}, Tensor? lora_input, Tensor? bias, {_SEGMENTS}) -> (Tensor, Tensor)",
    reference=lambda *args: (reference(*args), _kept(args[2], *args[7:]).zero_()),
    fake=lambda x, weight, lora_a, lora_b, lora_input, bias, scales, bounds, ranks: (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        _kept(lora_a, bounds, ranks),
    ),
    backends=[
        triton(OP, declines=no_doubles),
        cpp(_forward, no_doubles),
    ],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0, 2, 3, 4),
    strided=True,
)
