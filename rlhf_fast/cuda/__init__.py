"""The CUDA kernels: one compiled module per CUDA major (rlhf_fast._cuda12, rlhf_fast._cuda13), and one cell per op beside this file.

The modules need neither a CUDA library nor a driver to be imported; libcuda.so.1 is opened at the first launch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from rlhf_fast import _env, _extension

ABI = 3
"""Version of the argument structs in csrc/cuda/ops.h; a module carries the one it was built with."""

MAJORS = (12, 13)
"""CUDA majors that a module can be built for."""


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """(module, None) or (None, reason): the module for the CUDA major of this torch, or the one of RLHF_FAST_CUDA_LIB."""
    forced = _env.get("CUDA_LIB")
    if forced is not None:
        name, path, source = *_named(forced), f"RLHF_FAST_CUDA_LIB={forced}: "
        if path is not None and not path.is_file():
            return None, f"{source}there is no such file"
    else:
        reason = _unusable()
        if reason is not None:
            return None, reason
        name, path, source = f"_cuda{(torch.version.cuda or '').partition('.')[0]}", None, ""
    try:
        module = _extension.load(name, ABI, path)
    except _extension.Damaged as error:
        return _fall_back(f"{source}{error}")
    if module is None:
        return None, f"{source}rlhf_fast.{name} was not built{_others()}"
    return module, None


def _named(forced: str) -> tuple[str, Path | None]:
    """Module name and file of a value of RLHF_FAST_CUDA_LIB."""
    if forced.isdecimal():
        return f"_cuda{forced}", None
    return Path(forced).name.partition(".")[0], Path(forced)


def _unusable() -> str | None:
    """Why this torch has no use for a module, or None."""
    if torch.version.hip is not None:
        return f"this torch is built for ROCm {torch.version.hip}"
    if torch.version.cuda is None:
        return "this torch is built for the CPU alone"
    return None


def _others() -> str:
    there = [str(major) for major in MAJORS if _extension.built(f"_cuda{major}")]
    if not there:
        return " (no CUDA compiler at install time?)"
    return f", and torch is of CUDA {torch.version.cuda}; built: CUDA {', '.join(there)} (RLHF_FAST_CUDA_LIB={there[-1]} forces it)"


def _fall_back(reason: str) -> tuple[None, str]:
    warnings.warn(f"rlhf_fast: {reason}; falling back to other kernels", RuntimeWarning, stacklevel=4)
    return None, reason


def missing() -> str | None:
    """Reason why the CUDA kernels cannot be used, or None when they can."""
    return load()[1]


@functools.cache
def kernel(name: str) -> Callable[..., None]:
    """The launcher `name` of the compiled module; it takes the fields of its struct in csrc/cuda/ops.h by position: tensors (or
    None) for the pointers, a number for the stream. What they point to is the caller's to check.

    A launch that fails raises RuntimeError, which says whether the driver is missing or too old, or which architectures were built.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(f"rlhf_fast: CUDA kernel '{name}' is not available: {reason}")
    return getattr(module, name)


def report() -> list[str]:
    """One line per module: what it was built by and for, or why it is not there."""
    lines = []
    for major in MAJORS:
        try:
            module = _extension.load(f"_cuda{major}", ABI)
        except _extension.Damaged as error:
            lines.append(f"CUDA {major}       {error}")
            continue
        if module is None:
            lines.append(f"CUDA {major}       not built")
        else:
            lines.append(f"CUDA {major}       built by CUDA {module.TOOLKIT} for {' '.join(module.ARCHES)}")
    module, reason = load()
    if module is None:
        return [*lines, f"in use        none: {reason}"]
    why = module.check()
    return [*lines, f"in use        {module.__name__}{'' if why is None else ', and cannot launch: ' + why}"]
