"""Where completions are sampled: by the trainer's own model, or by an engine beside it that holds a copy of the base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor

from rlhf_fast.batch import pad
from rlhf_fast.model import SharedModel
from rlhf_fast.rollout.hf import PackedRollout, Rollout, generate


class EngineError(RuntimeError):
    """An engine cannot sample; the message has its last words."""


@dataclass(frozen=True)
class Request:
    """What a batch of completions is asked with."""

    prompts: list[list[int]]
    """Token ids, not padded."""
    num_samples: int
    """Completions n of each prompt, side by side in the result: rows i n ... i n + n - 1 are those of prompt i."""
    seeds: Tensor
    """(len(prompts) n,) int64, one for each completion."""
    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    eos_token_id: int | None
    """None = completions of max_new_tokens tokens."""

    def part(self, rows: slice) -> Request:
        """The request for some completions of the batch, which are all of their prompts'."""
        n = self.num_samples
        return replace(self, prompts=self.prompts[rows.start // n : rows.stop // n], seeds=self.seeds[rows])


class Engine(ABC):
    """A second process or a server that holds the base and the newest policy adapter it was given. Use as a context manager."""

    for_all_ranks = False
    """Whether the first rank's engine samples for all of them; otherwise each rank has one."""

    @abstractmethod
    def update(self, model: SharedModel, version: int) -> None:
        """Hand over the policy's adapter as it is now: the next `submit` samples with it. Nothing is restarted.

        version: steps of training behind it; what `collect` tells of a rollout.
        """

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Ask for a batch by the newest adapter; returns at once."""

    @abstractmethod
    def collect(self) -> tuple[Rollout, int]:
        """(rollout with log-probs, version that sampled it), in the order of `submit`; waits for it."""

    @abstractmethod
    def close(self) -> None:
        """End it, with what it still works on."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sample(model: SharedModel, request: Request, packed: PackedRollout | None = None) -> Rollout:
    """The completions of a request by the policy of a model in this process, on its device; see `generate`."""
    ids, mask = pad(request.prompts, left=True, device=model.backbone.device)
    return generate(
        model,
        ids,
        mask,
        num_samples=request.num_samples,
        max_new_tokens=request.max_new_tokens,
        min_new_tokens=request.min_new_tokens,
        temperature=request.temperature,
        eos_token_id=request.eos_token_id,
        seeds=request.seeds,
        packed=packed,
    )
