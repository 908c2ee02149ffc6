"""One timed comparison: correctness gate, contenders in turn, medians and ratios, memory, share of the machine's limit."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_fast import _buffers
from rlhf_fast.bench.machine import Machine

Results = tuple[Tensor | None, ...]
Call = Callable[[dict[str, Any]], Results]
OURS = "rlhf_fast"
SAMPLE_SECONDS = 2e-2
"""A timing covers at least this much: shorter calls are repeated."""
PAIRS = 9
"""Fewest timings of ours, each beside the machine's limits, behind a share of them."""
MET, MISSED = ": met", ": missed"
DIFFERENT = 0.02
"""A contender whose results are further off than this share of the largest one computes something else, and is marked."""


@dataclass(frozen=True)
class Prepared:
    """A call in two parts, of which a timer may time the second alone."""

    before: Callable[[dict[str, Any]], Any]
    after: Callable[[Any], Results]

    def __call__(self, inputs: dict[str, Any]) -> Results:
        return self.after(self.before(inputs))


class GateError(Exception):
    """Our own result is wrong: no timing without correctness."""


@dataclass(frozen=True)
class Case:
    """One row: an op at a shape and dtype, forward or forward and backward."""

    op: str
    name: str
    make: Callable[[], dict[str, Any]]
    """Inputs, shared by all contenders; none of them may change them."""
    contenders: Mapping[str, Call | str]
    """By name, ours among them as OURS; a string is the reason why one cannot run here. Each returns the same sequence of
    results, with None where it has none."""
    truth: Call
    """The same in fp64; may return only the first rows."""
    limit: Callable[[Machine], float] | None = None
    """Seconds that the machine needs at least."""
    bars: Mapping[str, float] = field(default_factory=dict)
    """Aims: how many times as fast as a contender. "limit": the share of the machine's limit to reach."""
    memory: bool = True
    """Whether peak memory is worth a column."""
    memory_bar: float | None = None
    """Bytes of peak extra memory to stay below."""
    seconds: float = 12.0
    """Time to spend on the row, roughly."""
    relative: float | None = None
    """Gate and errors are relative to every single value, and this is what ours may be off."""
    aims_ms: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds to stay below on the card named: "device" between events, "call" with what the host does."""
    card: str = ""
    """Part of the name of the device that the aims in milliseconds are for."""


@dataclass
class Row:
    """What was measured."""

    op: str
    name: str
    milliseconds: dict[str, float]
    ratios: dict[str, float]
    """{contender: its time / ours}, median over rounds in which both ran."""
    errors: dict[str, float]
    """Largest error against fp64, as a share of the largest value of that result."""
    missing: dict[str, str]
    different: list[str]
    peak_bytes: dict[str, int] = field(default_factory=dict)
    limit_ms: float | None = None
    share_of_limit: float | None = None
    """Of the machine's limit that was reached, median over rounds and, where those are few, further pairs of both."""
    rates: dict[str, float] = field(default_factory=dict)
    """Of the machine beside this row, medians likewise."""
    rounds: int = 0
    shortfalls: list[str] = field(default_factory=list)
    call_ms: dict[str, float] = field(default_factory=dict)
    """Of calls in a row, with what the host does; on a device alone."""
    backend: str = ""
    """That served our op."""
    verdicts: list[str] = field(default_factory=list)
    """One line for each aim in milliseconds or bytes: met, missed, or not judged on this device."""


class Rates(Protocol):
    """Takes the machine's limits again, as fields of Machine."""

    def rates(self) -> dict[str, float]: ...


class Timer:
    """How a call is timed and its memory counted: here by the clock and the resident set of this process."""

    def seconds(self, call: Call, inputs: dict[str, Any], repeats: int) -> float:
        """Mean of so many calls."""
        return seconds_of(call, inputs, repeats)

    def whole(self, call: Call, inputs: dict[str, Any]) -> float | None:
        """Seconds with what the host does, where that is another number."""
        return None

    def peak(self, call: Callable[[], object]) -> int:
        """Extra bytes during one call; -1 where the system does not tell."""
        return peak_extra_bytes(call)

    def settle(self) -> None:
        """Before a row: give back what earlier ones hold."""


