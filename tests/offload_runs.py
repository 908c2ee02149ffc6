"""The process of train/test_offload_runs.py: offload_runs.py SOURCE FOLDER, runs on a device that is not the CPU, in forked children.

FOLDER/NAME/plain is a run whose layers and moments stay on the device, FOLDER/NAME/layers one with model.offload, and for some
FOLDER/NAME/both one with optim.offload too. FOLDER/NAME/killed is one with both that dies in its last step and goes on, FOLDER/NAME/changed the same one gone
on with neither. FOLDER/NAME/copies.json is what was copied, FOLDER/NAME/OTHER.error what went wrong.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import sys
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from checkpoints import child
from elsewhere import Elsewhere, install
from elsewhere_runs import STEPS, host_engine, settings
from torch import Tensor
from trainers import RUNS

from rlhf_fast.model import LoraConfig, SharedModel, offload
from rlhf_fast.rollout import generate
from rlhf_fast.train import loop, online
from rlhf_fast.train.optimizer import HostAdamW

CASES = {"sft": "sft", "ppo: learned reward, packed": "ppo", "grpo: shared layers": "grpo", "dpo: packed": "dpo"}
"""Runs, and what they are like."""
CHECKPOINTED = ("sft", "dpo: packed")
MOMENTS = ("sft", "ppo: learned reward, packed")


def config(source: Path, folder: Path, name: str, *, layers: bool = False, moments: bool = False, **run: Any) -> Any:
    found = settings(source, folder, name, **run)
    model = dataclasses.replace(found.model, offload=layers, gradient_checkpointing=name in CHECKPOINTED)
    return dataclasses.replace(found, model=model, optim=dataclasses.replace(found.optim, offload=moments))


class Counted(offload.Copies):
    """Copies whose bytes on the device are counted while they live."""

    alive: dict[int, int] = {}  # noqa: RUF012
    most = copied = 0

    def begin(self, host: Tensor) -> tuple[Tensor, Any]:
        there, token = super().begin(host)
        assert isinstance(there, Elsewhere)
        storage = there.inner.untyped_storage()
        Counted.alive[storage._cdata] = host.nbytes
        weakref.finalize(storage, Counted.alive.pop, storage._cdata)
        Counted.most = max(Counted.most, sum(Counted.alive.values()))
        Counted.copied += 1
        return there, token


def watch(device: torch.device) -> None:
    """Runs whose tensors are in the wrong place end with an error."""
    begin, end = loop.Run.__init__, loop.Run.__exit__

    def check(run: loop.Run) -> None:
        layers = {id(p) for p in run.model.backbone.layers.parameters()}
        for name, x in (*run.model.named_parameters(), *run.model.named_buffers()):
            home = torch.device("cpu") if run.config.model.offload and id(x) in layers else device
            assert x.device == home, name
        home = torch.device("cpu") if run.optim.offload else device
        moments = [x for state in run.optimizer.state.values() for key, x in state.items() if key != "step"]
        assert all(x.device == home for x in moments)
        assert isinstance(run.optimizer, HostAdamW) == run.optim.offload

    def begun(run: loop.Run, *rest: Any) -> None:
        begin(run, *rest)
        check(run)

    def ended(run: loop.Run, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            check(run)
            assert run.optimizer.state
        end(run, kind, error, trace)

    loop.Run.__init__, loop.Run.__exit__ = begun, ended


def adapters_that_come_later(source: Path, folder: Path, device: torch.device) -> None:
    """Of another rank than those of the model: new parameters, where all adapters are."""
    path = str(source / "model")
    SharedModel.from_pretrained(path, ("policy",), LoraConfig(r=3)).save_adapter("policy", folder / "adapter")
    model = SharedModel.from_pretrained(path, ("policy",), LoraConfig(r=2), device=device, offload=True)
    before = set(map(id, model.adapters.parameters()))
    model.load_adapter("policy", folder / "adapter")
    assert not before & set(map(id, model.adapters.parameters()))
    assert {p.device for p in model.adapters.parameters()} == {device}
    try:
        model.offload(device)
    except ValueError as error:
        assert "for a model that is offloaded, expected another device, once" in str(error)
    else:
        raise AssertionError("offloaded twice")


def main(source: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    # Forked children get what a first run imports; nothing here differentiates, so no thread is inherited.
    model = SharedModel.from_pretrained(str(source / "model"), ("policy",))
    generate(model, torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool), max_new_tokens=2)
    loop.load_tokenizer(str(source / "model"))
    with suppress(ImportError):
        importlib.import_module("torch.utils.tensorboard")
    device = install()
    loop.resolve_device = lambda owner, name: device  # no setting has its name
    online.engine_of = host_engine
    offload.Copies = Counted
    watch(device)
    try:
        adapters_that_come_later(source, folder, device)
    except BaseException:
        (folder / "adapters.error").write_text(traceback.format_exc())
    for name, kind in CASES.items():
        here = folder / name
        here.mkdir()

        def run(
            other: str,
            after: Callable[[], object] = int,
            here: Path = here,
            name: str = name,
            kind: str = kind,
            **k: Any,
        ) -> Callable[[], object]:
            def work() -> None:
                try:
                    RUNS[kind].train(config(source, here / other, name, **k))
                    after()
                except BaseException:
                    (here / f"{other}.error").write_text(traceback.format_exc())

            return work

        def told(here: Path = here) -> None:
            (here / "copies.json").write_text(json.dumps({"most": Counted.most, "copied": Counted.copied}))

        child(run("plain"))
        child(run("layers", told, layers=True))
        if name not in MOMENTS:
            continue
        child(run("both", layers=True, moments=True))
        fault = f"train.step:{(STEPS - 1) * RUNS[kind].updates + 1}"
        assert child(run("killed", layers=True, moments=True), fault) == -signal.SIGKILL
        shutil.copytree(here / "killed", here / "changed")
        child(run("killed", layers=True, moments=True, resume=True))
        child(run("changed", resume=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # PyTorch's threads of the device do not end by themselves
