"""Matrix products of the heads: on the CPU the C++ kernel where it is fast, PyTorch elsewhere; on a GPU PyTorch's.

PyTorch's product reaches 40 % of the arithmetic of a processor with AVX-512 that its BLAS does not know, has one result per dtype
(bf16 logits are rounded to 8 bits), and may give a row other bits in another batch. csrc/cpu/matmul.cpp has none of the three.
On a GPU cuBLAS is at home, and gives fp32 results of bf16 operands when asked to, added to fp32 since PyTorch 2.10
(pytorch/pytorch#167931).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _buffers, _native

LINE = 16
"""Elements between which rows of results are spaced: a cache line of fp32."""


def native(dtype: torch.dtype) -> bool:
    """Whether the C++ kernel makes products of that dtype; its operands may then have any narrower one."""
    module, _ = _native.load()
    return dtype is torch.float32 and module is not None and module.isa() != "scalar"


def pitch(columns: int) -> int:
    """Elements between two rows of a result of so many columns: an odd number of cache lines, or rows would compete for few
    places in the caches (8 % of the product at 49,152 columns)."""
    return (-(-columns // LINE) | 1) * LINE


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    add: bool = False,
    narrow: bool = False,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> None:
    """out = a b + bias, or with `add` out += a b; sums in the dtype of out.

    Args:
        a: (m, k) fp32, bf16 or fp16 where `native`, any float elsewhere; bf16 on a GPU stays it when b is, too.
        b: (k, n), likewise.
        out: (m, n), rows of stride-1 elements.
        bias: (n,) contiguous in the dtype of out, or None; not with `add`.
        narrow: fp32 operands may be rounded to bf16 where the processor multiplies bf16: for results that are bf16 in the end.
        low_rank: fp32 (m, r) and (r, n) whose product is added, where `native` and not `narrow`; up to 64 ranks in the same sums.
    """
    if out.is_cuda and a.dtype is b.dtype and a.dtype is not out.dtype:
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        elif bias is None:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(bias, a, b, out_dtype=out.dtype, out=out)
        return
    if not (out.is_cpu and native(out.dtype)):
        a, b = a.to(out.dtype), b.to(out.dtype)
        if add:
            out.addmm_(a, b)
        elif bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)
        return
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    (m, k), n = a.shape, b.shape[1]
    low, low_b = (None, None) if low_rank is None else low_rank
    if low_b is not None and 1 not in low_b.stride():
        low_b = low_b.contiguous()
    low_strides = (0, 0, 0) if low is None or low_b is None else (low.stride(0), *low_b.stride())
    _native.kernel("matmul")(
        a, b, low, low_b, bias, out, workspace(), m, n, k, 0 if low is None else low.shape[1],
        *a.stride(), *b.stride(), *low_strides, out.stride(0),
        _native.DTYPES[a.dtype], _native.DTYPES[b.dtype], add, narrow, torch.get_num_threads(),
    )  # fmt: skip


def workspace() -> Tensor:
    """Where the kernel packs operands: recycled memory, one for each call."""
    module, _ = _native.load()
    assert module is not None
    return _buffers.empty((module.MATMUL_FLOATS,), torch.float32)
