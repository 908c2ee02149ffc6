"""Mutation of every shipped Triton kernel: how much of what one can break does some layer notice?

    cd tests && python -m gpu.tools.mutate                       # all mutants
    cd tests && python -m gpu.tools.mutate --seconds 200         # a random sample that fits
    cd tests && python -m gpu.tools.mutate --file gae.py

A mutant of the source runs the cases of the ops that use its file, in the interpreter under the access checker and then, if
nothing was noticed, compiled in the PTX machine; both compare with the reference. A mutant of compiled code is one `bar.sync`
less in one specialisation, and runs in the PTX machine. A survivor needs an explanation in gpu/compiled/survivors.json.

The two layers are processes of their own, since an interpreted function cannot be compiled; each forks for every mutant, with
the damaged copy of kernels/ in place of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from gpu.tools.mutants import Mutant, dependents, mutants

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "kernels"
SURVIVORS = Path(__file__).parents[1] / "compiled" / "survivors.json"
LAYERS = ("interpreter", "compiled")
HEADS = ["linear_token_logprobs", "linear_ppo_loss"]
"""Ops that have no file in kernels/, and run the kernels of token_logprobs on buffers that the gradient overwrites."""


@dataclass(frozen=True)
class Barrier:
    """One bar.sync less in the compiled code of one specialisation."""

    case: str
    kernel: str
    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.kernel}: bar.sync {self.number + 1} of {self.of} (case {self.case})"


@dataclass
class Outcome:
    mutant: Mutant | Barrier
    noticed: str | None
    """By which layer and how, or None: it survived."""


@dataclass
class Report:
    outcomes: list[Outcome] = field(default_factory=list)
    left_out: int = 0

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
        ]
        kinds: dict[str, list[bool]] = {}
        for x in self.outcomes:
            kind = "bar.sync" if isinstance(x.mutant, Barrier) else x.mutant.kind
            kinds.setdefault(kind, []).append(x.noticed is not None)
        lines += [f"  {kind}: {sum(of)} of {len(of)}" for kind, of in kinds.items()]
        lines += [f"  survived: {x.mutant}: {explanation(x.mutant) or 'NOT EXPLAINED'}" for x in self.survivors]
        return "\n".join(lines)


def explanation(mutant: Mutant | Barrier) -> str | None:
    """Why it makes no difference, from the committed table: rows of the source name the code, rows of compiled code the kernel
    (a regular expression) and among how many of its last barriers."""
    table = json.loads(SURVIVORS.read_text(encoding="utf-8")) if SURVIVORS.exists() else []
    for row in table:
        if isinstance(mutant, Barrier):
            of_kernel = row["kind"] == "bar.sync" and re.fullmatch(row["kernel"], mutant.kernel)
            if of_kernel and mutant.of - mutant.number <= row["last"]:
                return row["why"]
        elif (row["kind"], row.get("file"), row.get("function"), row.get("code")) == (
            mutant.kind,
            mutant.file,
            mutant.function,
            mutant.code,
        ):
            return row["why"]
    return None


# ---- a layer, in a process of its own


class Layer:
    """Asks a worker process, one question at a time."""

    def __init__(self, name: str, cache: str) -> None:
        self.name = name
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        environment.pop("TRITON_INTERPRET", None)
        if name == "interpreter":
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "gpu.tools.mutate", "--worker", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT / "tests"
        )

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
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
    chosen: Iterable[Mutant | Barrier] | None = None,
    *,
    seconds: float | None = None,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> Report:
    """The mutants given, or all of the source and a specialisation of each compiled kernel, in random order until the time is up.

    The interpreter looks at the mutants of the source, and the machine that runs PTX at those of compiled code, and then at
    what the interpreter let pass. note: called with every survivor.
    """
    report = Report()
    deadline = float("inf") if seconds is None else time.monotonic() + seconds
    everything = list(mutants(KERNELS) if chosen is None else chosen)
    source = _shuffled([m for m in everything if isinstance(m, Mutant)], seed)
    ops = sorted({op for m in source for op in _ops_of(m)})
    passed: SimpleQueue[Mutant | None] = SimpleQueue()

    def record(mutant: Mutant | Barrier, noticed: str | None) -> None:
        report.outcomes.append(Outcome(mutant, noticed))
        if noticed is None:
            note(f"survived: {mutant}")

    with layers() as opened:

        def interpreter() -> None:
            layer = opened["interpreter"]
            try:
                _undamaged(layer, ops)
                for mutant in source:
                    if time.monotonic() > deadline:
                        break
                    noticed = _noticed(layer, mutant)
                    if noticed is None:
                        passed.put(mutant)
                    else:
                        record(mutant, noticed)
            finally:
                passed.put(None)

        def compiled() -> None:
            layer = opened["compiled"]
            _undamaged(layer, ops)
            found = _barriers(layer) if chosen is None else [m for m in everything if isinstance(m, Barrier)]
            report.left_out = len(source) + len(found)
            for barrier in _shuffled(found, seed):
                if time.monotonic() > deadline:
                    break
                record(barrier, _noticed(layer, barrier))
            while (mutant := passed.get()) is not None:
                record(mutant, _noticed(layer, mutant))

        with ThreadPoolExecutor(2) as pool:
            for job in [pool.submit(interpreter), pool.submit(compiled)]:
                job.result()
    report.left_out -= len(report.outcomes)
    return report


def _ops_of(mutant: Mutant) -> list[str]:
    ops = dependents(KERNELS, mutant.file)
    return ops + HEADS if "token_logprobs" in ops else ops


def _shuffled(items: list[Any], seed: int) -> list[Any]:
    return random.Random(seed).sample(items, len(items))


def _undamaged(layer: Layer, ops: list[str]) -> None:
    """A layer that complains of the kernels as they are would notice everything."""
    answer = layer.ask(ops=ops)
    if answer is not None:
        raise RuntimeError(f"the layer '{layer.name}' complains of what is not damaged: {answer}")


def _noticed(layer: Layer, mutant: Mutant | Barrier) -> str | None:
    if isinstance(mutant, Barrier):
        answer = layer.ask(cases=[mutant.case], barrier=[mutant.kernel, mutant.number])
    else:
        answer = layer.ask(ops=_ops_of(mutant), file=mutant.file, source=mutant.source)
    return None if answer is None else f"{layer.name}: {answer}"


def _barriers(layer: Layer) -> list[Barrier]:
    """For every compiled kernel, those of the specialisation that has most."""
    return [Barrier(*row, number, count) for *row, count in layer.ask(barriers=True) for number in range(count)]


# ---- the worker


def work(layer: str) -> None:
    import torch
    from gpu.tools import cases

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    expected: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if question.get("barriers"):
            found = _in_child(lambda: _count_barriers(cases.cases_of(*cases.triton_ops())), 600)
        else:
            wanted = [c for c in cases.CASES if c.op in question.get("ops", ()) or str(c) in question.get("cases", ())]
            wanted = _quickest_first(wanted, layer)
            for case in wanted:
                if str(case) not in expected:
                    expected[str(case)] = case.expected(case.inputs())
            limit = 90 if question.keys() & {"file", "barrier"} else 600
            found = _in_child(lambda q=question, w=wanted: _first_complaint(layer, q, w, expected), limit)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _quickest_first(wanted: list[Any], layer: str) -> list[Any]:
    """One case of each op, then the rest; those that are long for the interpreter are left to the other layer."""
    if layer == "interpreter":
        wanted = [c for c in wanted if "large" not in c.name and "long" not in c.name and "far" not in c.name]
    seen: dict[str, int] = {}
    ranked = []
    for case in wanted:
        seen[case.op] = seen.get(case.op, 0) + 1
        ranked.append((seen[case.op], case))
    return [case for _, case in sorted(ranked, key=lambda x: x[0])]


def _in_child(call: Any, seconds: float) -> Any:
    """The result of the call in a forked process; too long counts as a complaint."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            found = call()
        except BaseException as error:
            found = f"{type(error).__name__}: {str(error)[:300]}"
        with os.fdopen(write, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + seconds
    import select

    chunks = []
    with os.fdopen(read) as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            text = os.read(pipe.fileno(), 1 << 20)
            if not text:
                break
            chunks.append(text)
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return f"no end within {seconds} s"
    os.waitpid(child, 0)
    return json.loads(b"".join(chunks)) if chunks else "the process died"


def _first_complaint(layer: str, question: dict[str, Any], wanted: list[Any], expected: dict[str, Any]) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        if "file" in question:
            import rlhf_fast.kernels as package

            copy = Path(folder) / "kernels"
            shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
            (copy / question["file"]).write_text(question["source"], encoding="utf-8")
            package.__path__[:] = [str(copy)]
        for case in wanted:
            try:
                _run_case(layer, case, expected[str(case)], question.get("barrier"))
            except Exception as error:
                return f"{case}: {type(error).__name__}: {str(error)[:200]}"
    return None


def _run_case(layer: str, case: Any, expected: Any, barrier: Any) -> None:
    inputs = case.inputs()
    if layer == "interpreter":
        from gpu.tools.sanitizer import Sanitizer

        with Sanitizer(order="shuffle", seed=3) as sanitizer:
            for x, where in case.masked(inputs):
                sanitizer.hide(x, where)
            got = case.kernels(inputs)
        sanitizer.check()
    else:
        from gpu.tools.driver import install

        with install(90) as driver:
            if barrier is not None:
                name, number = barrier
                driver.damage = lambda kernel, text: _without_barrier(text, number) if str(kernel) == name else text
            got = case.kernels(inputs)
        for launch in driver.launches:
            assert launch.findings == [], f"{launch.kernel}: {launch.findings[0]}"
    case.check(got, expected)


_BARRIER = re.compile(r"bar\.sync\s+0;")


def _without_barrier(text: str, number: int) -> str:
    found = list(_BARRIER.finditer(text))[number]
    return text[: found.start()] + text[found.end() :]


def _count_barriers(wanted: list[Any]) -> list[tuple[str, str, int]]:
    """(case, kernel, barriers) of the specialisation of each kernel that has most."""
    from gpu.tools.driver import install

    most: dict[str, tuple[str, str, int]] = {}
    for case in wanted:
        with install(90, execute=False) as driver:
            case.kernels(case.inputs())
        for kernel in driver.compiled.values():
            if kernel.num_warps == 1:  # there is nobody else to wait for
                continue
            count = len(_BARRIER.findall(str(kernel.asm["ptx"])))
            if count > most.get(kernel.name, ("", "", 0))[2]:
                most[kernel.name] = (str(case), str(kernel), count)
    return list(most.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--file", help="only the mutants of this file below kernels/")
    parser.add_argument("--worker", choices=LAYERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return 0
    chosen = None if options.file is None else [m for m in mutants(KERNELS) if m.file == options.file]
    report = run(chosen, seconds=options.seconds, seed=options.seed, note=lambda line: print(line, flush=True))
    print(report)
    return 1 if report.unexplained() or report.score < 0.95 else 0


if __name__ == "__main__":
    sys.exit(main())
