"""What a reward function is: how it is found, called and checked. Run as a script, this file is a worker process.

It needs the standard library alone, so that a worker starts in tens of milliseconds. A worker talks JSON lines over two
pipes of its own: what the function prints never mixes with its scores, and no pickle crosses the border.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import math
import numbers
import os
import queue
import random
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

RewardFunction = Callable[[list[str], list[Any]], Sequence[Any]]
"""(prompts, completions) -> one number each; None, NaN or infinity marks a completion as unscorable.

With steps a completion is the list of its steps, and gets a list with one number for each; None, in its place or for a step, marks
it as unscorable.
"""
Completions = Sequence[str] | Sequence[Sequence[str]]
"""Texts, or the steps of each."""
Scores = list[Any]
"""A number per completion, or a list of numbers; NaN for what has no score."""

MAX_TRACEBACK = 8000
"""Characters kept of a traceback: its end, which names the error."""


class RewardError(RuntimeError):
    """Too many completions of a batch could not be scored, or a reward function or server broke its contract."""


class ContractError(RewardError, TypeError):
    """What a reward function or server gave back is no list of numbers, one for each completion."""


def load_callable(spec: str) -> RewardFunction:
    """The function named by `module:function` or `file.py:function`. Raises ValueError if it cannot be had."""
    where, _, name = spec.rpartition(":")
    try:
        if where.endswith(".py"):
            file = importlib.util.spec_from_file_location(Path(where).stem, where)
            if file is None or file.loader is None:
                raise ImportError(f"cannot read {where}")
            module = importlib.util.module_from_spec(file)
            file.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        function = getattr(module, name)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"reward function {spec!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"reward function {spec!r}: got {type(function).__name__}, expected a function")
    return function


def fingerprint(spec: str) -> str:
    """SHA-256 (hex) of the file a callable is in, found without running any of it; "" for what has no file."""
    where = spec.rpartition(":")[0]
    path: str | None = where
    if not where.endswith(".py"):
        folders, path = None, None
        for depth in range(where.count(".") + 1):
            name = ".".join(where.split(".")[: depth + 1])
            found = importlib.machinery.PathFinder.find_spec(name, folders)
            if found is None:
                return ""
            folders, path = found.submodule_search_locations, found.origin
    try:
        return hashlib.sha256(Path(path or "").read_bytes()).hexdigest()
    except OSError:
        return ""


def call(function: RewardFunction, name: str, prompts: Sequence[str], completions: Completions) -> Scores:
    """One finite number or NaN per completion, or one per step. The function gets lists of its own.

    Raises what the function raises, and ContractError for a result that is no list of numbers of that length.
    """
    given = [completion if isinstance(completion, str) else list(completion) for completion in completions]
    return scores_of(function(list(prompts), given), name, completions)


def scores_of(result: Any, name: str, completions: Completions) -> Scores:
    """The checked numbers of a result; see `call`."""
    n = len(completions)
    found = _listed(result, f"{name}: got a", f"expected a list of {n}")
    if len(found) != n:
        raise ContractError(f"{name}: got {len(found)} scores for {n} completions")
    return [
        _number(x, name, f"{i}") if isinstance(steps, str) else _of_steps(x, name, i, len(steps))
        for i, (x, steps) in enumerate(zip(found, completions, strict=True))
    ]


def _of_steps(x: Any, name: str, i: int, steps: int) -> list[float]:
    if x is None:
        return [math.nan] * steps
    found = _listed(x, f"{name}: scores {i} got a", f"expected a list of {steps}, one for each step")
    if len(found) != steps:
        raise ContractError(f"{name}: scores {i} got {len(found)}, expected {steps}, one for each step")
    return [_number(value, name, f"{i}, step {k}") for k, value in enumerate(found)]


def _listed(x: Any, got: str, expected: str) -> Sequence[Any]:
    """`x` as a list, tensors and arrays too."""
    # Of a mapping or a set the order says nothing, and text and bytes would be read letter by letter.
    if isinstance(x, str | bytes | bytearray | Mapping | Set):
        raise ContractError(f"{got} {type(x).__name__}, {expected}")
    kind = type(x).__name__
    if hasattr(x, "tolist"):
        x = x.tolist()
    if not hasattr(x, "__len__"):
        raise ContractError(f"{got} {kind}, {expected}")
    return x  # type: ignore[no-any-return]


def _number(x: Any, name: str, place: str) -> float:
    if x is None:
        return math.nan
    if getattr(x, "ndim", None) == 0 and hasattr(x, "item"):  # scalars of tensors and arrays
        x = x.item()
    if not isinstance(x, numbers.Real):
        raise ContractError(f"{name}: score {place} got {type(x).__name__}, expected a number")
    try:
        value = float(x)
    except OverflowError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _with_nulls(scores: Scores) -> list[Any]:
    return [_with_nulls(x) if isinstance(x, list) else None if math.isnan(x) else x for x in scores]


def without_nulls(scores: list[Any]) -> Scores:
    """Scores as they were before they crossed a border as JSON."""
    return [without_nulls(x) if isinstance(x, list) else math.nan if x is None else x for x in scores]


def describe(error: BaseException) -> tuple[str, str]:
    """(headline, traceback) of what a function raised; the headline is the same wherever the same line raises."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}{at}", text[-MAX_TRACEBACK:]


