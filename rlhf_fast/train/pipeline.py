"""Batches of completions on their way into training: sampled when a step asks for them, or by an engine some steps ahead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.config import ModelConfig, RolloutConfig
from rlhf_fast.rollout import Engine, Request, Rollout
from rlhf_fast.train.loop import Buffers

if TYPE_CHECKING:
    from rlhf_fast.train.online import Sampler

Draw = Callable[[int], tuple[list[list[int]], torch.Generator]]
"""Step -> its prompts, and the generator of all that is drawn in it."""


def engine_of(model: ModelConfig, rollout: RolloutConfig, folder: Path, context: int) -> Engine | None:
    """What samples beside the trainer by these settings; None where the trainer does it.

    folder: of the run. context: tokens of the longest prompt and completion together.
    """
    if rollout.engine == "local":
        return None
    if rollout.engine == "vllm":
        from rlhf_fast.rollout.vllm import VLLMEngine

        return VLLMEngine(rollout.vllm, model, context=context, folder=folder / "vllm")
    from rlhf_fast.rollout.process import ProcessEngine

    p = rollout.process
    return ProcessEngine(model, threads=p.threads, device=p.device, timeout=p.timeout)


class Sampled(NamedTuple):
    """The batch of a step."""

    rollout: Rollout
    generator: torch.Generator
    """Of the step, behind the draws of sampling."""
    metrics: dict[str, float]


class _Asked(NamedTuple):
    request: Request
    generator: torch.Generator
    version: int


class Pipeline:
    """The rollouts of all steps, in their order.

    An engine gets batch n + staleness at the beginning of step n, with the policy as it is then (the first batches with that of step
    0): so which policy sampled a batch follows from its step, whatever the speed of the engine, and none is older than `staleness`
    steps. A checkpoint holds the policies behind the batches that were under way, which a resumed run asks for again.

    draw: of a step, the same whenever it is called. steps: how many there are.
    """

    def __init__(self, trainer: Sampler, draw: Draw, steps: int) -> None:
        self.trainer, self.draw, self.steps = trainer, draw, steps
        self.engine: Engine | None = None
        """train_online sets it."""
        self.staleness = trainer.settings.staleness
        self._asked: deque[_Asked] = deque()
        self._policies: dict[int, Mapping[str, Tensor]] = {}
        """Version -> adapter, of the last steps and this one."""
        self._next: int | None = None
        """First step whose batch nobody has asked for."""
        self._given: int | None = None
        """Version of the engine's adapter."""

    def reference(self) -> Rollout:
        """A batch for no step, before the first one, when the policy is the reference: the number behind the last step keeps its draws
        apart from training."""
        prompts, generator = self.draw(self.steps)
        if self.engine is None:
            return self.trainer.rollout(prompts, generator)
        request = self.trainer.request(prompts, generator)
        self._give(0)
        own, found = self._own(request), None
        if own is not None:
            self.engine.submit(own)
            found, _ = self.engine.collect()
        return self.trainer.gathered(request, found)

    def take(self, step: int) -> Sampled:
        """The batch of the next step, which the trainer has reached."""
        if self.engine is None:
            prompts, generator = self.draw(step)
            return Sampled(self.trainer.rollout(prompts, generator), generator, {})
        if self._next is None:
            self._ask_again(step)
        if self.staleness:
            oldest = step - self.staleness
            self._policies = {v: p for v, p in self._policies.items() if v >= oldest}
            self._policies[step] = self.trainer.model.state_of("policy")
        self._give(step)
        self._ask(step + self.staleness)
        request, generator, version = self._asked.popleft()
        began, found = time.monotonic(), None
        if self._own(request):
            found, version = self.engine.collect()
        waited = time.monotonic() - began
        rollout = self.trainer.gathered(request, found)
        return Sampled(rollout, generator, {"staleness": float(step - version), "seconds_waited": waited})

    def _ask_again(self, step: int) -> None:
        """Of a resumed run: for what was under way before this step."""
        assert self.engine is not None
        self._next, model = step, self.trainer.model
        current = model.state_of("policy")
        for ahead in range(step, step + self.staleness) if step else ():
            version = max(0, ahead - self.staleness)
            model.load_state_of("policy", self._policies[version])
            self._give(version)
            self._ask(ahead)
        model.load_state_of("policy", current)

    def _give(self, version: int) -> None:
        assert self.engine is not None
        if version == self._given:
            return
        if not self.engine.for_all_ranks:
            self.engine.update(self.trainer.model, version)
        else:
            with self.trainer.ranks.whole():  # an engine may run the model, to compare
                if self.trainer.ranks.first:
                    self.engine.update(self.trainer.model, version)
        self._given = version

    def _ask(self, last: int) -> None:
        """For all batches up to that of step `last`."""
        assert self.engine is not None and self._next is not None and self._given is not None
        for step in range(self._next, min(last + 1, self.steps)):
            prompts, generator = self.draw(step)
            request = self.trainer.request(prompts, generator)
            if own := self._own(request):
                self.engine.submit(own)
            self._asked.append(_Asked(request, generator, self._given))
            self._next = step + 1

    def _own(self, request: Request) -> Request | None:
        """What this rank samples of it."""
        assert self.engine is not None
        if self.engine.for_all_ranks:
            return request if self.trainer.ranks.first else None
        rows = self.trainer.sampled_here(len(request.seeds))
        return request.part(rows) if rows.start < rows.stop else None

    @property
    def buffers(self) -> Buffers:
        """For `Run`: the policies that sampled what is under way before a step."""
        return {"policies": (self._get, self._put)} if self.staleness else {}

    def _get(self, step: int) -> dict[str, Tensor]:
        versions = [v for v in self._policies if step - self.staleness <= v < step]
        return {f"{v}/{name}": x for v in versions for name, x in self._policies[v].items()}

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        found: dict[int, dict[str, Tensor]] = {}
        for key, x in tensors.items():
            version, _, name = key.partition("/")
            found.setdefault(int(version), {})[name] = x
        self._policies = dict(found)
