"""Best-of-n fine-tuning: the best of a prompt's own completions are learned like examples (RAFT, Dong et al. 2023, arXiv 2304.06767).

The rejection sampling of Llama 2 (Touvron et al. 2023, arXiv 2307.09288, section 3.2.3), a step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.config import KLConfig, RaftConfig
from rlhf_fast.data import PromptRecord
from rlhf_fast.model import SharedModel
from rlhf_fast.train.loop import Run
from rlhf_fast.train.online import Experience, Sampler, train_online
from rlhf_fast.train.rewards import Rewards
from rlhf_fast.train.scoring import head_logprobs

KEPT = "kept.jsonl"
"""File of the run's folder with the completions that were learned."""


def best_of(
    scores: Tensor, scored: Tensor, group_size: int, best: int | None = None, threshold: float | None = None
) -> Tensor:
    """(m,) rows of the completions (B,) to keep, in order. They lie side by side by prompt.

    scored: False = has no score. best: at most so many of a prompt, the first of equals before the others. threshold: of those that
    score at least so much.
    """
    usable = scored if threshold is None else scored & (scores >= threshold)
    order = scores.masked_fill(~usable, -torch.inf).view(-1, group_size).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(group_size, device=order.device).expand_as(order))
    return (usable & (place.flatten() < (best or group_size))).nonzero().flatten()


class Trainer(Sampler):
    """Steps on the best completions, with the role policy."""

    on_policy = True  # log-probs are logged, and no one compares with them

    def __init__(self, config: RaftConfig, model: SharedModel, tokenizer: Any, rewards: Rewards) -> None:
        size, halve = config.raft.micro_batch_size, config.run.halve_on_oom
        unused = KLConfig(coef=0.0)
        super().__init__(config.rollout, unused, model, tokenizer, rewards, size, halve, config.packing)
        self.config, self.samples_per_prompt, self.correction = config, config.group_size, None

    def shared_sizes(self) -> dict[str, int]:
        return {}  # how many are kept varies: `idle` passes make up for it

    def kept(self, e: Experience) -> Tensor:
        """(m,) rows that are learned."""
        return best_of(
            e.scores, e.mask.any(1), self.samples_per_prompt, self.config.raft.best, self.config.raft.threshold
        )

    def update(self, run: Run, e: Experience, generator: torch.Generator) -> dict[str, float]:
        """All epochs of updates on what one experience keeps; a batch that keeps nothing takes none."""
        raft, kept = self.config.raft, self.kept(e)
        losses, norms = [], []
        for _ in range(raft.epochs if len(kept) else 0):
            order = torch.randperm(len(kept), generator=generator)
            for minibatch in order.split(raft.minibatch_size or len(order)):
                rows = kept[minibatch]
                own, tokens = self.part(e, rows), int(e.mask[rows].sum())
                backward = lambda part, own=own, tokens=tokens: self._backward(e, own[part], tokens)
                least = self.ranks.passes(len(rows), self.micro_batches.size)
                losses.append(sum(self.ranks.join(self.micro_batches.map(len(own), backward, least=least))))
                norms.append(run.update(losses[-1]))
        learned = {"raft/loss": sum(losses) / len(losses), "raft/grad_norm": sum(norms) / len(norms)} if losses else {}
        return {
            **learned,
            "kept": float(len(kept)),
            "kept/score": float(e.raw_scores[kept].mean()),
            "kept/length": float(e.mask[kept].sum(1).float().mean()),
            **self.metrics(e),
        }

    def _backward(self, e: Experience, rows: Tensor, tokens: int) -> float:
        """Gradient of -log p of the tokens of some completions, over the tokens of their minibatch."""
        if not len(rows):
            if (nothing := self.idle(e)) is not None:
                nothing.backward()
            return 0.0
        part = self.rows(e.rollout, rows)
        hidden = part.forward(self.model, ("policy",), e.trunk_of(rows)).policy.hidden
        # Not at the temperature of sampling: the model itself learns what was kept.
        mask = part.tokens(part.mask)
        stats = head_logprobs(self.model, part.logprob_states(hidden), part.tokens(part.responses), mask)
        loss = -stats.logprobs.sum() / tokens
        loss.backward()
        return float(loss.detach())

    def record(self, run: Run, step: int, e: Experience, records: Sequence[PromptRecord]) -> None:
        """Write what was learned, as records of the kinds chat, or text and prompt."""
        n, texts, rows = self.samples_per_prompt, e.rollout.texts(self.tokenizer), []
        for row in self.kept(e).tolist():
            prompt, text, score = records[row // n].prompt, texts[row], float(e.raw_scores[row])
            if isinstance(prompt, str):
                said: dict[str, Any] = {"prompt": prompt, "completion": text, "text": prompt + text}
            else:
                said = {"messages": [*prompt, {"role": "assistant", "content": text}]}
            rows.append({**said, "score": score, "source": records[row // n].source})
        run.monitor.lines(KEPT, step + 1, rows)


def train_raft(config: RaftConfig, *, observe: Callable[[list[str]], Mapping[str, float]] | None = None) -> Path:
    """Run it; returns the folder of the trained policy adapter (PEFT format, relative to the base with its folds).

    Beside it stands kept.jsonl with what was learned. observe: metrics of each batch of completions, to be logged.
    Raises ConfigError, DataError, RewardError, TrainingError.
    """
    return train_online("raft", config, Trainer, ("policy",), {"policy": config.optim.lr}, observe=observe)
