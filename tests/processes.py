"""Other processes seen from a test, however slow the machine is: whether they are there, what they used, and waiting for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 60.0
"""Seconds that nothing here takes unless something is wrong."""


def _stat(pid: int) -> list[str] | None:
    """What /proc says of it from its state on; None for one that has ended, also if nobody has waited for it."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # the second one between opening and reading
        return None
    return found if found[0] != "Z" else None


def alive(pid: int) -> bool:
    """Whether it has not ended."""
    return _stat(pid) is not None


def cpu_seconds(pid: int) -> float | None:
    """Processor time it has used; None once it has ended."""
    found = _stat(pid)
    return None if found is None else (int(found[11]) + int(found[12])) / os.sysconf("SC_CLK_TCK")


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until it holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"still not after {seconds:g} s: {condition}")
        time.sleep(0.01)


def gone(pid: int, seconds: float = PATIENCE) -> bool:
    """Whether it ends by then: a killed process does so when the system gets to it."""
    try:
        until(lambda: not alive(pid), seconds)
    except TimeoutError:
        return False
    return True
