"""`rlhf-fast bench`: run the microbenchmarks, print a table with every shortfall, write JSON, Markdown and a roofline."""

from __future__ import annotations

import fnmatch
import importlib
import json
import math
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from rlhf_fast._op import OPS
from rlhf_fast.bench import audit, device, device_cases, machine, peers, render, scale, scale_render, tune
from rlhf_fast.bench import cases as rows
from rlhf_fast.bench.engine import Case, GateError, Rates, Row, Timer, run

NATIVE = ("eager", "torch.compile", "bare", "materialised", "chunked", "in two steps", "gae alone")
"""Beginnings of the names of contenders that need no other library."""


@dataclass(frozen=True)
class BenchConfig:
    """Every op against the reference, PyTorch, torch.compile and other libraries, in one run after a correctness gate."""

    ops: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Ops, or patterns of "op case" (all when none is given)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to time: "cuda" takes shapes of a GPU, events with a flushed cache, and writes one result file."""
    peers: bool = False
    """Also time the libraries that are installed: TRL, Liger-Kernel, verl, OpenRLHF, rlox, flash-attn."""
    tune: bool = False
    """With --device cuda: time the launch sizes of the Triton kernels there, and write them to kernels/common/tuned.py."""
    traffic: bool = False
    """Count bytes, kernels and memory on shapes too large to run instead of timing."""
    scale: bool = False
    """Curves of time and memory against tokens, classes and threads beside one plain PyTorch formulation."""
    largest: int | None = None
    """Most tokens and classes of --scale."""
    json: str | None = None
    """Write the measurements to this file."""
    markdown: str | None = None
    """Write the table to this file."""
    readme: str | None = None
    """Put the table between the marks <!-- bench --> and <!-- /bench --> of this file."""
    plot: str | None = None
    """Write the roofline picture to this file."""
    seconds: float | None = None
    """Time to spend on a row, roughly."""
    threads: int | None = None
    """Threads of PyTorch and of the kernels."""


def is_native(contender: str) -> bool:
    """Whether it needs no other library."""
    return contender.startswith(NATIVE)


def all_cases() -> Iterator[Case]:
    """Those of every op."""
    for info in pkgutil.iter_modules(rows.__path__):
        module = importlib.import_module(f"{rows.__name__}.{info.name}")
        if hasattr(module, "cases"):
            yield from module.cases()


Named = TypeVar("Named", Case, scale.Curve)


def chosen(patterns: Sequence[str], found: list[Named]) -> list[Named]:
    """Those that match. Raises ValueError when a pattern matches none."""
    if not patterns:
        return found
    for pattern in patterns:
        if not any(matches(case, pattern) for case in found):
            known = ", ".join(sorted({case.op for case in found}))
            raise ValueError(f"bench: no case matches {pattern!r}; ops: {known}")
    return [case for case in found if any(matches(case, p) for p in patterns)]


def matches(case: Case | scale.Curve, pattern: str) -> bool:
    """An op's name, or a shell pattern of "op case"."""
    return case.op == pattern or fnmatch.fnmatchcase(f"{case.op} {case.name}", pattern)


def curves(config: BenchConfig) -> int:
    """`--scale`: measure, print, write. 1 when a result is wrong."""
    todo = chosen(config.ops, list(scale.curves(config.largest)))
    limits = machine.measure(machine.Probe())
    budget = max(0, machine.available_bytes() - scale.RESERVE)
    print("\n".join(limits.lines()), f"\nmemory for a point: {budget / 2**30:.1f} GiB", flush=True)
    done: list[tuple[scale.Curve, dict[str, scale.Line]]] = []
    try:
        for curve in todo:
            lines = scale.measure(curve, budget, scale.SECONDS if config.seconds is None else config.seconds)
            done.append((curve, lines))
            print(scale_render.text(curve, lines), flush=True)
    except GateError as error:
        print(f"WRONG  {error}", file=sys.stderr)
        return 1
    if config.json:
        document = {
            "machine": asdict(limits),
            "memory_budget": budget,
            "curves": [scale.record(curve, lines) for curve, lines in done],
        }
        Path(config.json).write_text(json.dumps(document, indent=1), encoding="utf-8")
    table = scale_render.markdown(limits, done)
    if config.markdown:
        Path(config.markdown).write_text(table, encoding="utf-8")
    if config.readme:
        render.into_readme(Path(config.readme), table, "scale")
    if config.plot:
        scale_render.picture(limits, done, Path(config.plot))
    return 0


def counts(config: BenchConfig) -> int:
    """`--traffic`: count, print, write."""
    found = audit.sections()
    text = audit.tables(found)
    print(text)
    if config.json:
        document = {"peers": peers.versions(), "torch": str(torch.__version__)}
        rows = {title: [asdict(c) for c in each] for title, each in found}
        Path(config.json).write_text(json.dumps({**document, "counts": rows}, indent=1), encoding="utf-8")
    if config.markdown:
        Path(config.markdown).write_text(text, encoding="utf-8")
    if config.readme:
        render.into_readme(Path(config.readme), audit.summary(found), "traffic")
    return 0


