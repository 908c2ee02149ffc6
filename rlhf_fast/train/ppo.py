"""PPO with policy, reference, value and reward on one base (Schulman et al. 2017; Ziegler et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import Advantages, advantages, ppo_loss
from rlhf_fast.config import PPOConfig
from rlhf_fast.dialects import DIALECTS
from rlhf_fast.model import SharedModel
from rlhf_fast.reference.advantages import with_slot_after
from rlhf_fast.train.loop import Run
from rlhf_fast.train.online import Experience, Means, Sampler, explained_variance, train_online
from rlhf_fast.train.rewards import Rewards
from rlhf_fast.train.scoring import head_ppo_loss

OF_UPDATES = ("tokens", "ratio_clamped")
"""Statistics that add up over updates."""
OF_MICRO_BATCHES = (*OF_UPDATES, "loss", "policy_loss", "value_loss")
"""And over the micro-batches of one update, whose losses carry the denominator of all of it."""


class Trainer(Sampler):
    """The steps of PPO on a SharedModel with the roles policy, reference, value and, if scores are learned, reward."""

    def __init__(self, config: PPOConfig, model: SharedModel, tokenizer: Any, rewards: Rewards) -> None:
        size, halve = config.ppo.micro_batch_size, config.run.halve_on_oom
        # A scan without a mask reads the values of the pads, which a packed pass has not.
        packed = False if DIALECTS[config.ppo.dialect].gap == "read" else config.packing
        super().__init__(config.rollout, config.kl, model, tokenizer, rewards, size, halve, packed)
        self.config = config

    def shared_sizes(self) -> dict[str, int]:
        return {"ppo.minibatch_size": self.config.ppo.minibatch_size}

    def update(self, run: Run, e: Experience, generator: torch.Generator) -> dict[str, float]:
        """All epochs of minibatch updates on one experience; returns the metrics of the step."""
        ppo, rules = self.config.ppo, DIALECTS[self.config.ppo.dialect]
        assert e.values is not None  # the model has the value role
        targets = advantages(
            e.scores if e.steps is None else e.steps.token_scores,
            e.values,
            e.mask,
            logprobs=e.logprobs,
            ref_logprobs=e.ref_logprobs,
            kl_coef=self.controller.coef,
            kl_kind=self.config.kl.estimator,
            gamma=ppo.gamma,
            lam=ppo.lam,
            whiten=ppo.whiten,
            dialect=ppo.dialect,
            bootstrap=e.next_values if rules.bootstrap else None,
            truncated=~e.rollout.finished,
        )
        valued = with_slot_after(e.mask, None) if rules.score_slot == "after_last" else e.mask
        means = Means(OF_UPDATES)
        first: dict[str, float] = {}
        updates = 0
        for _ in range(ppo.epochs):
            order = torch.randperm(len(e.mask), generator=generator)
            stop = False
            for minibatch in order.split(ppo.minibatch_size):
                counts = int(e.mask[minibatch].sum()), int(valued[minibatch].sum())
                found = Means(OF_MICRO_BATCHES)
                own = self.part(e, minibatch)
                backward = lambda part, rows=own, counts=counts: self._backward(e, targets, valued, rows[part], counts)
                for part in self.ranks.join(self.micro_batches.map(len(own), backward)):
                    found.add(part)
                found.values["grad_norm"] = run.update(found.values["loss"])
                updates += 1
                first = first or dict(found.values)
                means.add(found.values)
                if ppo.target_kl is not None and found.values["approx_kl"] > ppo.target_kl:
                    stop = True
                    break
            if stop:
                break
        metrics = {f"ppo/{name}": value for name, value in means.values.items() if name != "tokens"} | {
            "ppo/updates": float(updates),
            "ppo/first_ratio_error": max(abs(first["ratio_max"] - 1), abs(first["ratio_min"] - 1)),
            "ppo/explained_variance": explained_variance(e.values, targets.returns, e.mask),
            "reward": float((targets.rewards.sum(1)).mean()),
            **self.metrics(e),
        }
        self.controller.update(metrics["kl"], int(e.mask.any(1).sum()))
        return metrics

    def _backward(
        self, e: Experience, targets: Advantages, valued: Tensor, rows: Tensor, counts: tuple[int, int]
    ) -> dict[str, float]:
        """Gradient of one micro-batch, weighted so that a minibatch adds up to its one-shot gradient.

        valued: like e.mask, the slots whose value is trained. counts: of tokens and of those slots in the minibatch.
        Policy and value run one after the other: the activations of one role are gone before those of the other come.
        """
        ppo, rollout, (tokens, slots) = self.config.ppo, e.rollout, counts
        assert e.values is not None
        part = self.rows(rollout, rows)
        trunk = e.trunk_of(rows)
        hidden = part.forward(self.model, ("policy",), trunk).policy.hidden
        weights = e.weights_of(rows)
        policy = head_ppo_loss(
            self.model,
            part.logprob_states(hidden),
            part.tokens(part.responses),
            part.tokens(e.logprobs[rows]),
            part.tokens(targets.advantages[rows]),
            part.tokens(e.mask[rows]),
            temperature=self.config.rollout.temperature,
            clip=ppo.clip,
            dual_clip=ppo.dual_clip,
            entropy_coef=ppo.entropy_coef,
            importance_weights=None if weights is None else part.tokens(weights),
            normalizer=max(tokens, 1),
            dialect=ppo.dialect,
        )
        policy.loss.backward()
        del hidden
        values = part.values(part.forward(self.model, ("value",), trunk).value.values)
        old_logprobs = e.logprobs[rows]
        value = ppo_loss(
            old_logprobs,
            old_logprobs,
            torch.zeros_like(old_logprobs),
            valued[rows],
            values=values[:, :-1],
            old_values=e.values[rows],
            returns=targets.returns[rows],
            value_clip=ppo.value_clip,
            value_coef=ppo.value_coef,
            normalizer=max(slots, 1),
            dialect=ppo.dialect,
        )
        value.loss.backward()
        found = policy.stats.floats()
        of_value = value.stats.floats()
        found |= {name: of_value[name] for name in ("value_loss", "value_clip_fraction", "explained_variance")}
        return {**found, "loss": float(policy.loss.detach() + value.loss.detach())}


def train_ppo(config: PPOConfig, *, observe: Callable[[list[str]], Mapping[str, float]] | None = None) -> Path:
    """Run it; returns the folder of the trained policy adapter (PEFT format, relative to the base with its folds).

    observe: metrics of each batch of completions, to be logged (judges to watch, for instance).
    Raises ConfigError, DataError, RewardError, TrainingError.
    """
    rates = {"policy": config.optim.lr, "value": config.value_lr or config.optim.lr}
    return train_online("ppo", config, Trainer, ("policy", "reference", "value"), rates, observe=observe)
