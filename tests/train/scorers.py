"""Reward functions for the tests of training."""

from __future__ import annotations

import os


def count_e(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(text.count("e")) for text in completions]


def spread(prompts: list[str], completions: list[str]) -> list[float]:
    """Hardly any two texts score the same."""
    return [sum(i * ord(letter) for i, letter in enumerate(text, 1)) % 997 / 997 for text in completions]


def constant(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0] * len(completions)


def skip_first(prompts: list[str], completions: list[str]) -> list[float | None]:
    return [None, *count_e(prompts[1:], completions[1:])]


def broken(prompts: list[str], completions: list[str]) -> list[float]:
    raise RuntimeError("no score today")


def short(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0]


def words(prompts: list[str], completions: list[str]) -> list[str]:
    return ["good"] * len(completions)


def selfish(prompts: list[str], completions: list[str]) -> list[float]:
    prompts.clear()
    return [0.0 for _ in range(len(completions))][: completions.clear() or None]


RESULTS = {
    "number": lambda n: [0.5] * n,
    "true": lambda n: [True] * n,
    "none": lambda n: [None] * n,
    "nan": lambda n: [float("nan")] * n,
    "inf": lambda n: [float("inf")] * n,
    "huge int": lambda n: [10**400] * n,
    "tuple": lambda n: (0.5,) * n,
    "numpy scalar": lambda n: [numpy().float32(0.5)] * n,
    "numpy int": lambda n: [numpy().int64(1)] * n,
    "numpy bool": lambda n: [numpy().bool_(True)] * n,
    "numpy 0-d": lambda n: [numpy().array(0.5)] * n,
    "numpy array": lambda n: numpy().full(n, 0.5),
    "0-d tensor": lambda n: [torch().tensor(0.5)] * n,
    "tensor": lambda n: torch().full((n,), 0.5, requires_grad=True),
    "text": lambda n: ["0.5"] * n,
    "lists": lambda n: [[0.5]] * n,
    "complex": lambda n: [0.5j] * n,
    "1": lambda n: [0.5],
    "n - 1": lambda n: [0.5] * (n - 1),
    "n + 1": lambda n: [0.5] * (n + 1),
    "a number": lambda n: 0.5,
    "nothing": lambda n: None,
    "generator": lambda n: (0.5 for _ in range(n)),
    "dict": lambda n: dict.fromkeys(range(n), 0.5),
    "set": lambda n: {i / 2 for i in range(n)},
    "str": lambda n: "x" * n,
    "bytes": lambda n: b"x" * n,
    "column": lambda n: numpy().full((n, 1), 0.5),
}


def numpy():
    import numpy

    return numpy


def torch():
    import torch

    return torch


def result(prompts: list[str], completions: list[str]):
    """What RESULTS has under the text of the first completion."""
    return RESULTS[completions[0]](len(completions))


def on_cue(prompts: list[str], completions: list[str]) -> list[float]:
    """Letters of each completion; but a completion may tell what goes wrong."""
    for text in completions:
        if text in CUES:
            CUES[text]()
    return [float(len(text)) for text in completions]


def fail() -> None:
    raise KeyError("no such letter")


def hang() -> None:
    import time

    tell(os.getpid())
    time.sleep(1000)


def hang_in_c() -> None:
    """Backtracking that holds the interpreter's lock for ages."""
    import re

    tell(os.getpid())
    re.match(r"(a+)+b", "a" * 60)


def segfault() -> None:
    import ctypes

    ctypes.string_at(0)


def leave() -> None:
    print("last words", flush=True)
    os._exit(3)


def quit_program() -> None:
    import sys

    sys.exit(0)


def child_that_stays() -> None:
    """A program of its own that outlives its time, as a sandbox for code may."""
    import subprocess
    import sys

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    tell(child.pid)
    child.wait()


def tell(pid: int) -> None:
    """Tell the test, whole: it may look at any time."""
    if (name := os.environ.get("SCORERS_PID_FILE")) is not None:
        with open(f"{name}.new", "w") as file:
            file.write(str(pid))
        os.replace(f"{name}.new", name)


CUES = {
    "raise": fail,
    "hang": hang,
    "hang in C": hang_in_c,
    "segfault": segfault,
    "exit": leave,
    "sys.exit": quit_program,
    "child": child_that_stays,
    "interrupt": lambda: os.kill(os.getpid(), 2),
    "terminate": lambda: os.kill(os.getpid(), 15),
}


def noisy(prompts: list[str], completions: list[str]) -> list[float]:
    print("first words")
    for _ in range(400):
        print("x" * 10_000)
    os.write(2, b"y" * 1_000_000)
    return [1.0] * len(completions)


def where(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(os.getpid())] * len(completions)


def many(prompts: list[str], completions: list[str]) -> list[float]:
    """How many completions the call had, and a moment in which other workers can take theirs."""
    import time

    time.sleep(0.05)
    return [float(len(completions))] * len(completions)


def draws(prompts: list[str], completions: list[str]) -> list[float]:
    import random

    return [random.random() for _ in completions]


def reads_input(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(input()))] * len(completions)


def e_per_step(prompts: list[str], completions: list[list[str]]) -> list[list[float]]:
    return [[float(step.count("e")) for step in steps] for steps in completions]


def position_of_steps(prompts: list[str], completions: list[list[str]]) -> list[list[float] | None]:
    """Of one step 0; of several the number of each; and none for the completion whose first step begins with a z."""
    return [None if steps[0].startswith("z") else [float(k) for k in range(len(steps))] for steps in completions]


STEP_RESULTS = {
    "numbers": lambda steps: [[0.5] * n for n in steps],
    "arrays": lambda steps: [numpy().full(n, 0.5) for n in steps],
    "tuples": lambda steps: tuple((0.5,) * n for n in steps),
    "none": lambda steps: [None] * len(steps),
    "no score of a step": lambda steps: [[*[0.5] * (n - 1), None] for n in steps],
    "one number": lambda steps: [0.5] * len(steps),
    "too few": lambda steps: [[0.5] * (n - 1) for n in steps],
    "text": lambda steps: ["0.5"] * len(steps),
    "words": lambda steps: [["good"] * n for n in steps],
    "completion missing": lambda steps: [[0.5] * n for n in steps[:-1]],
}


def step_result(prompts: list[str], completions: list[list[str]]):
    """What STEP_RESULTS has under the prompt."""
    return STEP_RESULTS[prompts[0]]([len(steps) for steps in completions])
