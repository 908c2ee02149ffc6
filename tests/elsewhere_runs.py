"""The process of train/test_other_device.py: elsewhere_runs.py SOURCE FOLDER, every run on a device that is not the CPU.

FOLDER/NAME is a run, FOLDER/NAME.again the same one resumed after its first step, FOLDER/NAME.error what went wrong.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import traceback
from collections import deque
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from elsewhere import install
from trainers import RUNS

from rlhf_fast.config import EvaluateConfig, GenerationConfig, ModelConfig, PromptDataConfig, RewardSource, RunConfig
from rlhf_fast.evaluate.compare import evaluate
from rlhf_fast.model import SharedModel
from rlhf_fast.rollout import Engine, Request, Rollout, sample
from rlhf_fast.train import loop, online
from rlhf_fast.train.online import Sampler
from rlhf_fast.train.rows import packs_well

STEPS = 2
MORE = {
    "ppo: learned reward, packed": "ppo",
    "grpo: shared layers": "grpo",
    "grpo: an engine on the CPU": "grpo",
    "dpo: packed": "dpo",
}
"""Further runs, which are not resumed, and what they are like."""
ALL = (*RUNS, *MORE)


def settings(source: Path, folder: Path, name: str, **run: Any) -> Any:
    """Of a run of STEPS steps that says the same wherever it is: packed and padded passes draw other dropout."""
    config = RUNS[MORE.get(name, name)].config(source, folder, save_every=1, **run)
    lora = dataclasses.replace(config.model.lora, dropout=0.0)
    changes: dict[str, Any] = {"model": dataclasses.replace(config.model, lora=lora)}
    changes["run"] = dataclasses.replace(config.run, sample_every=1)
    changes["max_steps" if hasattr(config, "max_steps") else "steps"] = STEPS
    if "packed" in name:
        changes["packing"] = True
    if "shared" in name:
        changes["model"] = dataclasses.replace(changes["model"], shared_layers=1)
    if "learned" in name:
        changes["reward"] = RewardSource(str(source / "reward" / "adapter"), normalize="reference")
        changes["rollout"] = dataclasses.replace(config.rollout, missing_eos="subtract")
    if "engine" in name:
        changes["rollout"] = dataclasses.replace(config.rollout, engine="process", staleness=1)
    return dataclasses.replace(config, **changes)


def judged(source: Path, folder: Path) -> EvaluateConfig:
    """An adapter against the plain model, by a reward model."""
    adapter = str(source / "reward" / "adapter")
    return EvaluateConfig(
        ModelConfig(str(source / "model"), dtype="float32"),
        PromptDataConfig(str(source / "prompts.jsonl")),
        RunConfig(str(folder), threads=1),
        adapters={"trained": str(source / "sft" / "adapter")},
        rollout=GenerationConfig(batch_size=3, max_new_tokens=6),
        judges=(adapter,),
        bootstrap=100,
    )


class HostEngine(Engine):
    """A second model on the CPU, as the sampling process has it, without the seconds that a process takes to start."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = SharedModel.from_pretrained(model.path, ("policy",), model.lora)
        self.version, self.found = 0, deque[tuple[Rollout, int]]()

    def update(self, model: SharedModel, version: int) -> None:
        self.model.load_state_of("policy", model.state_of("policy"))
        self.version = version

    def submit(self, request: Request) -> None:
        self.found.append((sample(self.model, request), self.version))

    def collect(self) -> tuple[Rollout, int]:
        return self.found.popleft()

    def close(self) -> None:
        self.found.clear()


def host_engine(model: ModelConfig, rollout: Any, *_: Any) -> Engine | None:
    """In the place of train.online.engine_of."""
    return None if rollout.engine == "local" else HostEngine(model)


def watch(device: torch.device) -> None:
    """Runs and batches whose tensors are elsewhere end with an error."""
    begin, score = loop.Run.__init__, Sampler.score

    def begun(run: loop.Run, title: str, config: Any, model: SharedModel, *rest: Any) -> None:
        assert {x.device for x in (*model.parameters(), *model.buffers())} == {device}
        begin(run, title, config, model, *rest)

    def scored(trainer: Sampler, rollout: Rollout) -> Any:
        found = score(trainer, rollout)
        tensors = [x for x in (*vars(found).values(), *vars(found.rollout).values()) if isinstance(x, torch.Tensor)]
        assert {x.device for x in tensors} == {device}
        return found

    loop.Run.__init__, Sampler.score = begun, scored


def layers_wait_on_the_host(source: Path, device: torch.device) -> None:
    """Of a base that ranks will share; all else is on the device."""
    os.environ["WORLD_SIZE"] = "2"
    try:
        config = ModelConfig(str(source / "model"), dtype="float32", shard=True)
        model = loop.load_model(config, ("policy", "value"), 0, device=device)
    finally:
        del os.environ["WORLD_SIZE"]
    layers = {id(x) for x in model.backbone.layers.parameters()}
    assert layers
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        assert x.device == (torch.device("cpu") if id(x) in layers else device), name
    assert all(x.device == device for role in model.roles for x in model.parameters_of(role).values())
    assert not packs_well(model)


def main(source: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    device = install()
    loop.resolve_device = lambda owner, name: device  # no setting has its name
    online.engine_of = host_engine
    watch(device)
    for name in ALL:
        run, again, train = folder / name, folder / f"{name}.again", RUNS[MORE.get(name, name)].train
        try:
            train(settings(source, run, name))
            if name in MORE:
                continue
            shutil.copytree(run, again)
            shutil.rmtree(again / "checkpoints" / f"step-{STEPS}")
            train(settings(source, again, name, resume=True))
        except BaseException:
            (folder / f"{name}.error").write_text(traceback.format_exc())
    try:
        layers_wait_on_the_host(source, device)
    except BaseException:
        (folder / "shard.error").write_text(traceback.format_exc())
    try:
        evaluate(judged(source, folder / "evaluate"))
    except BaseException:
        (folder / "evaluate.error").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # PyTorch's threads of the device do not end by themselves
