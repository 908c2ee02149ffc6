"""Mutation of every shipped Triton kernel: how much of what one can break does some layer notice?

    cd tests && python -m gpu.tools.mutate                       # all mutants
    cd tests && python -m gpu.tools.mutate --file gae.py         # those of one file below kernels/
    cd tests && python -m gpu.tools.mutate --seconds 200         # a random sample that fits
    cd tests && python -m gpu.tools.mutate --afresh --write      # forget who noticed what, and remember it anew

A mutant of the source runs the cases of the ops that use its file, in the interpreter under the access checker and then, if
nothing was noticed, compiled in the PTX machine; both compare with the reference. A mutant of compiled code is one `bar.sync`
less in those specialisations of a kernel that have most of them, and runs in the PTX machine; barriers that order nothing (see
gpu.tools.barriers) do not count. A survivor needs an explanation in gpu/compiled/survivors.json; what has one counts as a survivor
and is tried again only with --afresh. Which case noticed a mutant is remembered in gpu/compiled/noticed.json: it goes first.

Interpreter and compiler are processes of their own (gpu.tools.mutate_worker), since an interpreted function cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from gpu.tools.mutants import Mutant, dependents, mutants

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "kernels"
SURVIVORS = Path(__file__).parents[1] / "compiled" / "survivors.json"
NOTICED = SURVIVORS.with_name("noticed.json")
LAYERS = ("interpreter", "interpreter too", "compiled", "barriers")
"""What looks at a mutant, each in a process of its own. The last one has run what is not damaged, compiled, and forks from there."""
HEADS = ["linear_token_logprobs", "linear_ppo_loss"]
"""Ops that have no file in kernels/, and run the kernels of token_logprobs on buffers that the gradient overwrites."""


@dataclass(frozen=True)
class Barrier:
    """One bar.sync less in the compiled code of a kernel, wherever it has that many of them."""

    kernel: str
    """module.function"""
    number: int
    of: int
    cases: tuple[str, ...]
    """That launch such code."""

    @property
    def key(self) -> str:
        return f"{self.kernel}: bar.sync {self.number + 1} of {self.of}"

    def __str__(self) -> str:
        return self.key


@dataclass
class Outcome:
    mutant: Mutant | Barrier
    noticed: str | None
    """By which layer and how, or None: it survived."""


@dataclass
class Report:
    outcomes: list[Outcome] = field(default_factory=list)
    left_out: int = 0
    idle: int = 0
    """Barriers that order nothing."""

    @property
    def survivors(self) -> list[Outcome]:
        return [x for x in self.outcomes if x.noticed is None]

    @property
    def score(self) -> float:
        return 1 - len(self.survivors) / max(1, len(self.outcomes))

    def unexplained(self) -> list[Outcome]:
        return [x for x in self.survivors if explanation(x.mutant) is None]

    def __str__(self) -> str:
        lines = [
            f"mutation score {self.score:.1%}: {len(self.outcomes) - len(self.survivors)} of {len(self.outcomes)} noticed"
            + (f", {self.left_out} not tried" if self.left_out else "")
            + (f"; {self.idle} barriers of the compiler order nothing" if self.idle else "")
        ]
        kinds: dict[str, list[bool]] = {}
        for x in self.outcomes:
            kind = "bar.sync" if isinstance(x.mutant, Barrier) else x.mutant.kind
            kinds.setdefault(kind, []).append(x.noticed is not None)
        lines += [f"  {kind}: {sum(of)} of {len(of)}" for kind, of in kinds.items()]
        lines += [f"  survived: {x.mutant}: {explanation(x.mutant) or 'NOT EXPLAINED'}" for x in self.survivors]
        return "\n".join(lines)


def explanation(mutant: Mutant | Barrier) -> str | None:
    """Why it makes no difference, from the committed table."""
    table = json.loads(SURVIVORS.read_text(encoding="utf-8")) if SURVIVORS.exists() else []
    if isinstance(mutant, Barrier):
        module, _, function = mutant.kernel.rpartition(".")
        of = "bar.sync", f"{module}.py", function, f"{mutant.number + 1} of {mutant.of}"
    else:
        of = mutant.kind, mutant.file, mutant.function, mutant.code
    return next((row["why"] for row in table if (row["kind"], row["file"], row["function"], row["code"]) == of), None)


# ---- a layer, in a process of its own


class Layer:
    """Asks a worker process, one question at a time."""

    def __init__(self, name: str, cache: str) -> None:
        self.name = name
        self._busy = Lock()
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        environment.pop("TRITON_INTERPRET", None)
        if name.startswith("interpreter"):
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "gpu.tools.mutate_worker", name.partition(" ")[0]]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT / "tests"
        )

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._busy:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of the layer '{self.name}' ended")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def layers() -> Iterator[dict[str, Layer]]:
    with tempfile.TemporaryDirectory() as cache:
        opened = {name: Layer(name, cache) for name in LAYERS}
        try:
            yield opened
        finally:
            for layer in opened.values():
                layer.close()


def run(
    chosen: Iterable[Mutant] | None = None,
    *,
    barriers: bool = True,
    seconds: float | None = None,
    seed: int = 0,
    noticed_by: dict[str, str] | None = None,
    afresh: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Report:
    """The mutants of the source that are given, or all, and those of compiled code, in random order until the time is up.

    The interpreter looks at the mutants of the source, and the machine that runs PTX at those of compiled code, and then at
    what the interpreter let pass.

    noticed_by: {mutant: "layer: case"} of an earlier run, brought up to date.
    afresh: try also those that an explanation says survive.
    note: called with every survivor, and now and then.
    """
    report = Report()
    hints = {} if noticed_by is None else noticed_by
    deadline = float("inf") if seconds is None else time.monotonic() + seconds
    source = _shuffled(list(mutants(KERNELS) if chosen is None else chosen), seed)
    ops = sorted({op for path in KERNELS.glob("*.py") for op in _ops_of(path.name)})
    if not barriers:
        ops = sorted({op for m in source for op in _ops_of(m.file)})
    todo, total = deque(source), len(source)

    def record(mutant: Mutant | Barrier, noticed: str | None) -> None:
        report.outcomes.append(Outcome(mutant, noticed))
        hints.pop(mutant.key, None)
        if noticed is None:
            note(f"survived: {mutant}")
        else:
            hints[mutant.key] = noticed
        if len(report.outcomes) % 25 == 0:
            note(f"{len(report.outcomes)} tried")

    with layers() as opened:

        def look(layer: Layer) -> None:
            """At mutants of the source, until there are no more."""
            while time.monotonic() < deadline:
                try:
                    mutant = todo.popleft()
                except IndexError:  # two threads take from it
                    return
                if not afresh and explanation(mutant) is not None:
                    record(mutant, None)
                    continue
                hint = hints.get(mutant.key, "")
                order = [layer, opened["compiled"]]
                if hint.startswith("compiled"):
                    order.reverse()
                found = (_noticed(x, mutant, hint) for x in order)
                record(mutant, next((x for x in found if x is not None), None))

        def from_source() -> None:
            _undamaged(opened["interpreter"], ops)
            look(opened["interpreter"])

        def from_compiled_code() -> None:
            nonlocal total
            if not barriers:
                _undamaged(opened["compiled"], ops)
                return
            found, report.idle = _barriers(opened["barriers"])
            total += len(found)
            for barrier in _shuffled(found, seed):
                if time.monotonic() > deadline:
                    break
                record(barrier, _noticed(opened["barriers"], barrier, hints.get(barrier.key, "")))
            look(opened["interpreter too"])

        with ThreadPoolExecutor(2) as pool:
            for job in [pool.submit(from_source), pool.submit(from_compiled_code)]:
                job.result()
    report.left_out = total - len(report.outcomes)
    return report


def _ops_of(file: str) -> list[str]:
    ops = dependents(KERNELS, file)
    return ops + HEADS if "token_logprobs" in ops else ops


def _shuffled(items: list[Any], seed: int) -> list[Any]:
    return random.Random(seed).sample(items, len(items))


def _undamaged(layer: Layer, ops: list[str]) -> None:
    """A layer that complains of the kernels as they are would notice everything."""
    answer = layer.ask(ops=ops)
    if answer is not None:
        raise RuntimeError(f"the layer '{layer.name}' complains of what is not damaged: {': '.join(answer)}")


def _noticed(layer: Layer, mutant: Mutant | Barrier, hint: str) -> str | None:
    """ "layer: case", the case of the hint being asked first."""
    first = hint.partition(": ")[2]
    if isinstance(mutant, Barrier):
        answer = layer.ask(first=first, cases=mutant.cases, barrier=[mutant.kernel, mutant.number, mutant.of])
    else:
        answer = layer.ask(first=first, ops=_ops_of(mutant.file), file=mutant.file, source=mutant.source)
    return None if answer is None else f"{layer.name.partition(' ')[0]}: {answer[0]}"


def _barriers(layer: Layer) -> tuple[list[Barrier], int]:
    """Of every compiled kernel where it has most; and how many of them order nothing."""
    found, idle = [], 0
    answer = layer.ask(barriers=True)
    if "error" in answer:
        raise RuntimeError(f"the layer '{layer.name}' complains of what is not damaged: {answer['error']}")
    for kernel, count, cases, without in answer["found"]:
        found += [Barrier(kernel, number, count, tuple(cases)) for number in range(count) if number not in without]
        idle += len(without)
    return found, idle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument(
        "--file", nargs="*", help="only the mutants of these files below kernels/; none: of compiled code"
    )
    parser.add_argument("--afresh", action="store_true", help="try all cases on all mutants, explained or not")
    parser.add_argument("--write", action="store_true", help=f"remember in {NOTICED.name} which case noticed what")
    options = parser.parse_args()
    chosen = None if options.file is None else [m for m in mutants(KERNELS) if m.file in options.file]
    before = json.loads(NOTICED.read_text(encoding="utf-8")) if NOTICED.exists() else {}
    noticed_by = before if not options.afresh or options.file is not None else {}
    say = lambda line: print(line, flush=True)
    report = run(
        chosen, barriers=not options.file, seconds=options.seconds, seed=options.seed, noticed_by=noticed_by,
        afresh=options.afresh, note=say,
    )  # fmt: skip
    print(report)
    if options.write:
        NOTICED.write_text(json.dumps(noticed_by, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    return 1 if report.unexplained() or report.score < 0.95 else 0


if __name__ == "__main__":
    sys.exit(main())
