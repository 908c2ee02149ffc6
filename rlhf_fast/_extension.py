"""Loads a compiled module of this package, or says why it cannot be."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import struct
import sys
from pathlib import Path
from types import ModuleType


class Damaged(Exception):
    """The module is there and cannot be used; the text says why."""


def load(name: str, abi: int, path: Path | None = None) -> ModuleType | None:
    """The module rlhf_fast.<name>, from a file of its own if one is given; None when it was not built.

    Raises Damaged when it does not load, or has another ABI version than `abi`.
    """
    full = f"rlhf_fast.{name}"
    spec = importlib.util.find_spec(full) if path is None else _spec(full, path)
    if spec is None:
        return None
    if spec.origin is not None and spec.origin.endswith(".so"):
        torn = _torn(spec.origin)
        if torn is not None:
            raise Damaged(f"{full} does not load: {torn}")
    try:
        if path is None:
            module = importlib.import_module(full)
        else:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)  # type: ignore[union-attr]
    except ImportError as error:
        raise Damaged(f"{full} does not load: {error}") from None
    found = getattr(module, "ABI", None)
    if found != abi:
        raise Damaged(f"{full} has ABI version {found}, this package needs {abi}: reinstall rlhf_fast")
    return module


def built(name: str) -> bool:
    """Whether there is such a module, usable or not."""
    return importlib.util.find_spec(f"rlhf_fast.{name}") is not None


def _spec(full: str, path: Path) -> importlib.machinery.ModuleSpec | None:
    return importlib.util.spec_from_file_location(full, path)


def _torn(origin: str) -> str | None:
    """Reason not to load a cut-off library: the system's loader would map past its end and kill the process (SIGBUS)."""
    with open(origin, "rb") as file:
        header = file.read(64)
    if len(header) == 64 and header[:6] == b"\x7fELF\x02\x01":  # 64-bit, little-endian; the section table stands last
        (table,) = struct.unpack_from("<Q", header, 40)
        entry, count = struct.unpack_from("<HH", header, 58)
        if os.path.getsize(origin) >= table + entry * count:
            return None
    elif header[:4] != b"\x7fELF":
        return f"{origin} is no library" if sys.platform == "linux" else None
    return f"{origin} is cut off"
