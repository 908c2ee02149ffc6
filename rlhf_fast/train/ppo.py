"""PPO with policy, reference, value and reward on one base (Schulman et al. 2017; Ziegler et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import Advantages, advantages, ppo_loss
from rlhf_fast.batch import Shuffle, pad
from rlhf_fast.config import PPOConfig
from rlhf_fast.dialects import DIALECTS
from rlhf_fast.model import SharedModel
from rlhf_fast.reference.advantages import with_slot_after
from rlhf_fast.rollout import Rollout, generate
from rlhf_fast.train.loop import Run, State, load_data, load_model, load_tokenizer
from rlhf_fast.train.rewards import KLController, Rewards, apply_missing_eos
from rlhf_fast.train.scoring import head_logprobs, head_ppo_loss

OF_UPDATES = ("tokens", "ratio_clamped")
"""Statistics that add up over updates."""
OF_MICRO_BATCHES = (*OF_UPDATES, "loss", "policy_loss", "value_loss")
"""And over the micro-batches of one update, whose losses carry the denominator of all of it."""


@dataclass
class Experience:
    """One rollout batch, scored: what the update reads. (B, R) unless said otherwise."""

    rollout: Rollout
    trunk: Tensor | None
    """(B, P + R, H) output of the shared layers, reused in every epoch."""
    mask: Tensor
    """Response tokens that count: sampled, and of a completion that was scored."""
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    next_values: Tensor
    """(B,) value of the state after the last slot."""
    scores: Tensor
    """(B,) what PPO maximises, before the KL penalty; 0 where unscorable."""
    raw_scores: Tensor
    """(B,) as the sources gave them."""
    entropy: Tensor

    def kl_per_sequence(self) -> Tensor:
        """(B,) k1 estimate of KL(policy || reference) in nats, summed over the completion."""
        return ((self.logprobs - self.ref_logprobs) * self.mask).sum(1)


class Trainer:
    """The steps of PPO on a SharedModel with the roles policy, reference, value and, if scores are learned, reward."""

    def __init__(self, config: PPOConfig, model: SharedModel, tokenizer: Any, rewards: Rewards) -> None:
        self.config, self.model, self.tokenizer, self.rewards = config, model, tokenizer, rewards
        self.controller = KLController(config.kl)

    def rollout(self, prompts: list[list[int]], generator: torch.Generator) -> Rollout:
        """Sample one completion per prompt from the policy."""
        r = self.config.rollout
        ids, mask = pad(prompts, left=True)
        return generate(
            self.model,
            ids,
            mask,
            max_new_tokens=r.max_new_tokens,
            min_new_tokens=r.min_new_tokens,
            temperature=r.temperature,
            eos_token_id=self.tokenizer.eos_token_id if r.stop_at_eos else None,
            generator=generator,
        )

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Experience:
        """Log-probs of policy and reference, values and scores, from one pass of the base per micro-batch."""
        roles = [role for role in ("policy", "reference", "value", "reward") if role in self.model.roles]
        parts: dict[str, list[Tensor]] = {}
        size = self.config.ppo.micro_batch_size
        for i in range(0, len(rollout.input_ids), size):
            rows = slice(i, i + size)
            ids, mask = rollout.input_ids[rows], rollout.attention_mask[rows]
            trunk = self.model.trunk(ids, mask) if self.model.shared_layers else None
            out = self.model(ids, mask, roles=roles, trunk=trunk)
            policy, reference = (self._response_stats(rollout, rows, out[r].hidden) for r in ("policy", "reference"))
            found = {
                "logprobs": policy.logprobs,
                "entropy": policy.entropy,
                "ref_logprobs": reference.logprobs,
                "values": out.value.values[:, rollout.prompt_length - 1 : -1],
                "next_values": out.value.values[:, -1],
            }
            if trunk is not None:
                found["trunk"] = trunk
            if "reward" in out:
                found["role_scores"] = out.reward.scores
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        joined = {name: torch.cat(values) for name, values in parts.items()}
        role_scores = joined.pop("role_scores", None)
        prompts, completions = self.prompt_texts(rollout), rollout.texts(self.tokenizer)
        scores, raw = self.rewards(prompts, completions, role_scores)
        scores = apply_missing_eos(scores, rollout.finished, self.config.rollout)
        scored = ~scores.isnan()
        return Experience(
            rollout=rollout,
            trunk=joined.pop("trunk", None),
            mask=rollout.response_mask & scored[:, None],
            scores=scores.nan_to_num(0.0),
            raw_scores=raw,
            **joined,
        )

    def _response_stats(self, rollout: Rollout, rows: slice | Tensor, hidden: Tensor) -> Any:
        start = rollout.prompt_length - 1  # the state before the first response token predicts it
        responses, mask = rollout.responses[rows], rollout.response_mask[rows]
        return head_logprobs(self.model, hidden[:, start:-1], responses, mask, self.config.rollout.temperature)

    def update(self, run: Run, e: Experience, generator: torch.Generator) -> dict[str, float]:
        """All epochs of minibatch updates on one experience; returns the metrics of the step."""
        ppo, rules = self.config.ppo, DIALECTS[self.config.ppo.dialect]
        targets = advantages(
            e.scores,
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
        means = _Means(OF_UPDATES)
        first: dict[str, float] = {}
        updates = 0
        for _ in range(ppo.epochs):
            order = torch.randperm(len(e.mask), generator=generator)
            stop = False
            for minibatch in order.split(ppo.minibatch_size):
                counts = int(e.mask[minibatch].sum()), int(valued[minibatch].sum())
                found = _Means(OF_MICRO_BATCHES)
                for rows in minibatch.split(ppo.micro_batch_size):
                    found.add(self._backward(e, targets, valued, rows, counts))
                found.values["grad_norm"] = run.update()
                updates += 1
                first = first or dict(found.values)
                means.add(found.values)
                if ppo.target_kl is not None and found.values["approx_kl"] > ppo.target_kl:
                    stop = True
                    break
            if stop:
                break
        kl = float(e.kl_per_sequence().mean())
        metrics = {f"ppo/{name}": value for name, value in means.values.items() if name != "tokens"} | {
            "ppo/updates": float(updates),
            "ppo/first_ratio_error": max(abs(first["ratio_max"] - 1), abs(first["ratio_min"] - 1)),
            "ppo/explained_variance": explained_variance(e.values, targets.returns, e.mask),
            "kl": kl,
            "kl_coef": self.controller.coef,
            "score": float(e.raw_scores[~e.raw_scores.isnan()].mean()),
            "reward": float((targets.rewards.sum(1)).mean()),
            "entropy": float(e.entropy.sum() / e.rollout.response_mask.sum()),
            "length": float(e.rollout.response_mask.sum(1).float().mean()),
            "finished": float(e.rollout.finished.float().mean()),
            "unscorable": float(e.raw_scores.isnan().sum()),
        }
        self.controller.update(kl, len(e.mask))
        return metrics

    def summary(self, e: Experience) -> tuple[int, str]:
        """(tokens, text) for the progress bar."""
        score = float(e.raw_scores[~e.raw_scores.isnan()].mean())
        text = f"score {score:+.3f} kl {float(e.kl_per_sequence().mean()):.2f}"
        return int(e.rollout.attention_mask.sum()), text

    def sample_rows(self, e: Experience, rows: int = 4) -> list[dict[str, Any]]:
        """The first completions of a batch, for the table of samples."""
        prompts, completions = self.prompt_texts(e.rollout), e.rollout.texts(self.tokenizer)
        table = zip(prompts[:rows], completions[:rows], e.raw_scores[:rows].tolist(), strict=True)
        return [{"prompt": p, "completion": c, "reward": r} for p, c, r in table]

    def prompt_texts(self, rollout: Rollout) -> list[str]:
        """Prompts as text, without special tokens."""
        P = rollout.prompt_length
        rows = zip(rollout.input_ids[:, :P], rollout.attention_mask[:, :P], strict=True)
        return self.tokenizer.batch_decode([row[m].tolist() for row, m in rows], skip_special_tokens=True)

    def _backward(
        self, e: Experience, targets: Advantages, valued: Tensor, rows: Tensor, counts: tuple[int, int]
    ) -> dict[str, float]:
        """Gradient of one micro-batch, weighted so that a minibatch adds up to its one-shot gradient.

        valued: like e.mask, the slots whose value is trained. counts: of tokens and of those slots in the minibatch.
        Policy and value run one after the other: the activations of one role are gone before those of the other come.
        """
        ppo, rollout, (tokens, slots) = self.config.ppo, e.rollout, counts
        ids, attention = rollout.input_ids[rows], rollout.attention_mask[rows]
        trunk = None if e.trunk is None else e.trunk[rows]
        mask, old_logprobs = e.mask[rows], e.logprobs[rows]
        hidden = self.model(ids, attention, roles=("policy",), trunk=trunk).policy.hidden
        policy = head_ppo_loss(
            self.model,
            hidden[:, rollout.prompt_length - 1 : -1],
            rollout.responses[rows],
            old_logprobs,
            targets.advantages[rows],
            mask,
            temperature=self.config.rollout.temperature,
            clip=ppo.clip,
            dual_clip=ppo.dual_clip,
            entropy_coef=ppo.entropy_coef,
            normalizer=max(tokens, 1),
            dialect=ppo.dialect,
        )
        policy.loss.backward()
        del hidden
        values = self.model(ids, attention, roles=("value",), trunk=trunk).value.values
        value = ppo_loss(
            old_logprobs,
            old_logprobs,
            torch.zeros_like(old_logprobs),
            valued[rows],
            values=values[:, rollout.prompt_length - 1 : -1],
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


class _Means:
    """Statistics of several parts: means weighted by the tokens behind each, but for sums and extremes."""

    def __init__(self, sums: tuple[str, ...]) -> None:
        self.sums = sums
        self.values: dict[str, float] = {}

    def add(self, part: dict[str, float]) -> None:
        before = self.values.get("tokens", 0.0)
        total = before + part["tokens"]
        for name, value in part.items():
            if name not in self.values:
                self.values[name] = value
            elif name in self.sums:
                self.values[name] += value
            elif name in ("ratio_max", "ratio_min"):
                self.values[name] = (max if name == "ratio_max" else min)(self.values[name], value)
            elif total:
                self.values[name] = (before * self.values[name] + part["tokens"] * value) / total


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 for a perfect critic, 0 when returns do not vary."""
    v, r = values[mask].double(), returns[mask].double()
    variance = r.var(correction=0) if r.numel() else r.new_zeros(())
    return float(1 - (r - v).var(correction=0) / variance) if variance > 0 else 0.0


