"""Loads the compiled CPU kernels (rlhf_fast._cpu) and keeps the reason when there are none."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from rlhf_fast import _env, _extension

ABI = 9
"""Version of the argument structs in csrc/cpu/ops.h; the module carries the one it was built with."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The codes of csrc/common/dtype.h."""


class IsaError(RuntimeError):
    """RLHF_FAST_CPU_ISA names an instruction set that is unknown or that this processor lacks."""


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """(module, None) or (None, reason). Raises IsaError when a forced instruction set cannot be had."""
    try:
        module = _extension.load("_cpu", ABI)
    except _extension.Damaged as error:
        return _fall_back(str(error))
    if module is None:
        return None, "rlhf_fast._cpu was not built (no C++ compiler at install time?)"
    forced = _env.get("CPU_ISA")
    if forced is not None:
        try:
            module.select_isa(forced)
        except ValueError as error:
            raise IsaError(f"RLHF_FAST_CPU_ISA={forced}: {error}") from None
    return module, None


def _fall_back(reason: str) -> tuple[None, str]:
    warnings.warn(f"rlhf_fast: {reason}; falling back to the PyTorch reference", RuntimeWarning, stacklevel=4)
    return None, reason


def missing() -> str | None:
    """Reason why the C++ kernels cannot be used, or None when they can."""
    return load()[1]


@functools.cache
def kernel(name: str) -> Callable[..., int]:
    """The function `name` of the compiled module; it takes the fields of its struct in csrc/cpu/ops.h by position,
    tensors (or None) for the pointers. What they point to is the caller's to check."""
    module, reason = load()
    if module is None:
        raise RuntimeError(f"rlhf_fast: kernel '{name}' is not available: {reason}")
    return getattr(module, name)


def contiguous(x: Tensor | None) -> Tensor | None:
    """x.contiguous(), or None."""
    return x if x is None or x.is_contiguous() else x.contiguous()
