"""Timing on a CUDA device: events around a call with a flushed second-level cache, and limits measured in the same run."""

from __future__ import annotations

import gc
import importlib.util
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_fast import __version__
from rlhf_fast.bench import peers
from rlhf_fast.bench.engine import Call, Prepared, Timer
from rlhf_fast.bench.machine import Machine

FLUSHED = 256 * 2**20
"""Bytes written before a call, or twice the second-level cache where that is more."""
COPIED = 2**30
"""Bytes of the array that is copied: far beyond every cache."""
SUITE = Path(__file__).resolve().parents[2] / "tests" / "gpu" / "device"
"""The tests of a checkout that run on a device."""
CALLS = 50
"""In a row, behind a time that includes the host."""


def require() -> torch.device:
    """The current CUDA device. Raises ValueError that says why there is none."""
    where = "bench: --device cuda: "
    if not torch.backends.cuda.is_built():
        raise ValueError(
            f"{where}this PyTorch ({torch.__version__}) is built for the CPU alone; install a CUDA build of it"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"{where}PyTorch {torch.__version__} finds no CUDA device; `rlhf-fast doctor` says what it sees"
        )
    return torch.device("cuda", torch.cuda.current_device())


def parity(ops: Collection[str], suite: Path = SUITE) -> str | None:
    """Run the tests of the device suite for these ops in a process of its own. What came of it, or None when they passed.

    Without a checkout or pytest there is no suite: that is said, and the gate of every row remains.
    """
    if not suite.is_dir() or importlib.util.find_spec("pytest") is None:
        print("parity suite: not in this installation; every row still passes its own gate", flush=True)
        return None
    print(f"parity suite: {suite}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(suite), "-k", " or ".join(sorted(ops))]
    status = subprocess.run(command, cwd=suite.parents[2], check=False).returncode
    nothing_chosen = 5  # pytest's: this device has no kernels of these ops
    return None if status in (0, nothing_chosen) else f"the parity suite failed (status {status}); nothing is timed"


class Events(Timer):
    """Times with events on the current stream. `cuda` is torch.cuda; tests pass a clock of their own."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        cache = getattr(cuda.get_device_properties(device), "L2_cache_size", 0)
        self._flush = torch.empty(max(FLUSHED, 2 * cache), dtype=torch.int8, device=device)

    def seconds(self, call: Call, inputs: dict[str, Any], repeats: int) -> float:
        """Mean time on the device of so many calls, each on a cold second-level cache; the host runs ahead during the flush."""
        pairs = []
        for _ in range(repeats):
            ready = call.before(inputs) if isinstance(call, Prepared) else inputs
            timed: Callable[[Any], Any] = call.after if isinstance(call, Prepared) else call
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            timed(ready)
            end.record()
            pairs.append((start, end))
        self._cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / repeats / 1e3

    def whole(self, call: Call, inputs: dict[str, Any]) -> float | None:
        """Mean seconds of calls in a row, nothing flushed: of the host or of the device, whichever is slower."""
        if isinstance(call, Prepared):
            return None
        call(inputs)
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda.synchronize()
        start.record()
        for _ in range(CALLS):
            call(inputs)
        end.record()
        self._cuda.synchronize()
        return start.elapsed_time(end) / CALLS / 1e3

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes that PyTorch's allocator holds at most during a call, beyond those before it."""
        gc.collect()
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats()
        before = self._cuda.memory_allocated()
        call()
        self._cuda.synchronize()
        return max(0, self._cuda.max_memory_allocated() - before)

    def settle(self) -> None:
        """Before a row: the allocator's blocks go back to the device, so that no row runs out of memory for another."""
        gc.collect()
        self._cuda.empty_cache()


@dataclass
class CopyProbe:
    """Takes the rate of a copy; it is taken again beside every row, since clocks and neighbours change."""

    events: Events
    device: torch.device
    copied: int = COPIED

    def __post_init__(self) -> None:
        self._source, self._target = (torch.zeros(self.copied, dtype=torch.int8, device=self.device) for _ in range(2))

    def rates(self, rounds: int = 3) -> dict[str, float]:
        """{"read", "copy"} in bytes per second, both those of the copy, read and written counted; the best of so many rounds."""

        def copy(_: dict[str, Any]) -> tuple[()]:
            self._target.copy_(self._source)
            return ()

        copy({})
        rate = 2 * self.copied / min(self.events.seconds(copy, {}, 1) for _ in range(rounds))
        return {"read": rate, "copy": rate}


def measure(probe: CopyProbe, width: int = 8192, cuda: Any = torch.cuda) -> Machine:
    """The limits of the device; products are of square matrices of that width."""
    device, events = probe.device, probe.events
    properties = cuda.get_device_properties(device)

    def products(dtype: torch.dtype) -> float:
        a, b = (torch.ones(width, width, dtype=dtype, device=device) for _ in range(2))

        def product(_: dict[str, Any]) -> tuple[torch.Tensor]:
            return (a @ b,)

        product({})
        return 2 * width**3 / min(events.seconds(product, {}, 1) for _ in range(3))

    return Machine(
        name=properties.name,
        threads=properties.multi_processor_count,
        isa=f"sm_{properties.major}{properties.minor}",
        versions={
            "rlhf_fast": __version__,
            "torch": str(torch.__version__),
            "CUDA": str(torch.version.cuda),
            **{name: version for name in ("triton", "flash-attn") if (version := peers.version(name))},
            "python": platform.python_version(),
        },
        **probe.rates(7),
        exp=math.inf,
        gemm={str(d).removeprefix("torch."): products(d) for d in (torch.float32, torch.bfloat16)},
    )


def lines(machine: Machine) -> list[str]:
    """For a reader."""
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in machine.gemm.items())
    return [
        f"{machine.name}, {machine.threads} multiprocessors, {machine.isa}; "
        + ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        f"limits at the start: copy {machine.copy / 1e9:.0f} GB/s, matrix product {rates}",
    ]
