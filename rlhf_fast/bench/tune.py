"""`rlhf-fast bench --device cuda --tune`: launch sizes of the Triton kernels timed on this device, and its rows of the table.

A row is for an op, a width of the logits and a class of vocabularies, never for a number of rows: the order of a sum follows from
it. So the bits of a result change with the table, and stay the same in any batch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pprint import pformat
from typing import Any
from unittest.mock import patch

import torch

import rlhf_fast
from rlhf_fast.bench import device_cases
from rlhf_fast.bench.cases import token_logprobs as tokens
from rlhf_fast.bench.engine import Call, Case, GateError, Timer, gate

Key = tuple[str, str, str]
"""(op, width of the logits, class of vocabularies) as kernels/common/configs.py has them."""
Sizes = tuple[int, int]
"""(lanes, num_warps)."""

LANES = (256, 512, 1024, 2048, 4096)
WARPS = (1, 2, 4, 8, 16)
PER_THREAD = (4, 32)
"""Fewest and most elements of a tile that a thread holds: fewer leave wide loads unused, more spill."""
GAIN = 0.98
"""A row is changed for a time of at most this share of the one it has: less is noise."""
ROUNDS = 5
DTYPES = {"16-bit": torch.bfloat16, "32-bit": torch.float32}
VOCABULARIES = {"V <= 4096": (1000, 4096), "V > 4096": (32000, 50257, 151936)}
"""What stands for a class: odd ones among them, whose rows begin at any address."""
ROWS = 4096


@dataclass(frozen=True)
class Tuned:
    """One row of the table."""

    key: Key
    before: Sizes
    after: Sizes
    share: float
    """Time of `after` over that of `before`, mean over the vocabularies."""
    wrong: tuple[Sizes, ...] = ()
    """Sizes that failed: a wrong result, or refused by the compiler."""


def candidates() -> list[Sizes]:
    """Lanes and warps that leave a thread neither too little nor too much."""
    low, high = PER_THREAD
    return [(lanes, warps) for lanes in LANES for warps in WARPS if low <= lanes / (32 * warps) <= high]


def calls() -> dict[str, Call]:
    """{op of the table: what to time}."""
    return {
        "token_logprobs": device_cases.pass_of(tokens.ours),
        "token_logprobs_backward": device_cases.back_of(tokens.ours),
    }


def truths() -> dict[str, Call]:
    return {
        "token_logprobs": device_cases.pass_of(tokens.log_softmax),
        "token_logprobs_backward": device_cases.back_of(tokens.log_softmax),
    }


def tune(
    table: Mapping[Key, Sizes],
    timer: Timer,
    device: torch.device,
    module: Any = None,
    backend: str | None = "triton",
    rows: int = ROWS,
    vocabularies: Mapping[str, tuple[int, ...]] = VOCABULARIES,
    report: Callable[[str], None] = print,
) -> Iterator[Tuned]:
    """Time every candidate for every row of `table` and yield the rows with the fastest that is right.

    module: the one whose `config` the kernels of `backend` ask. Raises ValueError for a row that nothing here can time.
    """
    if module is None:
        module = importlib.import_module("rlhf_fast.kernels.token_logprobs")
    timed, exact = calls(), truths()
    for key, before in table.items():
        op, width, vocabulary = key
        if op not in timed or width not in DTYPES or vocabulary not in vocabularies:
            raise ValueError(f"bench: --tune: the table has a row {key} that it cannot time")
        before = (int(before[0]), int(before[1]))
        ratios: dict[Sizes, list[float]] = {}
        wrong: list[Sizes] = []
        for vocab in vocabularies[vocabulary]:
            inputs = device_cases.make_logits(device, rows, vocab, DTYPES[width])
            made = partial(dict[str, Any], inputs)
            case = Case(op, f"[{rows}, {vocab}] {width}", made, {}, tokens.truth(exact[op]))
            truth = case.truth(inputs)
            seconds: dict[Sizes, float] = {}
            for sizes in dict.fromkeys([before, *candidates()]):
                if sizes in wrong:
                    continue
                asked = patch.object(module, "config", lambda *_, found=sizes: found)
                with rlhf_fast.use_backend(backend), asked:
                    try:
                        gate(case, timed[op](inputs), truth)
                    except (GateError, RuntimeError) as error:
                        report(f"  {op} {width} {vocabulary} {sizes}: {' '.join(str(error).split())[:100]}")
                        wrong.append(sizes)
                        continue
                    seconds[sizes] = min(timer.seconds(timed[op], inputs, ROUNDS) for _ in range(3))
            if before not in seconds:
                raise GateError(f"{op}: the sizes {before} that the table has give a wrong result on this device")
            for sizes, took in seconds.items():
                ratios.setdefault(sizes, []).append(took / seconds[before])
        means = {
            sizes: math.exp(sum(map(math.log, found)) / len(found))
            for sizes, found in ratios.items()
            if sizes not in wrong
        }
        best = min(means, key=lambda sizes: means[sizes])
        after = best if means[best] <= GAIN else before
        yield Tuned(key, before, after, means[after], tuple(wrong))


def text(rows: Mapping[str, Mapping[Key, Sizes]]) -> str:
    """The file of the table: a Python module without imports."""
    table = pformat({arch: dict(found) for arch, found in rows.items()}, width=110, sort_dicts=True)
    return (
        '"""Launch sizes timed by `rlhf-fast bench --device cuda --tune`; an architecture here comes before that of configs.py."""\n\n'
        f"TUNED: dict[str, dict[tuple[str, str, str], tuple[int, int]]] = {table}\n"
        '"""{architecture: {(op, width of the logits, vocabulary class): (lanes, num_warps)}}."""\n'
    )


def target() -> Path:
    """The file. Raises ValueError where it cannot be written."""
    path = Path(importlib.import_module("rlhf_fast.kernels.common.tuned").__file__ or "")
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ValueError(f"bench: --tune: the table {path} cannot be written: {error.strerror}") from error
    return path


def run(timer: Timer, device: torch.device, report: Callable[[str], None] = print) -> None:
    """Tune every row for the architecture of the device, print and write them."""
    arch = importlib.import_module("rlhf_fast.kernels.common.launch").arch_of(torch.empty(0, device=device))
    configs = importlib.import_module("rlhf_fast.kernels.common.configs")
    known = dict(importlib.import_module("rlhf_fast.kernels.common.tuned").TUNED)
    path = target()
    table = {key: row for op in calls() for key, row in configs.configs(op, arch).items()}
    found: dict[Key, Sizes] = {}
    for row in tune(table, timer, device, report=report):
        found[row.key] = row.after
        change = "stays" if row.after == row.before else f"was {row.before}, {row.share:.2f} x its time"
        report(f"{' '.join(row.key)}: lanes, warps {row.after}, {change}")
    path.write_text(text({**known, arch: found}), encoding="utf-8")
    report(f"written: {path} ({arch})")