def run(
    case: Case,
    machine: Machine,
    *,
    only: Callable[[str], bool] = lambda _: True,
    probe: Rates | None = None,
    timer: Timer | None = None,
) -> Row:
    """Gate, then time. Raises GateError when our result is wrong.

    probe: takes the machine's limits in every round; None: those of `machine`.
    """
    timer = Timer() if timer is None else timer
    timer.settle()
    torch.compiler.reset()  # it compiles a function a few times only, and then runs it eagerly without a word
    inputs = case.make()
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, call in case.contenders.items():
        if name != OURS and not only(name):
            continue
        if isinstance(call, str):
            missing[name] = call
        else:
            calls[name] = call
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor) and v.numel() < 2**22}
    truth = case.truth(inputs)
    errors: dict[str, float] = {}
    different = []
    for name in list(calls):
        try:
            result = calls[name](inputs)
        except Exception as error:
            if name == OURS:
                raise
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            del calls[name]
            continue
        if name == OURS:
            gate(case, result, truth)
        errors[name] = worst_error(result, truth, relative=case.relative is not None)
        if not errors[name] <= DIFFERENT:
            different.append(name)
        del result
    for name, x in before.items():
        if not torch.equal(x, inputs[name]):
            raise GateError(f"{case.op} {case.name}: a contender changed its input {name}")
    limits: list[float] = []
    rates: dict[str, list[float]] = {}

    def beside() -> None:
        if case.limit is not None:
            found = {} if probe is None else probe.rates()
            now: dict[str, Any] = dict(found)
            limits.append(case.limit(replace(machine, **now)))
            for name, rate in found.items():
                rates.setdefault(name, []).append(rate)

    times, rounds = interleave(calls, inputs, case.seconds, beside=beside, seconds=timer.seconds)
    own = list(times[OURS])
    while limits and len(limits) < PAIRS:  # where rounds are few: those of slow contenders
        beside()
        own.append(timer.seconds(calls[OURS], inputs, max(1, int(SAMPLE_SECONDS / own[0]))))
    ratios = {
        name: statistics.median(theirs / ours for theirs, ours in zip(seconds, times[OURS], strict=True))
        for name, seconds in times.items()
        if name != OURS
    }
    row = Row(
        case.op,
        case.name,
        {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()},
        ratios,
        errors,
        missing,
        different,
        limit_ms=1e3 * statistics.median(limits) if limits else None,
        share_of_limit=statistics.median(map(truediv, limits, own)) if limits else None,
        rates={name: statistics.median(values) for name, values in rates.items()},
        rounds=rounds,
    )
    if case.memory:
        row.peak_bytes = {name: timer.peak(partial(call, inputs)) for name, call in calls.items()}
    whole = {name: timer.whole(call, inputs) for name, call in calls.items()}
    row.call_ms = {name: 1e3 * seconds for name, seconds in whole.items() if seconds is not None}
    row.shortfalls = shortfalls(case, row)
    row.verdicts = verdicts(case, row, machine.name)
    row.shortfalls += [line.removesuffix(MISSED) for line in row.verdicts if line.endswith(MISSED)]
    return row


def gate(case: Case, result: Results, truth: Results) -> None:
    """Our results against fp64, to ten units in the last place of the largest value, or to the case's relative error."""
    for i, (x, t) in enumerate(zip(result, truth, strict=True)):
        if x is None or t is None:
            continue
        x = x[: len(t)] if x.dim() else x
        try:
            rtol, atol = _tolerance(x.dtype, t) if case.relative is None else (case.relative, 0.0)
            torch.testing.assert_close(x.double(), t.double(), rtol=rtol, atol=atol)
        except AssertionError as error:
            text = " ".join(str(error).split())
            raise GateError(f"{case.op} {case.name}: result {i} is wrong: {text}") from None


def _tolerance(dtype: torch.dtype, truth: Tensor) -> tuple[float, float]:
    """(relative, absolute)."""
    rtol = 10 * torch.finfo(dtype).eps
    return rtol, rtol * (float(truth.abs().max()) if truth.numel() else 0.0)


