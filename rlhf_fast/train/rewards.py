"""What a completion is worth: the reward role, Python callables, or a weighted mix, with their bookkeeping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.config import KLConfig, RewardSource, RolloutConfig, is_callable_spec, is_url
from rlhf_fast.rewards import (
    Completions,
    InProcess,
    Pool,
    RewardError,
    RewardFunction,
    Scorer,
    Scores,
    Server,
    fingerprint,
    load_callable,
)
from rlhf_fast.train.ranks import Ranks

__all__ = ["KLController", "RewardError", "Rewards", "apply_missing_eos", "call_reward", "load_callable"]


def call_reward(function: RewardFunction, name: str, prompts: list[str], completions: list[str]) -> Tensor:
    """(B,) fp32 scores of a function in this process, NaN where a completion is unscorable.

    Where it raises for a batch, it is called for each completion. Raises ContractError for a result that is no list of numbers,
    one for each completion.
    """
    scorer = Scorer(InProcess({name: function}))
    return _finite(torch.tensor(scorer.scores(name, prompts, completions, len(completions)), dtype=torch.float32))


def _finite(scores: Tensor) -> Tensor:
    """Infinities, which large numbers become in fp32, say as little as NaN."""
    return scores.where(scores.isfinite(), math.nan)


class Rewards:
    """Scores of completions from the sources of a RewardSource, shifted, scaled and clipped as it says.

    Use as a context manager, or call `close`: functions run in worker processes unless the settings say otherwise.

    Raises ValueError for a source that cannot be had.
    """

    def __init__(self, config: RewardSource) -> None:
        self.config = config
        functions = [source for source in config.weights if is_callable_spec(source)]
        servers = [source for source in config.weights if is_url(source)]
        folders = [source for source in config.weights if source not in functions and source not in servers]
        if len(folders) > 1:
            raise ValueError(f"reward: got two adapter folders, {folders[0]!r} and {folders[1]!r}, expected one")
        self.adapter: str | None = folders[0] if folders else None
        self._scorers: dict[str, Scorer] = {}
        for url in servers:
            server = Server(url, max(config.workers, 1), timeout=config.timeout, retries=config.retries)
            self._scorers[url] = Scorer(server, size=config.call_size, whole_batch=config.whole_batch)
        if functions:
            backend = (
                Pool(functions, config.workers, timeout=config.timeout)
                if config.workers
                else InProcess({spec: load_callable(spec) for spec in functions})
            )
            scorer = Scorer(backend, size=config.call_size, whole_batch=config.whole_batch)
            self._scorers |= dict.fromkeys(functions, scorer)
        self.mean, self.m2, self.count = 0.0, 0.0, 0
        self.ranks = Ranks()
        """Those that share the work: callables and servers of a rank get its share of the completions, or the first one's get all
        of them where they compare the completions of a batch."""

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        for scorer in self._scorers.values():
            scorer.backend.close()

    def __call__(
        self, prompts: list[str], completions: Completions, role_scores: Tensor | None, observe: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(normalised scores, raw scores), each (B,) fp32 with NaN where a completion is unscorable.

        completions: texts; or the steps of each, and all (B,) are (S,), the steps of one completion after those of the other.
        role_scores: (B,) from the learned reward role; None when no source is an adapter. observe: whether running moments take the
        scores in.

        Raises RewardError when more than max_unscorable of the batch is, or a source breaks its contract.
        """
        n, limit = len(completions), self.config.max_unscorable
        counts = torch.tensor([1 if isinstance(c, str) else len(c) for c in completions], dtype=torch.int64)
        raw = torch.zeros(int(counts.sum()))
        for source, weight in self.config.weights.items():
            if source == self.adapter:
                raw += weight * role_scores.cpu()  # type: ignore[union-attr]
            else:
                found = self._scores(source, prompts, completions, limit * n)
                # What failed has one NaN in the place of its list.
                each = [x if isinstance(x, list) else [x] * k for x, k in zip(found, counts.tolist(), strict=True)]
                raw += weight * torch.tensor([x for scores in each for x in scores])
        raw = _finite(raw)
        row = torch.arange(n).repeat_interleave(counts)
        unscorable = torch.zeros(n).index_add(0, row, raw.isnan().float()) > 0
        raw = raw.masked_fill(unscorable[row], math.nan)
        lost = int(unscorable.sum())
        if lost > limit * n:
            failed = ", ".join(f"{count:.0f} {name}" for name, count in self.failures().items())
            raise RewardError(
                f"{lost} of {n} completions have no score (reward.max_unscorable is {limit:.0%})"
                + (f"; calls that failed: {failed}" if failed else "")
            )
        if observe and self.config.normalize == "running":
            self.observe(raw[~raw.isnan()])
        return self.normalized(raw), raw

    def _scores(self, source: str, prompts: list[str], completions: Completions, limit: float) -> Scores:
        own = self.ranks.share(len(completions))
        if self.config.whole_batch:
            own = slice(0, len(completions) if self.ranks.first else 0)
        if own.start == own.stop:
            return self.ranks.join([])
        return self.ranks.join(self._scorers[source].scores(source, prompts[own], completions[own], limit))

    def fingerprints(self) -> dict[str, str]:
        """Callable -> SHA-256 (hex) of the file it is in, or nothing known of it."""
        return {f"reward function {s}": fingerprint(s) for s in self.config.weights if is_callable_spec(s)}

    def failures(self) -> dict[str, float]:
        """Kind of failure (raised, timeouts, crashes, server_errors) -> calls that failed so since the last time."""
        counts: dict[str, float] = {}
        scorers = {id(s): s for s in self._scorers.values()}.values()
        for failed in self.ranks.join([dict(scorer.failures) for scorer in scorers]):
            for kind, count in failed.items():
                counts[kind] = counts.get(kind, 0.0) + count
        for scorer in scorers:
            scorer.failures.clear()
        return counts

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