def train_ppo(config: PPOConfig, *, observe: Callable[[list[str]], Mapping[str, float]] | None = None) -> Path:
    """Run it; returns the folder of the trained policy adapter (PEFT format, relative to the base with its folds).

    observe: metrics of each batch of completions, to be logged (judges to watch, for instance).
    Raises ConfigError, DataError, RewardError, TrainingError.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    tokenizer: Any = load_tokenizer(config.model.path)
    encoded, fingerprint = load_data(config.data, tokenizer)
    prompts = [prompt.input_ids for prompt in encoded]
    rewards = Rewards(config.reward)
    roles: tuple[str, ...] = ("policy", "reference", "value")
    adapters = {}
    if rewards.adapter is not None:
        roles, adapters = (*roles, "reward"), {"reward": rewards.adapter}
    model = load_model(config.model, roles, config.run.seed, adapters)
    if rewards.adapter is not None:
        model.copy_role("reward", "value")  # the critic starts from what the reward model knows; its head starts at 0
    trainer = Trainer(config, model, tokenizer, rewards)
    shuffle = Shuffle(len(prompts), config.run.seed)
    size = config.rollout.batch_size

    def draw(step: int) -> tuple[list[list[int]], torch.Generator]:
        # Every random draw of a step follows from the seed and the step, so a resumed run repeats it.
        generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + step)
        return [prompts[i] for i in shuffle.batch(step, size)], generator

    rates = {"policy": config.optim.lr, "value": config.value_lr or config.optim.lr}
    state: State = {"kl_coef": (trainer.controller.get, trainer.controller.put), "rewards": (rewards.get, rewards.put)}
    identity = {"data": fingerprint}
    with Run("ppo", config, model, rates, config.steps, identity, state) as run:
        if config.reward.normalize == "reference" and run.start == 0:
            # Before step 1 the policy is the reference; a step number of its own keeps its draws apart from training.
            rewards.observe(trainer.score(trainer.rollout(*draw(config.steps))).raw_scores)
        for step in run.steps():
            batch, generator = draw(step)
            experience = trainer.score(trainer.rollout(batch, generator))
            metrics = trainer.update(run, experience, generator)
            if observe is not None:
                metrics |= observe(experience.rollout.texts(tokenizer))
            run.log(step, metrics, *trainer.summary(experience))
            if run.settings.sample_every and step % run.settings.sample_every == 0:
                run.monitor.samples(step + 1, trainer.sample_rows(experience))
        model.save_adapter("policy", run.folder / "adapter")
        model.save_adapter("value", run.folder / "value")
        return run.folder / "adapter"
