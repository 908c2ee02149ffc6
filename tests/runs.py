"""Small data for whole runs, what they leave behind, and faults made to happen in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from tolerances import ANOTHER_DEVICE

from rlhf_fast.model import SharedModel
from rlhf_fast.train.monitor import read_json_lines

SCORERS = Path(__file__).parent / "train" / "scorers.py"
CLOCK = ("time", "tokens_per_second", "seconds_waited")
TEXTS = ["the film was good.", "a good film, we saw it.", "this is a story of a film.", "it was good.", "we saw"]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def numbers(folder: Path) -> list[dict]:
    """Metrics without the clock's."""
    rows = read_json_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def outcome(folder: Path) -> dict[str, bytes]:
    """Adapters and the last checkpoint's tensors."""
    last = max((folder / "checkpoints").glob("step-*"), key=lambda p: int(p.name.partition("-")[2]))
    files = [*folder.glob("*/adapter_model.safetensors"), *last.glob("*.safetensors")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def close(found: object, expected: object) -> None:
    """Numbers of plain data as close as those of two devices, all else equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=ANOTHER_DEVICE, abs=ANOTHER_DEVICE)
    else:
        assert found == expected


def near(found: Path, expected: Path) -> None:
    """The same for the metrics of two runs, and for what they leave behind."""
    close(numbers(found), numbers(expected))
    there, here = outcome(found), outcome(expected)
    assert there.keys() == here.keys()
    for file in here:
        one, other = load(there[file]), load(here[file])
        assert one.keys() == other.keys()
        for key in other:
            off = (one[key] - other[key]).abs().max()
            assert off <= ANOTHER_DEVICE * (1 + other[key].abs().max()), (file, key, off)


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.partition("-")[2]) for p in (folder / "checkpoints").glob("step-*"))


def failing_calls(monkeypatch, module, name: str, fault: Callable[[int, tuple], object]) -> list[int]:
    """Calls of module.name, each told to `fault` (number, arguments) before it runs; a result that is not None replaces it."""
    original, calls = getattr(module, name), [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        found = fault(calls[0], args)
        return original(*args, **kwargs) if found is None else found

    monkeypatch.setattr(module, name, wrapped)
    return calls


def not_finite(loss: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "loss":  # the gradient stays finite
        return loss + (torch.tensor(float("nan")) - loss.detach()).detach()
    return loss * torch.tensor(float("inf" if kind == "inf" else "nan"))


class Updates:
    """Stands in for a Run: keeps the gradients of each update and takes no step."""

    def __init__(self, model: SharedModel) -> None:
        self.parameters, self.seen = model.parameters_of("policy"), []

    def update(self, loss: float) -> float:
        self.seen.append({n: p.grad.clone() for n, p in self.parameters.items()})
        for p in self.parameters.values():
            p.grad = None
        return 0.0
