"""What the machine can do, measured in the same run as everything else: the denominators of the benchmark."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rlhf_fast import __version__, _buffers, _native

READ, COPY, EXP = 0, 1, 2
"""Kinds of csrc/cpu/limits.cpp."""
BYTES = 256 * 2**20
"""Size of the array that is read: far beyond every cache."""
L1_FLOATS = 2048


@dataclass(frozen=True)
class Machine:
    """Limits of one machine and how they were taken."""

    name: str
    threads: int
    isa: str
    versions: dict[str, str]
    read: float
    """Bytes per second of reading memory."""
    copy: float
    """Bytes per second of a copy with streaming stores, read and written counted."""
    exp: float
    """Exponentials per second, each added to a sum, on data in the first-level cache: the leanest loop over logits."""
    gemm: dict[str, float] = field(default_factory=dict)
    """Floating-point operations per second of a matrix product, by dtype."""

    def seconds(self, *, read: float = 0, written: float = 0, exps: float = 0) -> float:
        """Least time for that much work: memory traffic or exponentials, whichever takes longer.

        Bytes that are only read go at the rate of reading; a write goes with one read at the rate of a copy.
        """
        paired = min(read, written)
        memory = 2 * paired / self.copy + (read - paired) / self.read + (written - paired) / self.copy
        return max(memory, exps / self.exp)

    def lines(self) -> list[str]:
        """For a reader."""
        rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in self.gemm.items())
        return [
            f"{self.name}, {self.threads} threads, {self.isa}; "
            + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"limits at the start: read {self.read / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s, "
            f"exp-and-add {self.exp / 1e9:.1f} G/s, matrix product {rates}",
        ]


def best(call: Callable[[], object], rounds: int = 7) -> float:
    """Smallest time in seconds of a few calls, after one that warms up."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


class Probe:
    """Takes the rates of reading, copying and exponentials. They are taken again beside every row: the memory of a virtual machine
    may run at half its speed for minutes, and a share of a limit is one of the same moment."""

    def __init__(self) -> None:
        """Raises RuntimeError without the C++ kernels."""
        self._limit = _native.kernel("machine_limit")
        self._source, self._target = (_buffers.empty((BYTES // 4,), torch.float32).fill_(1.0) for _ in range(2))
        self._small = -10 * torch.rand(L1_FLOATS)

    def rates(self, rounds: int = 2) -> dict[str, float]:
        """{"read", "copy", "exp"} as in Machine, the best of so many rounds after one that warms up."""
        limit, threads, floats, repeats = self._limit, torch.get_num_threads(), BYTES // 4, 5000
        source, target, small = self._source, self._target, self._small
        return {
            # A sum of PyTorch may schedule its reads better than our loop; the limit is whatever was reached.
            "read": BYTES
            / min(best(lambda: limit(source, target, floats, READ, 1, threads), rounds), best(source.sum, rounds)),
            "copy": 2 * BYTES / best(lambda: limit(source, target, floats, COPY, 1, threads), rounds),
            "exp": threads
            * repeats
            * L1_FLOATS
            / best(lambda: limit(small, target, L1_FLOATS, EXP, repeats, threads), rounds),
        }


def measure(probe: Probe) -> Machine:
    """The limits of this machine with torch's number of threads."""
    module, _ = _native.load()
    return Machine(
        name=processor(),
        threads=torch.get_num_threads(),
        isa=module.isa() if module else "none",
        versions={"rlhf_fast": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        **probe.rates(7),
        gemm={str(d).removeprefix("torch."): _gemm(d) for d in (torch.float32, torch.bfloat16)},
    )


def _gemm(dtype: torch.dtype, n: int = 1024) -> float:
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n**3 / best(lambda: a @ b, 5)


def available_bytes() -> int:
    """Memory that the system can still hand out; 4 GiB where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30


def processor() -> str:
    """Its name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
