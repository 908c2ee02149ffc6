"""One layer of the mutation run, in a process of its own: reads questions as lines of JSON, answers with who complained.

    python -m gpu.tools.mutate_worker interpreter|compiled|barriers

It forks for every mutant, with the damaged copy of kernels/ in place of ours; for barriers from a process that has compiled and run
ours already.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu.tools import cases
from gpu.tools.barriers import idle_barriers
from gpu.tools.cases import Case

KERNELS = Path(__file__).parents[3] / "kernels"
WHOLE = 600
"""Seconds of processor time for a question without damage."""

Complaint = tuple[str, str]
"""(case, what was wrong)"""


def work(layer: str) -> None:
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    expected: dict[str, Any] = {}
    taken: dict[str, float] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if question.get("barriers"):
            found = _barriers(cases.cases_of(*cases.triton_ops()), expected)
        else:
            wanted = _wanted(layer, question)
            for case in wanted:
                if str(case) not in expected:
                    expected[str(case)] = case.expected(case.inputs())
            found = _in_child(partial(_first_complaint, layer, question, wanted, expected, taken))
            if isinstance(found, dict):  # nothing was damaged, and nothing complained of
                taken.update(found)
                found = None
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _wanted(layer: str, question: dict[str, Any]) -> list[Case]:
    """The first one asked for, then one case of each op, then the rest; what is long for the interpreter is left to the other."""
    found = [c for c in cases.CASES if c.op in question.get("ops", ()) or str(c) in question.get("cases", ())]
    if layer == "interpreter":
        found = [c for c in found if not any(word in c.name for word in ("large", "long", "tiles"))]
    seen: dict[str, int] = {}
    ranked = []
    for case in found:
        seen[case.op] = seen.get(case.op, 0) + 1
        ranked.append((0 if str(case) == question.get("first") else seen[case.op], case))
    return [case for _, case in sorted(ranked, key=lambda x: x[0])]


def _in_child(call: Callable[[], Any]) -> Any:
    """The result of the call in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (WHOLE, WHOLE))
        try:
            found = call()
        except BaseException as error:
            found = "", f"{type(error).__name__}: {str(error)[:300]}"
        with os.fdopen(write, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else ("", "the process died")


class TooLong(Exception):
    """A case took much more processor time than without damage."""


def _first_complaint(
    layer: str, question: dict[str, Any], wanted: list[Case], expected: dict[str, Any], taken: dict[str, float]
) -> Complaint | dict[str, float] | None:
    """Without damage and complaint: {case: seconds of processor time}."""
    damaged = bool(question.keys() & {"file", "barrier"})
    signal.signal(signal.SIGPROF, _too_long)
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        if "file" in question:
            import rlhf_fast.kernels as package

            copy = Path(folder) / "kernels"
            shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
            (copy / question["file"]).write_text(question["source"], encoding="utf-8")
            package.__path__[:] = [str(copy)]
        for case in wanted:
            begin = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, 10 + 4 * taken.get(str(case), 20) if damaged else 0)
            try:
                _run_case(layer, case, expected[str(case)], question.get("barrier"))
            except Exception as error:
                return str(case), f"{type(error).__name__}: {str(error)[:200]}"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            times[str(case)] = time.process_time() - begin
    return None if damaged else times


def _too_long(*_: object) -> None:
    raise TooLong


def _run_case(layer: str, case: Case, expected: Any, barrier: Any) -> None:
    if layer != "interpreter":
        _run_compiled(case, expected, barrier)
        return
    from gpu.tools.sanitizer import Sanitizer

    inputs = case.inputs()
    with Sanitizer(order="shuffle", seed=3) as sanitizer:
        for x, where in case.masked(inputs):
            sanitizer.hide(x, where)
        got = case.kernels(inputs)
    sanitizer.check()
    case.check(got, expected)


def _run_compiled(case: Case, expected: Any, barrier: Any = None) -> list[Any]:
    """What was compiled."""
    from gpu.tools.driver import install

    with install(90) as driver:
        if barrier is not None:
            driver.damage = lambda kernel, text: _without_barrier(kernel.name, text, *barrier)
        got = case.kernels(case.inputs())
    for launch in driver.launches:
        assert launch.findings == [], f"{launch.kernel}: {launch.findings[0]}"
    case.check(got, expected)
    return list(driver.compiled.values())


_BARRIER = re.compile(r"bar\.sync\s+0;")


def _without_barrier(kernel: str, text: str, name: str, number: int, of: int) -> str:
    found = list(_BARRIER.finditer(text))
    if kernel != name or len(found) != of:
        return text
    return text[: found[number].start()] + text[found[number].end() :]


def _barriers(wanted: list[Case], expected: dict[str, Any]) -> dict[str, Any]:
    """{"found": (kernel, its barriers where it has most, cases that launch such code, those that order nothing in any of it)}."""
    most: dict[str, int] = {}
    users: dict[str, list[str]] = {}
    idle: dict[str, set[int]] = {}
    for case in wanted:
        expected[str(case)] = case.expected(case.inputs())
        try:
            compiled = _run_compiled(case, expected[str(case)])
        except AssertionError as error:
            return {"error": f"{case}: {error}"}
        for kernel in compiled:
            name, ptx = kernel.name, str(kernel.asm["ptx"])
            count = len(_BARRIER.findall(ptx))
            if kernel.num_warps == 1 or count < most.get(name, 1):  # one warp has nobody else to wait for
                continue
            if count > most.get(name, 0):
                most[name], users[name], idle[name] = count, [], set(range(count))
            users[name].append(str(case))
            idle[name] &= idle_barriers(ptx)
    return {"found": [(name, n, sorted(set(users[name])), sorted(idle[name])) for name, n in most.items()]}


if __name__ == "__main__":
    work(sys.argv[1])
