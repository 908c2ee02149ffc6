"""What the launcher of a Triton kernel needs beside the kernel: the device, its architecture, sizes and alignment."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor

EXACT = {"enable_fp_fusion": False}
"""Launch options: a product and a sum are one rounding where the kernel says tl.fma and nowhere else, so that two
specialisations of a kernel (aligned rows or not, another Triton release) give the same bits."""

LINE = 16
"""Bytes of the widest load."""


def on_device(x: Tensor) -> AbstractContextManager:
    """Launches inside go to the device that holds x, on its current stream. Does nothing for a CPU tensor."""
    return torch.cuda.device_of(x)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, and 1 for n < 1."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def arch_of(x: Tensor) -> str:
    """The architecture of the device that holds x: 'sm_90', 'gfx942', ...; '' for a CPU tensor."""
    return _arch(x.device.index or 0) if x.device.type == "cuda" else ""


@functools.cache
def _arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def vector_of(x: Tensor, *steps: int) -> int:
    """Elements of x in the widest load when its address and every step (in elements) are multiples of that load, else 1.

    What a kernel may promise with tl.multiple_of about offsets that are sums of multiples of the steps.
    """
    width = LINE // x.element_size()
    aligned = x.data_ptr() % LINE == 0 and all(step % width == 0 for step in steps)
    return width if aligned else 1
