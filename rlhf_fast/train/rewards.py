"""What a completion is worth: the reward role, Python callables, or a weighted mix, with their bookkeeping."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import math
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.config import KLConfig, RewardSource, RolloutConfig, is_callable_spec

logger = logging.getLogger(__name__)

MAX_UNSCORABLE = 0.1
"""Share of a batch that may go unscored before the run stops."""

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
"""(prompts, completions) -> one number each; None or NaN marks a completion as unscorable."""


class RewardError(RuntimeError):
    """Too many completions of a batch could not be scored, or a reward function broke its contract."""


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


def call_reward(function: RewardFunction, name: str, prompts: list[str], completions: list[str]) -> Tensor:
    """(B,) fp32 scores, NaN where a completion is unscorable. The function gets copies of the lists.

    A function that raises leaves the whole batch unscored (logged with its traceback). Raises RewardError for a result of
    the wrong length, TypeError for entries that are no numbers.
    """
    try:
        result = function(copy.copy(prompts), copy.copy(completions))
    except Exception:
        logger.exception("reward function %s failed on a batch of %d", name, len(completions))
        return torch.full((len(completions),), math.nan)
    if isinstance(result, Tensor):
        result = result.tolist()
    if not hasattr(result, "__len__"):
        raise RewardError(
            f"reward function {name}: got a {type(result).__name__}, expected a list of {len(completions)}"
        )
    if len(result) != len(completions):
        raise RewardError(f"reward function {name}: got {len(result)} scores for {len(completions)} completions")
    return torch.tensor([_number(x, name, i) for i, x in enumerate(result)], dtype=torch.float32)


def _number(x: Any, name: str, i: int) -> float:
    if x is None:
        return math.nan
    if isinstance(x, Tensor) and x.dim() == 0:
        x = x.item()
    if isinstance(x, numbers.Real):  # bool and numpy scalars included
        value = float(x)
        return value if math.isfinite(value) else math.nan
    raise TypeError(f"reward function {name}: score {i} got {type(x).__name__}, expected a number")


class Rewards:
    """Scores of completions from the sources of a RewardSource, shifted, scaled and clipped as it says."""

    def __init__(self, config: RewardSource) -> None:
        self.config = config
        self.adapter: str | None = None
        self.functions: dict[str, RewardFunction] = {}
        for source in config.weights:
            if is_callable_spec(source):
                self.functions[source] = load_callable(source)
            elif self.adapter is None:
                self.adapter = source
            else:
                raise ValueError(f"reward: got two adapter folders, {self.adapter!r} and {source!r}, expected one")
        self.mean, self.m2, self.count = 0.0, 0.0, 0

    def __call__(self, prompts: list[str], completions: list[str], role_scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normalised scores, raw scores), each (B,) fp32 with NaN where a completion is unscorable.

        role_scores: (B,) from the learned reward role; None when the sources are callables alone.

        Raises RewardError when more than MAX_UNSCORABLE of the batch is.
        """
        raw = torch.zeros(len(completions))
        for source, weight in self.config.weights.items():
            if source == self.adapter:
                raw += weight * role_scores.cpu()  # type: ignore[union-attr]
            else:
                raw += weight * call_reward(self.functions[source], source, prompts, completions)
        lost = int(raw.isnan().sum())
        if lost > MAX_UNSCORABLE * len(raw):
            raise RewardError(f"{lost} of {len(raw)} completions could not be scored (limit {MAX_UNSCORABLE:.0%})")
        if self.config.normalize == "running":
            self.observe(raw[~raw.isnan()])
        return self.normalized(raw), raw

    def observe(self, scores: Tensor) -> None:
        """Take (n,) scores into the moments (Chan et al. 1979, parallel variance)."""
        n = scores.numel()
        if n == 0:
            return
        mean = scores.double().mean().item()
        m2 = (scores.double() - mean).square().sum().item()
        total, delta = self.count + n, mean - self.mean
        self.m2 += m2 + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    def normalized(self, raw: Tensor) -> Tensor:
        """Scores with the gain and bias of lm-human-preferences: mean 0 and deviation 1 over what was observed."""
        scores = raw
        if self.config.normalize != "none" and self.count > 1:
            deviation = max(math.sqrt(self.m2 / self.count), 1e-6)
            scores = (raw - self.mean) / deviation
        return scores if self.config.clip is None else scores.clamp(-self.config.clip, self.config.clip)

    def get(self) -> dict[str, float]:
        """Moments, for a checkpoint."""
        return {"mean": self.mean, "m2": self.m2, "count": self.count}

    def put(self, state: dict[str, float]) -> None:
        """Moments from a checkpoint."""
        self.mean, self.m2, self.count = state["mean"], state["m2"], int(state["count"])


def apply_missing_eos(scores: Tensor, finished: Tensor, config: RolloutConfig) -> Tensor:
    """Scores (B,) with the rule for completions that never ended: OpenAI's replacement, or TRL's subtraction."""
    if config.missing_eos == "replace":
        return scores.where(finished, -config.missing_eos_penalty)
    if config.missing_eos == "subtract":
        return scores - config.missing_eos_penalty * (~finished)
    return scores


class KLController:
    """The KL coefficient: fixed, or steered towards a target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""

    def __init__(self, config: KLConfig) -> None:
        self.config = config
        self.coef = config.coef

    def update(self, kl: float, completions: int) -> None:
        """Take in the mean KL per completion (nats, summed over its tokens) of a batch."""
        if self.config.kind == "adaptive" and math.isfinite(kl):
            error = min(max(kl / self.config.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * completions / self.config.horizon

    def get(self) -> float:
        """Coefficient, for a checkpoint."""
        return self.coef

    def put(self, coef: float) -> None:
        """Coefficient from a checkpoint."""
        self.coef = coef
