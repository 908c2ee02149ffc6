"""Saves, kills and damage shared by the tests of checkpoints."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_fast.train.checkpoint import CheckpointStore


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(step)
    return {
        "model": {
            "a": torch.randn(5, 3, generator=g),
            "b": torch.randn(4, generator=g).bfloat16(),
            "empty": torch.zeros(0),
        },
        "optim": {"a.step": torch.tensor(float(step)), "a.mask": torch.tensor([True, False])},
    }


def assert_is_step(found, step: int) -> None:
    assert found is not None
    assert found.step == step
    assert found.state == {"step": step, "nested": {"lr": 0.1}}
    wanted = tensors_of(step)
    assert found.tensors.keys() == wanted.keys()
    for stem, named in wanted.items():
        assert found.tensors[stem].keys() == named.keys()
        for name, tensor in named.items():
            other = found.tensors[stem][name]
            assert other.dtype == tensor.dtype
            assert torch.equal(other, tensor)


def save(store: CheckpointStore, step: int) -> Path | None:
    return store.save(step, tensors_of(step), {"step": step, "nested": {"lr": 0.1}})


def child(work: Callable[[], object], fault: str | None = None) -> int:
    """.

    Run `work` in a forked process with a fault set: 0, 1 for an exception, or minus the signal that ended
    it.
    """
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            os.environ["RLHF_FAST_FAULT"] = fault or ""
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if ".tmp-" in p.name)


def flip(path: Path, at: float = 0.5) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * at)] ^= 1
    path.write_bytes(raw)
