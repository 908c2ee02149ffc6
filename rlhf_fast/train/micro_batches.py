"""Parts of a batch that fit into memory, and what happens when one does not."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import torch

from rlhf_fast import _check
from rlhf_fast._allocator import return_large_blocks
from rlhf_fast.train._exact import rng_state, set_rng_state

logger = logging.getLogger(__name__)
T = TypeVar("T")


class OutOfMemory(RuntimeError):
    """A micro-batch does not fit, and no smaller one is allowed or possible."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA and other devices, Python's own memory, PyTorch's on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def fitting(
    config: Any,
    trainer: str,
    most: int,
    lengths: Iterable[tuple[int, int]],
    *,
    roles: tuple[str, ...] = (),
    batch_size: int = 1,
    group_size: int = 1,
    greedy: bool = False,
    engine: Literal["local", "process", "vllm"] = "local",
    old_logprobs: Literal["scored", "sampled"] = "scored",
    whole: bool = False,
) -> int:
    """Rows (pairs) of a micro-batch: `most`, or with run.memory_gib the largest number up to it that a plan of the run finds room for.

    To be asked before the model is loaded, when the process holds its libraries and its data: they are counted as they stand.
    trainer, greedy, old_logprobs: as in PlanConfig. lengths: (prompt, response) tokens of every sequence; the longest stand for all.
    batch_size, group_size, engine: of the rollouts of all ranks. whole: a smaller number will not do. Raises
    rlhf_fast.plan.DoesNotFit, a ValueError.
    """
    gib = config.run.memory_gib
    if gib is None:
        return most
    from rlhf_fast.config import PlanConfig, resolve_device
    from rlhf_fast.plan import FREE, Planner, checked, largest

    if resolve_device("RunConfig", config.run.device).type != "cpu":
        raise _check.error(
            ValueError, trainer, "run.memory_gib", gib, "None for a run on a GPU: rlhf-fast plan --gpu tells"
        )
    return_large_blocks()
    prompt, response = max(lengths, key=sum)
    settings = PlanConfig(
        config.model.path,
        trainer=trainer,  # type: ignore[arg-type]
        roles=roles,  # type: ignore[arg-type]
        dtype=config.model.dtype,
        quantize=config.model.quantize,
        lora=config.model.lora,
        shared_layers=config.model.shared_layers,
        gradient_checkpointing=config.model.gradient_checkpointing,
        batch_size=batch_size,
        group_size=group_size,
        greedy=greedy,
        old_logprobs=old_logprobs,
        ranks=int(os.environ.get("WORLD_SIZE") or 1),
        shard=config.model.shard,
        engine=engine,
        prompt_tokens=max(prompt, 1),
        response_tokens=max(response, 1),
    )
    planner = Planner(settings)
    room = FREE * gib * 2**30
    found = checked(planner.at(most), room) if whole else largest(planner, room, most)
    size, total = found.micro_batch_size, found.total / 2**30
    logger.info("micro-batches of %d: the plan takes %.2f of %.2f GiB", size, total, gib)
    return size


class MicroBatches:
    """Work on `size` rows of a batch at a time.

    halve: a batch of which a part runs out of memory is done again from its start in parts half as large, which all later
    ones keep to. clear: undoes what the parts of a batch add up to (gradients).
    """

    def __init__(self, size: int, *, halve: bool, clear: Callable[[], object]) -> None:
        self.size, self.halve, self._clear = size, halve, clear

    def map(self, rows: int, work: Callable[[slice], T], *, least: int = 0) -> list[T]:
        """Results of `work` for consecutive slices that cover `rows` rows.

        least: so many calls at least, where other ranks wait for each of them; those without rows get an empty slice at the end.
        Random numbers are drawn as if the size that fits had been the size all along. Raises OutOfMemory.
        """
        before = rng_state()
        while True:
            try:
                starts = range(0, max(rows, least * self.size), self.size)
                return [work(slice(min(i, rows), min(i + self.size, rows))) for i in starts]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._clear()
                largest = min(self.size, rows)
                message = " ".join(str(error).split())[:200]
                if not self.halve or largest == 1:
                    way = "give a smaller micro_batch_size" if largest > 1 else "give shorter sequences"
                    raise OutOfMemory(
                        f"a micro-batch of {largest} does not fit into memory; {way} ({message})"
                    ) from error
            # Out of the handler, whose traceback keeps the tensors of the failed part alive.
            self.size = (largest + 1) // 2
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            set_rng_state(before)
            logger.warning(
                "a micro-batch of %d does not fit into memory (%s); going on with %d", largest, message, self.size
            )

    def get(self) -> int:
        """Size, for a checkpoint."""
        return self.size

    def put(self, size: int) -> None:
        """Size from a checkpoint, so that a resumed run adds up gradients in the same order."""
        self.size = size