class Requests:
    """Messages of the request pipe, read by a thread of their own, which ends the process when the trainer is gone.

    They are as `rlhf_fast._worker.Worker` sends them; a payload is the value of "payload".
    """

    def __init__(self, descriptor: int) -> None:
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(descriptor,), daemon=True).start()

    def _read(self, descriptor: int) -> None:
        with open(descriptor, "rb", buffering=1 << 16) as pipe:
            for line in pipe:
                message = json.loads(line)
                if "bytes" in message:
                    message["payload"] = pipe.read(message["bytes"])
                self._messages.put(message)
        self._messages.put(None)
        # Idle, the main thread leaves by itself and runs the exit handlers of the user's modules.
        time.sleep(1.0)
        os._exit(0)

    def __iter__(self) -> Requests:
        return self

    def __next__(self) -> Any:
        message = self._messages.get()
        if message is None:
            raise StopIteration
        return message


def answer(descriptor: int, message: Mapping[str, Any], payload: bytes = b"") -> None:
    """Write a message to the answer pipe, behind what was printed before it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    head = {**message, "bytes": len(payload)} if payload else message
    for part in (json.dumps(head).encode() + b"\n", payload):
        data = memoryview(part)
        while data:
            data = data[os.write(descriptor, data) :]


def outlive_signals() -> None:
    """The trainer decides when a worker ends: a signal to the whole job must not cost the completions of a batch.

    These are handlers rather than SIG_IGN, which programs that the worker starts would inherit.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)


def _limit_processor_time(seconds: float) -> None:
    """The kernel ends this process after so much more computing: the last resort against a call that nothing can interrupt."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = int(time.process_time() + seconds * cores) + 2  # on all of them, which no call can exceed within its time
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _seed(message: Any) -> None:
    """Draws of a function follow from the texts it gets, so that a resumed run repeats them in a new worker."""
    number = int.from_bytes(hashlib.sha256(json.dumps(message).encode()).digest()[:4], "little")
    random.seed(number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(number)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(number)


def _serve(requests: int, answers: int) -> None:
    outlive_signals()
    lines = Requests(requests)
    hello = next(lines, None)
    if hello is None:
        return
    sys.path[:] = hello["path"]
    functions = {}
    try:
        for spec in hello["specs"]:
            functions[spec] = load_callable(spec)
    except BaseException as error:
        message = str(error) if isinstance(error, ValueError) else f"reward function {spec!r}: {describe(error)[1]}"
        answer(answers, {"load": message})
        return
    answer(answers, {"load": None})
    for request in lines:
        _limit_processor_time(hello["timeout"])
        _seed(request)
        spec = request["spec"]
        name = f"reward function {spec}"
        try:
            scores = call(functions[spec], name, request["prompts"], request["completions"])
        except ContractError as error:
            answer(answers, {"contract": str(error)})
        except BaseException as error:
            headline, text = describe(error)
            answer(answers, {"raised": headline, "traceback": text})
        else:
            answer(answers, {"scores": _with_nulls(scores)})


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
