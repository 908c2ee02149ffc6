"""Online DPO (Guo et al. 2024, arXiv 2402.04792): the best and the worst of a prompt's own completions become a preference pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast.config import KLConfig, OnlineDPOConfig
from rlhf_fast.model import SharedModel
from rlhf_fast.train.loop import Run, State
from rlhf_fast.train.online import Experience, Sampler, train_online
from rlhf_fast.train.preference import Answer, AnswerTokens
from rlhf_fast.train.preference import Trainer as PairLoss
from rlhf_fast.train.rewards import Rewards


class Ranked(NamedTuple):
    """Pairs of a batch of completions, and the prompts that gave none."""

    rows: Tensor
    """(m, 2): the best and the worst completion of a prompt."""
    ties: int
    """Prompts whose completions all score the same."""
    unscorable: int
    """Prompts with fewer than two completions that have a score."""


def best_and_worst(scores: Tensor, scored: Tensor, group_size: int) -> Ranked:
    """Pairs of completions (B,) that lie side by side by prompt. scored: False = has no score; of equals the first one counts."""
    high = scores.masked_fill(~scored, -torch.inf).view(-1, group_size)
    low = scores.masked_fill(~scored, torch.inf).view(-1, group_size)
    enough = scored.view(-1, group_size).sum(1) > 1
    tied = enough & (high.amax(1) == low.amin(1))
    first = torch.arange(len(high), device=scores.device) * group_size
    rows = torch.stack([first + high.argmax(1), first + low.argmin(1)], 1)
    return Ranked(rows[enough & ~tied], int(tied.sum()), int((~enough).sum()))


class Trainer(Sampler):
    """Steps on pairs of the policy's own completions, with the role policy and, where the loss compares with it, reference."""

    def __init__(self, config: OnlineDPOConfig, model: SharedModel, tokenizer: Any, rewards: Rewards) -> None:
        size, halve = config.dpo.micro_batch_size, config.run.halve_on_oom
        unused = KLConfig(coef=0.0)  # the reference is in the loss
        super().__init__(config.rollout, unused, model, tokenizer, rewards, size, halve, config.packing)
        self.config, self.samples_per_prompt = config, config.group_size
        self.loss = PairLoss(config.loss, model, self.packed, config.rollout.temperature)
        # The loss compares with the reference, not with the policy that sampled. A shortest length shifts the rollout's log-probs.
        self.on_policy = self.same_policy and config.rollout.min_new_tokens == 0
        self.correction = None
        if self.loss.across:
            self.micro_batches.halve = False

    def limit(self, rows: int) -> None:
        if self.loss.across and rows < self.micro_batches.size:
            expected = f"room for {self.micro_batches.size} pairs, which the loss compares"
            raise _check.error(ValueError, "online-dpo", "run.memory_gib", f"room for {rows}", expected)
        super().limit(rows)

    def shared_sizes(self) -> dict[str, int]:
        return {}  # the number of pairs varies: `idle` passes make up for it

    def state(self) -> State:
        return {**super().state(), "delta": (self.loss.get, self.loss.put)}

    def update(self, run: Run, e: Experience, generator: torch.Generator) -> dict[str, float]:
        """All epochs of updates on the pairs of one experience; a batch without a pair takes none."""
        self.loss.ranks = self.ranks
        dpo, ranked = self.config.dpo, best_and_worst(e.scores, e.mask.any(1), self.samples_per_prompt)
        found: list[dict[str, float]] = []
        for _ in range(dpo.epochs if len(ranked.rows) else 0):
            order = torch.randperm(len(ranked.rows), generator=generator)
            for minibatch in order.split(dpo.minibatch_size or len(order)):
                pairs = ranked.rows[minibatch]
                own, total = self.part(e, pairs), len(pairs)
                # A loss across the pairs is found by all ranks together, also by one without a pair.
                least = (
                    int(self.ranks.world > 1) if self.loss.across else self.ranks.passes(total, self.micro_batches.size)
                )
                kl = self.loss.mismatched(self._winners(e, pairs), self.micro_batches.size)
                backward = lambda part, own=own, total=total, kl=kl: self._backward(e, own[part], total, kl)
                found.append(self.loss.step(run, len(own), self.micro_batches, backward, least=least))
        gaps = e.scores[ranked.rows[:, 0]] - e.scores[ranked.rows[:, 1]]
        return {
            **{f"dpo/{name}": sum(one[name] for one in found) / len(found) for name in (found or [{}])[0]},
            "pairs": float(len(ranked.rows)),
            "pairs/ties": float(ranked.ties),
            "pairs/unscorable": float(ranked.unscorable),
            "pairs/gap": float(gaps.mean()) if len(gaps) else 0.0,
            **{name: x for name, x in self.metrics(e).items() if name != "kl_coef"},
        }

    def _backward(self, e: Experience, pairs: Tensor, total: int, kl: Tensor | None) -> tuple[dict[str, float], Tensor]:
        """Gradient of pairs (b, 2) of a minibatch of `total`."""
        rows = pairs.t().flatten()  # those that won, then those that lost
        nothing: Tensor | None = None
        logprobs = {"policy": e.logprobs[rows]}
        if len(rows):
            part = self.rows(e.rollout, rows)
            stats = self.response_stats(part, part.forward(self.model, ("policy",), e.trunk_of(rows)).policy.hidden)
            logprobs["policy"] = part.spread(stats.logprobs)
        else:
            nothing = self.idle(e)
        if "reference" in self.loss.roles:
            assert e.ref_logprobs is not None
            logprobs["reference"] = e.ref_logprobs[rows]
        loss, shares, rewards = self.loss.of(AnswerTokens(logprobs, e.rollout.response_mask[rows]), total, kl)
        loss = loss if nothing is None else loss + nothing
        if loss.requires_grad:  # that of the pairs of other ranks is a constant
            loss.backward()
        return shares, rewards

    def _winners(self, e: Experience, pairs: Tensor) -> list[Answer]:
        """Tokens of the completions that won, with their prompts."""
        ids, mask, P = e.rollout.input_ids.cpu(), e.rollout.attention_mask.cpu(), e.rollout.prompt_length
        return [(ids[row][mask[row]].tolist(), int(mask[row, :P].sum())) for row in pairs[:, 0].tolist()]


def train_online_dpo(
    config: OnlineDPOConfig, *, observe: Callable[[list[str]], Mapping[str, float]] | None = None
) -> Path:
    """Run it; returns the folder of the trained policy adapter (PEFT format, relative to the base with its folds).

    observe: metrics of each batch of completions, to be logged.
    Raises ConfigError, DataError, RewardError, TrainingError.
    """
    roles = ("policy", "reference") if config.loss.needs_reference else ("policy",)
    return train_online("online-dpo", config, Trainer, roles, {"policy": config.optim.lr}, observe=observe)