def make_room(config: BenchConfig, mark: str) -> None:
    """Folders of what will be written, before minutes of measuring. Raises ValueError for a README without its marks."""
    for path in (config.json, config.markdown, config.plot):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    if config.readme:
        render.into_readme(Path(config.readme), None, mark)


@dataclass(frozen=True)
class Place:
    """Where rows are timed, and how."""

    cases: list[Case]
    limits: machine.Machine
    probe: Rates
    timer: Timer
    lines: list[str]


def on_cpu(config: BenchConfig) -> Place:
    """This machine's processor."""
    todo = chosen(config.ops, list(all_cases()))
    probe = machine.Probe()
    limits = machine.measure(probe)
    return Place(todo, limits, probe, Timer(), limits.lines())


def on_device(config: BenchConfig) -> Place:
    """The current CUDA device, after the parity suite. Raises ValueError without one, GateError when the suite fails."""
    where = device.require()
    todo = chosen(config.ops, list(device_cases.cases(where)))
    if (failure := device.parity({case.op for case in todo})) is not None:
        raise GateError(failure)
    events = device.Events(where)
    probe = device.CopyProbe(events, where)
    limits = device.measure(probe)
    return Place(todo, limits, probe, events, device.lines(limits))


def tuned() -> int:
    """`--tune`: 1 when the sizes that are in use give a wrong result."""
    where = device.require()
    try:
        tune.run(device.Events(where), where)
    except GateError as error:
        print(f"WRONG  {error}", file=sys.stderr)
        return 1
    return 0


def write(config: BenchConfig, place: Place, done: Sequence[Row], failed: Sequence[str]) -> None:
    """What was asked for; a run on a device always leaves a file of its numbers."""
    cuda = config.device == "cuda"
    table = render.device_markdown(place.lines, done) if cuda else render.markdown(place.limits, done)
    target = config.json or (f"bench-{slug(place.limits.name)}.json" if cuda else None)
    if target:
        limits: dict[str, Any] = asdict(place.limits)
        document = {
            "machine": {k: None if v == math.inf else v for k, v in limits.items()},
            "peers": peers.versions() if config.peers else {},
            "rows": [asdict(row) for row in done],
            "failed": list(failed),
        }
        Path(target).write_text(json.dumps(document, indent=1), encoding="utf-8")
        if cuda:
            print(f"\nwritten: {target}")
    if config.markdown:
        Path(config.markdown).write_text(table, encoding="utf-8")
    if config.readme:
        render.into_readme(Path(config.readme), table, mark_of(config))
    if config.plot:
        render.roofline(place.limits, done, Path(config.plot))


def slug(name: str) -> str:
    """A device's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def mark_of(config: BenchConfig) -> str:
    """Between whose marks of a README the table belongs."""
    if config.traffic:
        return "traffic"
    if config.scale:
        return "scale"
    return "bench" if config.device == "cpu" else "bench-cuda"


def main(arguments: Sequence[str]) -> int:
    """Entry point of `rlhf-fast bench`. 1 when a correctness gate fails; a missed speed is printed, not an error."""
    config = tyro.cli(BenchConfig, prog="rlhf-fast bench", args=list(arguments))
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.device == "cuda" and (config.scale or config.traffic):
        option = "--scale" if config.scale else "--traffic"
        raise ValueError(f"bench: {option} got --device cuda, expected no device: it runs on the processor")
    if config.tune and config.device == "cpu":
        raise ValueError("bench: --tune got --device cpu, expected --device cuda")
    make_room(config, mark_of(config))
    if config.tune:
        return tuned()
    if config.traffic:
        return counts(config)
    if config.scale:
        return curves(config)
    try:
        place = on_device(config) if config.device == "cuda" else on_cpu(config)
    except GateError as error:
        print(f"WRONG  {error}", file=sys.stderr)
        return 1
    print("\n".join(place.lines), flush=True)
    if config.peers:
        print(
            "peers: " + (", ".join(f"{n} {v}" for n, v in peers.versions().items()) or "none is installed"), flush=True
        )
    done: list[Row] = []
    failed: list[str] = []
    for case in place.cases:
        if config.seconds is not None:
            case = replace(case, seconds=config.seconds)
        try:
            row = run(
                case,
                place.limits,
                only=lambda name: config.peers or is_native(name),
                probe=place.probe,
                timer=place.timer,
            )
        except GateError as error:
            failed.append(str(error))
            print(f"WRONG  {error}", file=sys.stderr, flush=True)
            continue
        except torch.OutOfMemoryError as error:
            failed.append(f"{case.op} {case.name}: {' '.join(str(error).split())[:120]}")
            print(f"FAILED  {failed[-1]}", file=sys.stderr, flush=True)
            continue
        row.backend = OPS[row.op].select("cuda").name if config.device == "cuda" else ""
        done.append(row)
        print(render.text_row(row), flush=True)
    write(config, place, done, failed)
    missed = [f"{row.op} {row.name}: {line}" for row in done for line in row.shortfalls]
    print(f"\n{len(done)} rows, {len(failed)} wrong, {len(missed)} aims missed" + "".join(f"\n  {m}" for m in missed))
    return 1 if failed else 0
