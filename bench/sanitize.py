"""compute-sanitizer over the parity suite on a GPU: `python bench/sanitize.py [pytest arguments]`.

Runs NVIDIA's four tools, each in a process of its own: memcheck (out of bounds, misaligned, leaks of the device heap), racecheck
(shared memory), initcheck (reads of memory that nothing wrote) and synccheck (barriers). All four run even when one finds
something; the exit status is 1 when any did, 2 when nothing could run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITE = "tests/gpu/device"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86
"""Exit status that a tool gives when it has findings, so that it is not taken for a failing test."""


def sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, or in the toolkit that CUDA_HOME names."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def missing() -> str | None:
    """Why nothing can run here, or None."""
    if sanitizer() is None:
        return "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin; it comes with the CUDA toolkit"
    import torch

    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no CUDA device; `rlhf-fast doctor` says what it sees"
    return None


def command(program: str, tool: str, arguments: Sequence[str]) -> list[str]:
    """The suite under one tool."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all"]
    if tool == "memcheck":
        options += ["--leak-check", "no"]  # PyTorch's allocator keeps its blocks
    return [program, *options, sys.executable, "-m", "pytest", "-q", "-x", *(arguments or [SUITE])]


def environment() -> dict[str, str]:
    """One allocation per tensor, so that an overrun leaves it, and a failing launch at its own line."""
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}


def main(arguments: Sequence[str]) -> int:
    reason = missing()
    if reason is not None:
        print(f"sanitize: {reason}", file=sys.stderr)
        return 2
    program = sanitizer()
    assert program is not None
    outcome: dict[str, str] = {}
    for tool in TOOLS:
        print(f"== {tool}", flush=True)
        status = subprocess.run(command(program, tool, arguments), cwd=ROOT, env=environment(), check=False).returncode
        outcome[tool] = {0: "clean", FOUND: "findings above"}.get(status, f"the suite failed with status {status}")
    print("\n" + "\n".join(f"{tool:<10} {result}" for tool, result in outcome.items()))
    return 0 if set(outcome.values()) == {"clean"} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
