"""Float formats that numpy lacks, on their bit patterns, and the poison that stands for undefined values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bf16_to_f32(bits: NDArray) -> NDArray:
    """Exact. bits: uint16 of any shape."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(np.shape(bits))


def f32_to_bf16(values: NDArray) -> NDArray:
    """Bit patterns (uint16), rounded to the nearest, ties to even; every NaN becomes the canonical 0x7fff of PTX."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    with np.errstate(over="ignore"):  # a NaN may carry out; it is replaced
        rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, np.uint16(0x7FFF), rounded).reshape(np.shape(values))


def tf32(values: NDArray) -> NDArray:
    """fp32 rounded to the ten fraction bits of TF32, ties to even; infinities and NaN as they are."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    bias = ((bits >> np.uint32(13)) & np.uint32(1)) + np.uint32(0x0FFF)
    rounded = (bits + bias) & np.uint32(0xFFFFE000)
    return np.where(special, bits, rounded).view(np.float32).reshape(np.shape(values))


def poison(shape: tuple[int, ...], dtype: np.dtype, bf16: bool = False) -> NDArray:
    """Values that spoil whatever they reach: NaN and, in every second place, since a comparison may lose a NaN, a large number with a
    pattern of its own."""
    if bf16:
        return _alternating(shape, 0x7FC1, 0x4B1A, dtype)
    if dtype.kind == "f":
        return _alternating(shape, np.nan, 14.203125, dtype)
    if dtype.kind == "b":
        return np.full(shape, True, dtype)
    return np.full(shape, np.array(0x5A5A5A5A5A5A5A5A, np.uint64).astype(dtype), dtype)


def _alternating(shape: tuple[int, ...], even: float, odd: float, dtype: np.dtype) -> NDArray:
    found = np.full(shape, even, dtype)
    found.reshape(-1)[1::2] = odd
    return found
