"""GRPO, RLOO, REINFORCE++ and their kin: several completions of a prompt are each other's baseline, and there is no critic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import Denominators, advantages, covariance_mask, group_advantages, kl_estimate, policy_loss
from rlhf_fast.config import GroupConfig
from rlhf_fast.entropy import COVARIANCE_KINDS
from rlhf_fast.losses import RECIPES
from rlhf_fast.model import SharedModel
from rlhf_fast.train.loop import Run
from rlhf_fast.train.online import Experience, Means, Sampler, train_online
from rlhf_fast.train.rewards import Rewards


class Trainer(Sampler):
    """The steps of a recipe of `policy_loss` on a SharedModel with the role policy and, where a KL is asked for, reference."""

    def __init__(self, config: GroupConfig, model: SharedModel, tokenizer: Any, rewards: Rewards) -> None:
        size, halve = config.group.micro_batch_size, config.run.halve_on_oom
        super().__init__(config.rollout, config.kl, model, tokenizer, rewards, size, halve, config.packing)
        self.config = config
        self.recipe = RECIPES[config.group.recipe]
        self.samples_per_prompt = config.group_size
        group = config.group
        once = group.epochs == 1 and group.minibatch_size == config.rollout.batch_size
        # A shortest length shifts probability that training leaves where it is; a KL in the reward and covariances are of the log-probs of
        # training.
        compared = group.recipe in COVARIANCE_KINDS or (config.kl.used and self.recipe.kl_placement == "reward")
        self.on_policy = once and self.same_policy and config.rollout.min_new_tokens == 0 and not compared
        self.bypass = self.recipe.sampled and not self.same_policy
        if self.bypass:
            self.correction = None  # the ratio has it
        elif config.rollout.correction is None and not self.same_policy:
            self.correction = self.recipe.correction or self.correction

    def advantages(self, e: Experience, greedy: Tensor | None = None) -> Tensor:
        """(B,) relative to the group, or (B, R) for returns; a completion without a score has none, and is no one's baseline.

        greedy: `greedy_scores` of the batch, for remax; where that is NaN the completions of the prompt have no advantage.
        """
        in_reward = self.recipe.kl_placement == "reward" and e.ref_logprobs is not None
        coef, estimator = self.controller.coef if in_reward else 0.0, self.config.kl.estimator or self.recipe.kl_kind
        if self.config.group.kind == "returns":
            ref = e.ref_logprobs if in_reward else None
            logprobs = e.logprobs if in_reward else None
            values = torch.zeros_like(e.logprobs)
            scores = e.scores if e.steps is None else e.steps.token_scores
            return advantages(
                scores, values, e.mask, logprobs=logprobs, ref_logprobs=ref, kl_coef=coef, kl_kind=estimator, lam=1.0
            ).advantages
        scores, real = e.scores, e.mask.any(1)
        if in_reward and e.ref_logprobs is not None:
            scores = scores - coef * (kl_estimate(e.logprobs, e.ref_logprobs, estimator) * e.mask).sum(1)
        groups = torch.arange(len(scores), device=scores.device) // self.samples_per_prompt
        lengths = e.mask.sum(1) if self.config.group.kind == "opo" else None
        if greedy is not None:
            greedy = greedy.repeat_interleave(self.samples_per_prompt)
            real, greedy = real & ~greedy.isnan(), greedy.nan_to_num(0.0)
        return group_advantages(
            scores, groups, self.config.group.kind, mask=real, lengths=lengths, greedy_scores=greedy
        )

    def shared_sizes(self) -> dict[str, int]:
        return {"group.minibatch_size": self.config.group.minibatch_size}

    def update(self, run: Run, e: Experience, generator: torch.Generator) -> dict[str, float]:
        """All epochs of minibatch updates on one experience; returns the metrics of the step."""
        group = self.config.group
        greedy = self.greedy_scores(e) if group.kind == "remax" else None
        each = self.advantages(e, greedy)
        means = Means(("tokens",))
        for _ in range(group.epochs):
            for minibatch in torch.randperm(len(e.mask), generator=generator).split(group.minibatch_size):
                selected = None
                if group.recipe in COVARIANCE_KINDS:
                    chosen = covariance_mask(
                        e.logprobs[minibatch],
                        each[minibatch],
                        e.mask[minibatch],
                        kind=group.recipe,
                        generator=generator,
                    )
                    selected = torch.zeros_like(e.mask)
                    selected[minibatch] = chosen
                counts = Denominators.of(e.mask[minibatch], horizon=self.settings.max_new_tokens)
                found = Means(("tokens", "loss", "policy_loss"))
                own = self.part(e, minibatch)
                backward = lambda part, rows=own, selected=selected, counts=counts: self._backward(
                    e, each, selected, rows[part], counts
                )
                for part in self.ranks.join(self.micro_batches.map(len(own), backward)):
                    found.add(part)
                found.values["grad_norm"] = run.update(found.values["loss"])
                means.add(found.values)
        signal = each.view(-1, self.samples_per_prompt, *each.shape[1:]).flatten(1).ne(0).any(1)
        metrics = {f"group/{name}": value for name, value in means.values.items() if name != "tokens"} | {
            "group/silent": float((~signal).float().mean()),
            **({} if greedy is None else {"group/greedy_score": float(greedy[~greedy.isnan()].mean())}),
            **self.metrics(e),
        }
        if "kl" in metrics:
            self.controller.update(metrics["kl"], int(e.mask.any(1).sum()))
        return metrics

    def _backward(
        self, e: Experience, each: Tensor, selected: Tensor | None, rows: Tensor, counts: Denominators
    ) -> dict[str, float]:
        """Gradient of one micro-batch; those of a minibatch add up to its one-shot gradient."""
        group, rollout = self.config.group, e.rollout
        part = self.rows(rollout, rows)
        stats = self.response_stats(part, part.forward(self.model, ("policy",), e.trunk_of(rows)).policy.hidden)
        in_loss = self.recipe.kl_placement != "reward" and e.ref_logprobs is not None
        old = rollout.logprobs if self.bypass and rollout.logprobs is not None else e.logprobs
        loss, found = policy_loss(
            group.recipe,
            part.spread(stats.logprobs),
            None if self.on_policy else old[rows],
            each[rows],
            e.mask[rows],
            ref_logprobs=e.ref_logprobs[rows] if in_loss else None,  # type: ignore[index]
            kl_coef=self.controller.coef if in_loss else 0.0,
            kl_kind=self.config.kl.estimator,
            clip=group.clip,
            dual_clip=group.dual_clip,
            ratio_cap=group.ratio_cap,
            entropy=part.spread(stats.entropy) if group.entropy_coef else None,
            entropy_coef=group.entropy_coef,
            importance_weights=e.weights_of(rows),
            # Of a recipe with a correction of its own: that is in the weights already.
            rollout_logprobs=e.logprobs[rows] if self.recipe.correction else None,
            selected=None if selected is None else selected[rows],
            denominators=None if self.recipe.local else counts,
        )
        loss.backward()
        return {**found.floats(), "loss": float(loss.detach())}


def train_group(config: GroupConfig, *, observe: Callable[[list[str]], Mapping[str, float]] | None = None) -> Path:
    """Run it; returns the folder of the trained policy adapter (PEFT format, relative to the base with its folds).

    observe: metrics of each batch of completions, to be logged.
    Raises ConfigError, DataError, RewardError, TrainingError.
    """
    roles = ("policy", "reference") if config.kl.used else ("policy",)
    return train_online("grpo", config, Trainer, roles, {"policy": config.optim.lr}, observe=observe)