def worst_error(result: Results, truth: Results, *, relative: bool = False) -> float:
    """Largest difference over all results, each as a share of its largest value, or (`relative`) each number as one of its own."""
    worst = 0.0
    for x, t in zip(result, truth, strict=True):
        if x is None or t is None or t.numel() == 0:
            continue
        x = x[: len(t)] if x.dim() else x
        gap, size = (x.double() - t.double()).abs(), t.double().abs()
        scale = size if relative else size.max()
        worst = max(worst, float((gap / scale.where(scale > 0, 1.0)).max()))
    return worst


def interleave(
    calls: Mapping[str, Call],
    inputs: dict[str, Any],
    budget: float,
    fewest: int = 3,
    beside: Callable[[], None] = lambda: None,
    seconds: Callable[[Call, dict[str, Any], int], float] | None = None,
) -> tuple[dict[str, list[float]], int]:
    """{name: seconds per call, one per round}: every round times every contender once, so that drift meets all alike, and calls
    `beside` once."""
    seconds = seconds_of if seconds is None else seconds
    first = {name: seconds(call, inputs, 1) for name, call in calls.items()}
    repeats = {name: max(1, int(SAMPLE_SECONDS / max(t, 1e-7))) for name, t in first.items()}
    once = sum(first[name] * repeats[name] for name in calls)
    rounds = max(fewest, min(21, int(budget / max(once, 1e-6))))
    long = all(n == 1 for n in repeats.values())  # then that was a round already
    times = {name: [first[name]] if long else [] for name in calls}
    if long:
        beside()
    for _ in range(rounds - long):
        beside()
        for name, call in calls.items():
            times[name].append(seconds(call, inputs, repeats[name]))
    return times, rounds


def seconds_of(call: Call, inputs: dict[str, Any], repeats: int) -> float:
    """Mean of so many calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call(inputs)
    return (time.perf_counter() - start) / repeats


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Growth of the resident set at its highest during one call; -1 where the system does not tell."""
    gc.collect()
    _buffers.release()
    status = Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        start = _status_bytes(status, "VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        result = call()
        peak = _status_bytes(status, "VmHWM")
    except (OSError, AttributeError):
        return -1
    del result
    return max(0, peak - start)


def _status_bytes(status: Path, name: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{name} is not in {status}")


def verdicts(case: Case, row: Row, name: str) -> list[str]:
    """Whether each aim in milliseconds was met on the device of that name."""
    found = []
    for kind, aim in case.aims_ms.items():
        took = (row.milliseconds if kind == "device" else row.call_ms).get(OURS)
        if took is None:
            continue
        line = f"{took:.3g} ms {'on the device' if kind == 'device' else 'a whole call'}, aim {aim:g} on {case.card}"
        if case.card not in name:
            found.append(f"{line}: not judged on {name}")
        else:
            found.append(line + (MET if took <= aim else MISSED))
    if case.aims_ms and case.memory_bar is not None and 0 <= row.peak_bytes.get(OURS, -1) <= case.memory_bar:
        found.append(f"{row.peak_bytes[OURS] / 2**20:.0f} MiB of extra memory, aim {case.memory_bar / 2**20:.0f}{MET}")
    return found


def shortfalls(case: Case, row: Row) -> list[str]:
    """One line for each aim that was not reached."""
    found = []
    for name, aim in case.bars.items():
        if name == "limit":
            if row.share_of_limit is not None and row.share_of_limit < aim:
                found.append(f"{row.share_of_limit:.2f} of the machine's limit, aim {aim:g}")
        elif name in row.ratios and row.ratios[name] < aim:
            found.append(f"{row.ratios[name]:.2f} x {name}, aim {aim:.2f}")
    if case.memory_bar is not None and row.peak_bytes.get(OURS, 0) > case.memory_bar:
        found.append(f"{row.peak_bytes[OURS] / 2**20:.0f} MiB of extra memory, aim {case.memory_bar / 2**20:.0f}")
    return found
