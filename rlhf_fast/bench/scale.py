"""Time and peak memory against tokens, classes and threads: `rlhf-fast bench --scale`.

Each op runs beside one plain PyTorch formulation at powers of two, behind the same gate as the rows of the table; the smallest of
a few interleaved times counts. A point whose logits would not leave RESERVE bytes of the machine free is left out and named. A
straight line of slope 1 is the claim: for each curve there is the fitted exponent, the largest deviation of a point from
proportionality (its time per token against the median of the curve), and every step between neighbours that is a kink.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.bench.cases import advantages, gae, ppo_loss
from rlhf_fast.bench.cases import linear_token_logprobs as heads
from rlhf_fast.bench.cases import token_logprobs as tokens
from rlhf_fast.bench.cases.common import no_grad
from rlhf_fast.bench.engine import (
    DIFFERENT,
    OURS,
    Case,
    GateError,
    gate,
    interleave,
    peak_extra_bytes,
    worst_error,
)

AXES = ("tokens", "classes", "threads")
LEAST = 1024
"""First point of tokens and of classes."""
TOKENS, CLASSES, SCANNED = 2**16, 2**18, 2**20
"""Last points: tokens with logits, classes, tokens of the ops that see no logits."""
WIDTH, LENGTH = 576, 512
"""Of a hidden state; of the rows of a scan."""
FIXED = {"tokens": 1024, "classes": 8192}
"""What does not vary, except that against threads there are four times the tokens."""
BLOCK = 1024
"""Rows of logits that are drawn; more of them are repetitions."""
RESERVE = 10 * 2**30
"""Bytes of memory to leave free."""
KINK = 1.25
"""Ratio of the cost per unit of two neighbours from which a step is a kink."""
WALKS = 3
"""Along a curve."""
SLOW = 1.0
"""Seconds of one round from which two walks have to do."""
SECONDS = 0.6
"""For a point, roughly, where a round takes less."""


@dataclass(frozen=True)
class Family:
    """An op whose cost is a function of tokens and, where there are logits, of classes."""

    op: str
    name: str
    at: Callable[[int, int], Case]
    """(tokens, classes)."""
    copies: Mapping[str, float] = field(default_factory=dict)
    """{contender: how many times the logits in fp32 it holds at its peak, inputs among them}; none without logits."""

    @property
    def logits(self) -> bool:
        return bool(self.copies)


@dataclass(frozen=True)
class Curve:
    """One op along one axis."""

    op: str
    name: str
    axis: str
    held: str
    """What does not vary, for a reader."""
    points: tuple[tuple[int, int, int], ...]
    """(tokens, classes, threads); one of them varies."""
    family: Family

    @property
    def xs(self) -> list[int]:
        return [p[AXES.index(self.axis)] for p in self.points]


@dataclass
class Line:
    """One contender on one curve."""

    xs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    """Bytes; empty where memory is not worth a picture."""
    left_out: list[int] = field(default_factory=list)
    """Points that need too much memory."""


@dataclass(frozen=True)
class Fit:
    """How straight a line is on logarithmic axes."""

    exponent: float
    """Slope of the least squares."""
    deviation: float
    """Largest ratio of a cost per unit to the median one; below 1 where it is the smallest that is furthest."""
    at: int
    kinks: list[tuple[int, int, float]]
    """(from, to, ratio of the costs per unit); neighbouring steps of one direction are one kink."""


def fit(xs: Sequence[int], ys: Sequence[float], power: int = 1) -> Fit | None:
    """Against y = c x^power; None for fewer than two points or where some y is not positive."""
    if len(xs) < 2 or min(ys) <= 0:
        return None
    units = [y / x**power for x, y in zip(xs, ys, strict=True)]
    slope, _ = statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys])
    middle = statistics.median(units)
    furthest = max(range(len(units)), key=lambda i: abs(math.log(units[i] / middle)))
    kinks: list[tuple[int, int, float]] = []
    for i in range(len(xs) - 1):
        ratio = units[i + 1] / units[i]
        if 1 / KINK <= ratio <= KINK:
            continue
        if kinks and kinks[-1][1] == xs[i] and (kinks[-1][2] > 1) == (ratio > 1):
            start, _, before = kinks.pop()
            kinks.append((start, xs[i + 1], before * ratio))
        else:
            kinks.append((xs[i], xs[i + 1], ratio))
    return Fit(slope, units[furthest] / middle, xs[furthest], kinks)


def powers(last: int, step: int = 2) -> list[int]:
    """LEAST, 2 LEAST ... up to last."""
    found = [LEAST]
    while found[-1] * step <= last:
        found.append(found[-1] * step)
    return found


def threads_of(machine: int) -> list[int]:
    """1, 2, 4 ... and all of them."""
    return sorted({2**i for i in range(machine.bit_length()) if 2**i <= machine} | {machine})


def families() -> list[Family]:
    """What is measured, and its plain PyTorch formulation."""

    def logits(name: str, of: Callable[[tokens.Formulation], Any], ours: float, eager: float) -> Family:
        def at(rows: int, vocab: int) -> Case:
            found = {OURS: of(tokens.ours), "eager": of(tokens.log_softmax)}
            make = partial(repeated, lambda n: tokens.make(n, vocab, torch.float32), rows)
            return Case("token_logprobs", name, make, found, tokens.truth(of(tokens.log_softmax)))

        return Family("token_logprobs", name, at, {OURS: ours, "eager": eager})

    def head(rows: int, vocab: int) -> Case:
        found = {OURS: heads.both_of(heads.ours, False), "materialised": heads.both_of(heads.materialised, False)}
        make = partial(heads.make, WIDTH, torch.float32, rows, vocab)
        return Case("linear_token_logprobs", "", make, found, heads.truth)

    def scan(module: Any, make: Any, ours: Any, name: str, other: Any) -> Callable[[int, int], Case]:
        def at(count: int, _: int) -> Case:
            found = {OURS: ours, name: other}
            return Case("", "", partial(make, count // LENGTH, LENGTH), found, module.truth, memory=False)

        return at

    both = ppo_loss.with_gradients
    loss = both(ppo_loss.fed(ppo_loss.bare))
    return [
        logits("forward", tokens.forward_of, 1, 4),
        logits("forward + backward", tokens.both_of, 2, 6),
        Family(
            "linear_token_logprobs",
            "frozen head, forward + backward",
            head,
            {OURS: 0, "materialised": 4},
        ),
        Family("gae", "", scan(gae, gae.make, gae.ours, "eager loop", no_grad(gae.loop))),
        Family("advantages", "", scan(advantages, advantages.make, advantages.ours, "eager", advantages.eager)),
        Family(
            "ppo_loss",
            "forward + backward",
            scan(ppo_loss, ppo_loss.make, both(ppo_loss.ours), "eager, loss alone", loss),
        ),
    ]


def repeated(make: Callable[[int], dict[str, Tensor]], rows: int) -> dict[str, Tensor]:
    """make(rows), where drawing that many random numbers would take longer than the measurement."""
    block = make(min(rows, BLOCK))
    times = rows // min(rows, BLOCK)
    return {k: x.repeat(times, *[1] * (x.dim() - 1)) if times > 1 else x for k, x in block.items()}


def curves(largest: int | None = None) -> Iterator[Curve]:
    """Every op against every axis that it has, up to `largest` tokens and classes."""
    cap = largest or SCANNED
    machine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    now, vocab = torch.get_num_threads(), min(FIXED["classes"], cap)
    for f in families():
        classes = f"{vocab:,} classes" if f.logits else f"rows of {LENGTH}"
        if f.op.startswith("linear"):
            classes += f", H {WIDTH}"
        many = powers(min(cap, TOKENS if f.logits else SCANNED))
        yield Curve(f.op, f.name, "tokens", classes, tuple((n, vocab, now) for n in many), f)
        if f.logits:
            n = FIXED["tokens"]
            yield Curve(
                f.op, f.name, "classes", f"{n:,} tokens", tuple((n, v, now) for v in powers(min(cap, CLASSES))), f
            )
        n = min(cap, 4 * FIXED["tokens"] if f.logits else TOKENS)
        points = tuple((n, vocab, t) for t in threads_of(machine))
        yield Curve(f.op, f.name, "threads", f"{n:,} tokens, {classes}", points, f)


def measure(curve: Curve, budget: float, seconds: float = SECONDS) -> dict[str, Line]:
    """{contender: its line}. Raises GateError when a result is wrong, ours or the one it is compared with.

    The curve is walked several times. The smallest time counts, so that a disturbance of seconds does not bend it, and the largest
    peak: what a heap has left over, or the system takes back meanwhile, makes the resident set grow by less than was held.
    """
    cases = {x: curve.family.at(*p[:2]) for x, p in zip(curve.xs, curve.points, strict=True)}
    lines: dict[str, Line] = defaultdict(Line)
    calls: dict[int, dict[str, Any]] = {}
    for x, (count, classes, _) in zip(curve.xs, curve.points, strict=True):
        copies = {name: curve.family.copies.get(name, 0) for name in cases[x].contenders}
        calls[x] = {n: c for n, c in cases[x].contenders.items() if 4 * count * classes * copies[n] <= budget}
        for name in copies.keys() - calls[x].keys():
            lines[name].left_out.append(x)
    for x in (curve.xs[0], curve.xs[-1]):  # what a process allocates once for a size is nobody's
        inputs = cases[x].make()
        for call in calls[x].values():
            call(inputs)
    best: dict[str, dict[int, float]] = defaultdict(dict)
    peaks: dict[str, dict[int, int]] = defaultdict(dict)
    before = torch.get_num_threads()
    try:
        for walk in range(WALKS):
            for x, (_, _, threads) in zip(curve.xs, curve.points, strict=True):
                if not calls[x] or (walk > 1 and sum(best[name][x] for name in calls[x]) > SLOW):
                    continue
                torch.set_num_threads(threads)
                inputs = cases[x].make()
                if walk == 0 or cases[x].memory:
                    for name, peak in _observe(cases[x], calls[x], inputs, gated=walk > 0).items():
                        peaks[name][x] = max(peaks[name].get(x, -1), peak)
                times, _ = interleave(calls[x], inputs, seconds / WALKS, fewest=1)
                for name, found in times.items():
                    best[name][x] = min(best[name].get(x, math.inf), *found)
                del inputs
    finally:
        torch.set_num_threads(before)
    for name in cases[curve.xs[0]].contenders:
        line = lines[name]
        line.xs, line.seconds = list(best[name]), list(best[name].values())
        line.peaks = [peaks[name][x] for x in line.xs if cases[x].memory]
    return {name: lines[name] for name in cases[curve.xs[0]].contenders}


def _observe(case: Case, calls: Mapping[str, Any], inputs: dict[str, Any], gated: bool) -> dict[str, int]:
    """{contender: bytes at its peak}, and the gate for what has not passed it."""
    truth = None if gated else case.truth(inputs)
    peaks = {}
    for name, call in calls.items():
        kept: list[Any] = []
        peaks[name] = peak_extra_bytes(lambda call=call, kept=kept: kept.append(call(inputs)))  # type: ignore[misc]
        if truth is None:
            continue
        if name == OURS:
            gate(case, kept[0], truth)
        elif not worst_error(kept[0], truth) <= DIFFERENT:
            raise GateError(f"{case.op} {case.name}: {name} computes something else")
    return peaks


def record(curve: Curve, lines: Mapping[str, Line]) -> dict[str, Any]:
    """One curve with its fits, for a file."""
    return {
        "op": curve.op,
        "name": curve.name,
        "axis": curve.axis,
        "held": curve.held,
        "lines": {name: asdict(line) | {"fit": fits(curve.axis, line)} for name, line in lines.items()},
    }


def fits(axis: str, line: Line) -> dict[str, Any]:
    """Of time, and of memory where there is some: {"seconds": ..., "peaks": ...}."""
    found = {"seconds": fit(line.xs, line.seconds, -1 if axis == "threads" else 1)}
    if line.peaks and axis != "threads":
        found["peaks"] = fit(line.xs, line.peaks)
    return {what: None if f is None else asdict(f) for what, f in found.items()}
