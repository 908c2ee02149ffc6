"""What the trainers that learn from their own samples share: sampling, and one scoring pass over what was sampled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import TokenStats, _allocator, _buffers, kl_estimate
from rlhf_fast.batch import Shuffle, pad
from rlhf_fast.config import KLConfig, RolloutConfig
from rlhf_fast.corrections import RolloutCorrection, rollout_correction
from rlhf_fast.data import PromptRecord
from rlhf_fast.model import SharedModel
from rlhf_fast.rewards import split_steps, step_ends
from rlhf_fast.rollout import Request, Rollout, sample
from rlhf_fast.train.loop import Run, State, device_of, load_data, load_model, load_tokenizer
from rlhf_fast.train.micro_batches import MicroBatches, fitting
from rlhf_fast.train.pipeline import Pipeline, engine_of
from rlhf_fast.train.ranks import Ranks
from rlhf_fast.train.rewards import KLController, Rewards, apply_missing_eos
from rlhf_fast.train.rows import Rows, packs_well
from rlhf_fast.train.scoring import head_logprobs


class StepScores(NamedTuple):
    """Scores of the steps of completions, at the tokens where they end."""

    token_scores: Tensor
    """(B, R), 0 elsewhere and where unscorable."""
    counts: Tensor
    """(B,) steps."""


@dataclass
class Experience:
    """One rollout batch of all ranks, scored: what the update reads, on the model's device. (B, R) unless said otherwise."""

    rollout: Rollout
    trunk: list[Tensor] | None
    """Outputs of the shared layers for each row that this rank sampled, reused in every epoch."""
    mask: Tensor
    """Response tokens that count: sampled, and of a completion that was scored."""
    logprobs: Tensor
    ref_logprobs: Tensor | None
    """None without the reference role."""
    values: Tensor | None
    """None without the value role."""
    next_values: Tensor | None
    """(B,) value of the state after the last token."""
    scores: Tensor
    """(B,) what PPO maximises, before the KL penalty; 0 where unscorable."""
    raw_scores: Tensor
    """(B,) as the sources gave them; with steps the sum of theirs."""
    entropy: Tensor
    start: int = 0
    """Row of the batch that trunk begins with."""
    steps: StepScores | None = None
    """What `scores` is the sum of, where steps are scored."""
    correction: RolloutCorrection | None = None
    """Importance weights (B, R) of `logprobs` over those that sampled, and what they say of both policies."""

    def weights_of(self, rows: Tensor) -> Tensor | None:
        return None if self.correction is None else self.correction.weights[rows]

    def trunk_of(self, rows: Tensor) -> list[Tensor] | None:
        """Of rows that this rank sampled."""
        return None if self.trunk is None else [self.trunk[i] for i in (rows - self.start).tolist()]

    def kl_per_sequence(self) -> Tensor:
        """(B,) k1 estimate of KL(policy || reference) in nats, summed over the completion; 0 without a reference."""
        if self.ref_logprobs is None:
            return torch.zeros_like(self.scores)
        return ((self.logprobs - self.ref_logprobs) * self.mask).sum(1)

    def mean_kl(self) -> float:
        """Over the completions that count; 0 if none does."""
        counted = self.mask.any(1)
        return float(self.kl_per_sequence()[counted].mean()) if counted.any() else 0.0

    def mismatch(self) -> dict[str, float]:
        """How far the log-probs of who sampled are from those of training, over the sampled tokens in nats: mean and largest absolute
        difference, and the k3 estimate of KL(sampler || policy). Nothing where both are the same numbers.

        A shortest length makes them two distributions: the sampler's is without end-of-sequence there.
        """
        there, mask = self.rollout.logprobs, self.rollout.response_mask
        if there is None or there is self.logprobs or not mask.any():
            return {}
        off = (self.logprobs - there)[mask].abs()
        kl = kl_estimate(there, self.logprobs, "k3", mask=mask)[mask]
        return {"mismatch/mean": float(off.mean()), "mismatch/max": float(off.max()), "mismatch/kl": float(kl.mean())}


class Sampler(ABC):
    """Samples completions from the policy of a SharedModel, scores them with all of its roles in one pass, and learns from them.

    micro_batch_size: completions per pass; halve: smaller ones may be tried when memory runs out in an update. packed: whether
    passes have no padding; None = where that is exact and no slower.
    """

    samples_per_prompt = 1
    """Completions of one prompt, which lie side by side in a batch."""
    on_policy = False
    """Whether a batch is learned from in one update, so that no one compares with the log-probs from before it."""

    def __init__(
        self,
        settings: RolloutConfig,
        kl: KLConfig,
        model: SharedModel,
        tokenizer: Any,
        rewards: Rewards,
        micro_batch_size: int,
        halve: bool,
        packed: bool | None,
    ) -> None:
        self.settings, self.model, self.tokenizer, self.rewards = settings, model, tokenizer, rewards
        self.controller, self.micro_batch_size = KLController(kl), micro_batch_size
        self.packed = packs_well(model) if packed is None else packed
        device = model.backbone.device.type
        self.same_policy = settings.same_policy(device)
        self.correction = settings.weighted(device)
        """Kind of the importance weights of what another policy sampled, None for none."""
        self.separator = rewards.config.separator
        """Between the steps of a completion that are scored each; None = completions are."""
        self.micro_batches = MicroBatches(micro_batch_size, halve=halve, clear=model.zero_grad)
        self.limited = False
        """Whether memory is short: scoring takes as many rows as an update."""
        self.ranks = Ranks()
        """Those that share the work; train_online sets it."""

    def limit(self, rows: int) -> None:
        """Take at most so many rows in a pass: what the plan of the run has found room for."""
        self.limited, self.micro_batches.size = True, min(self.micro_batches.size, rows)

    def state(self) -> State:
        """What the trainer keeps between batches, for a checkpoint."""
        return {
            "kl_coef": (self.controller.get, self.controller.put),
            "micro_batch_size": (self.micro_batches.get, self.micro_batches.put),
        }

    @abstractmethod
    def update(self, run: Run, e: Experience, generator: torch.Generator) -> dict[str, float]:
        """Learn from one batch; returns the metrics of the step."""

    def request(self, prompts: list[list[int]], generator: torch.Generator) -> Request:
        """What `samples_per_prompt` completions of each prompt are asked with, for all ranks together."""
        r, n = self.settings, self.samples_per_prompt
        return Request(
            prompts,
            n,
            # One seed a completion, drawn for those of all ranks: which rank samples it makes no difference.
            torch.randint(2**63 - 1, (len(prompts) * n,), generator=generator),
            r.max_new_tokens,
            r.min_new_tokens,
            r.temperature,
            self.tokenizer.eos_token_id if r.stop_at_eos else None,
        )

    def record(self, run: Run, step: int, e: Experience, records: Sequence[PromptRecord]) -> None:  # noqa: B027  most write nothing
        """What a trainer writes of a batch beside its metrics. records: of the prompts."""

    def rollout(self, prompts: list[list[int]], generator: torch.Generator) -> Rollout:
        """Sample `samples_per_prompt` completions of each prompt from the policy: those of all ranks, each of which samples its own."""
        request, found = self.request(prompts, generator), None
        own = self.sampled_here(len(request.seeds))
        if own.start < own.stop:
            _allocator.trim()
            with self.ranks.whole():
                found = sample(self.model, request.part(own))
        return self.gathered(request, found)

    def gathered(self, request: Request, found: Rollout | None) -> Rollout:
        """The rollout of all ranks, on the model's device. found: that of this rank's part of the request, None where it has none."""
        device = self.model.backbone.device
        found = None if found is None else found.to(device)
        if self.ranks.world == 1 and found is not None:
            return found
        names = ("responses", "response_mask", "finished", "logprobs", "entropy")
        known = {} if found is None else {name: getattr(found, name) for name in names}
        every = self.ranks.rows({name: x for name, x in known.items() if x is not None})
        prompts = pad(request.prompts, left=True, device=device)
        ids, mask = (x.repeat_interleave(request.num_samples, 0) for x in prompts)
        every["input_ids"] = torch.cat([ids, every.pop("responses")], 1)
        return Rollout(attention_mask=torch.cat([mask, every["response_mask"]], 1), **every)

    @abstractmethod
    def shared_sizes(self) -> dict[str, int]:
        """Setting -> rows of an update that the ranks share."""

    def sampled_here(self, rows: int) -> slice:
        """Rows of a batch that this rank samples and scores: the completions of a prompt stay together."""
        n, own = self.samples_per_prompt, self.ranks.share(rows // self.samples_per_prompt)
        return slice(own.start * n, own.stop * n)

    def part(self, e: Experience, minibatch: Tensor) -> Tensor:
        """Rows (b,) of a minibatch that this rank learns from: an equal share, or those that it sampled where it keeps their trunk.

        (b, 2) are pairs of rows of one prompt.
        """
        if not self.model.shared_layers:
            return minibatch[self.ranks.share(len(minibatch))]
        own = self.sampled_here(len(e.mask))
        first = minibatch if minibatch.dim() == 1 else minibatch[:, 0]
        return minibatch[(first >= own.start) & (first < own.stop)]

    def idle(self, e: Experience) -> Tensor | None:
        """0 with a gradient of 0 from a pass of the policy over any row, for the ranks that wait for their part of its layers; None
        where none of them does."""
        if not self.ranks.passes(1, 1):
            return None
        return 0 * self.rows(e.rollout, slice(0, 1)).forward(self.model, ("policy",), None).policy.hidden.sum()

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Experience:
        """Log-probs of policy and reference, values and scores, from one pass of the base per micro-batch for all that is not known."""
        known: dict[str, Tensor] = {}
        reused = self.on_policy or self.settings.old_logprobs == "sampled"
        if reused and rollout.logprobs is not None and rollout.entropy is not None:
            known = {"logprobs": rollout.logprobs, "entropy": rollout.entropy}
        asked = ("reference", "value", "reward") if known else ("policy", "reference", "value", "reward")
        roles = [role for role in asked if role in self.model.roles]
        parts: dict[str, list[Tensor]] = {}
        size = self.micro_batches.size if self.limited else self.micro_batch_size
        _buffers.release()  # the packed weights of the rollout, as large as the model, which no pass of training needs
        trunks: list[Tensor] = []
        own = self.sampled_here(len(rollout.input_ids))
        for i in range(own.start, own.stop if roles else own.start, size):
            rows = self.rows(rollout, slice(i, min(i + size, own.stop)))
            trunk = rows.trunk_of(self.model)
            trunks += trunk or []
            out = rows.forward(self.model, roles, trunk)
            found: dict[str, Tensor] = {}
            if "policy" in out:
                policy = self.response_stats(rows, out.policy.hidden)
                found |= {"logprobs": rows.spread(policy.logprobs), "entropy": rows.spread(policy.entropy)}
            if "reference" in out:
                found["ref_logprobs"] = rows.spread(self.response_stats(rows, out.reference.hidden).logprobs)
            if "value" in out:
                values = rows.values(out.value.values)
                after = values.gather(1, rows.mask.sum(1, keepdim=True)).squeeze(1)
                found |= {"values": values[:, :-1], "next_values": after}
            if "reward" in out and self.separator is not None:
                found["role_scores"] = rows.values(out.reward.token_scores)[:, 1:]  # of the state after each token
            elif "reward" in out:
                found["role_scores"] = out.reward.scores
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
        joined = known | (self.ranks.rows({name: torch.cat(values) for name, values in parts.items()}) if roles else {})
        role_scores = joined.pop("role_scores", None)
        scores, raw, steps = self._scores(rollout, role_scores)
        scored = ~scores.isnan()
        mask, correction = rollout.response_mask & scored[:, None], None
        if self.correction is not None:
            # Decoupled PPO (Hilton et al. 2021, arXiv 2110.00641, eq. 3): who sampled and who bounds the update are two policies.
            assert rollout.logprobs is not None
            correction = rollout_correction(joined["logprobs"], rollout.logprobs, mask, kind=self.correction)
        return Experience(
            rollout=rollout,
            trunk=trunks or None,
            start=own.start,
            mask=mask,
            scores=scores.nan_to_num(0.0),
            raw_scores=raw,
            steps=steps,
            logprobs=joined["logprobs"],
            entropy=joined["entropy"],
            ref_logprobs=joined.get("ref_logprobs"),
            values=joined.get("values"),
            next_values=joined.get("next_values"),
            correction=correction,
        )

    @torch.no_grad()
    def greedy_scores(self, e: Experience) -> Tensor:
        """(prompts,) scores of the most likely completion of each prompt of a batch under the policy, NaN where unscorable.

        They are shifted and scaled like the scores of the batch, whose moments they leave alone.
        """
        first = slice(None, None, self.samples_per_prompt)
        ids, real = (x[first, : e.rollout.prompt_length].cpu() for x in (e.rollout.input_ids, e.rollout.attention_mask))
        prompts = [row[mask].tolist() for row, mask in zip(ids, real, strict=True)]
        unused = torch.zeros(len(prompts), dtype=torch.int64)
        request = replace(self.request(prompts, torch.Generator()), num_samples=1, temperature=0.0, seeds=unused)
        own, found = self.ranks.share(len(prompts)), None
        if own.start < own.stop:
            with self.ranks.whole():
                found = sample(self.model, request.part(own))
        rollout, of_role = self.gathered(request, found), None
        _buffers.release()
        if "reward" in self.model.roles:
            parts = []
            for i in range(own.start, own.stop, self.micro_batch_size):
                rows = self.rows(rollout, slice(i, min(i + self.micro_batch_size, own.stop)))
                parts.append(rows.forward(self.model, ("reward",), rows.trunk_of(self.model)).reward.scores)
            of_role = self.ranks.rows({"role_scores": torch.cat(parts)} if parts else {})["role_scores"]
        return self._scores(rollout, of_role, observe=False)[0]

    def _scores(
        self, rollout: Rollout, role_scores: Tensor | None, observe: bool = True
    ) -> tuple[Tensor, Tensor, StepScores | None]:
        """((B,) scores, NaN where unscorable, (B,) raw scores, those of steps).

        role_scores: of the reward role, (B,) or (B, R). observe: as in Rewards.
        """
        prompts, texts, device = self.prompt_texts(rollout), rollout.texts(self.tokenizer), rollout.input_ids.device
        finished = rollout.finished.cpu()  # scores are numbers of the host
        if self.separator is None:
            scores, raw = self.rewards(prompts, texts, role_scores, observe)
            return apply_missing_eos(scores, finished, self.settings).to(device), raw.to(device), None
        decode = lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True)
        pieces = [split_steps(text, self.separator) for text in texts]
        pairs = zip(rollout.responses.cpu(), rollout.response_mask.cpu(), strict=True)
        ids = [row[mask].tolist() for row, mask in pairs]
        counts = torch.tensor([len(steps) for steps in pieces])
        row = torch.arange(len(pieces)).repeat_interleave(counts)
        slot = torch.tensor(
            [end for own, steps in zip(ids, pieces, strict=True) for end in step_ends(own, steps, decode)]
        )
        of_steps, raw_steps = self.rewards(
            prompts, pieces, None if role_scores is None else role_scores.cpu()[row, slot], observe
        )
        last = counts.cumsum(0) - 1
        ended = apply_missing_eos(of_steps[last], finished, self.settings)
        of_steps = of_steps.index_put((last,), ended)
        zeros = torch.zeros(rollout.response_mask.shape)
        tokens = zeros.index_put((row, slot), of_steps.nan_to_num(0.0), accumulate=True)
        total = lambda x: x.new_zeros(len(pieces)).index_add(0, row, x).to(device)
        return total(of_steps), total(raw_steps), StepScores(tokens.to(device), counts)

    def rows(self, rollout: Rollout, rows: slice | Tensor) -> Rows:
        """Some rows as the model takes them."""
        return Rows(rollout, rows, self.packed)

    def response_stats(self, rows: Rows, hidden: Tensor) -> TokenStats:
        """Log-probs and entropy of the response tokens under the head on the hidden states of a pass, as `Rows.tokens` has them."""
        states, mask = rows.logprob_states(hidden), rows.tokens(rows.mask)
        return head_logprobs(self.model, states, rows.tokens(rows.responses), mask, self.settings.temperature)

    def metrics(self, e: Experience) -> dict[str, float]:
        """What a batch of completions says of the policy."""
        kl = {} if e.ref_logprobs is None else {"kl": e.mean_kl(), "kl_coef": self.controller.coef}
        weights = {} if e.correction is None else e.correction.stats.floats()
        steps = {} if e.steps is None else {"steps": float(e.steps.counts.float().mean())}
        return {
            **kl,
            **e.mismatch(),
            **steps,
            **{f"correction/{name}": value for name, value in weights.items() if name != "tokens"},
            "score": float(e.raw_scores[~e.raw_scores.isnan()].mean()),
            "entropy": float(e.entropy.sum() / e.rollout.response_mask.sum()),
            "length": float(e.rollout.response_mask.sum(1).float().mean()),
            "finished": float(e.rollout.finished.float().mean()),
            "unscorable": float(e.raw_scores.isnan().sum()),
            **{f"reward/{kind}": count for kind, count in self.rewards.failures().items()},
        }

    def summary(self, e: Experience) -> tuple[int, str]:
        """(tokens, text) for the progress bar."""
        score = float(e.raw_scores[~e.raw_scores.isnan()].mean())
        kl = "" if e.ref_logprobs is None else f" kl {e.mean_kl():.2f}"
        return int(e.rollout.attention_mask.sum()), f"score {score:+.3f}{kl}"

    def sample_rows(self, e: Experience, rows: int = 4) -> list[dict[str, Any]]:
        """The first completions of a batch, for the table of samples."""
        prompts, completions = self.prompt_texts(e.rollout), e.rollout.texts(self.tokenizer)
        table = zip(prompts[:rows], completions[:rows], e.raw_scores[:rows].tolist(), strict=True)
        return [{"prompt": p, "completion": c, "reward": r} for p, c, r in table]

    def prompt_texts(self, rollout: Rollout) -> list[str]:
        """Prompts as text, without special tokens."""
        P = rollout.prompt_length
        rows = zip(rollout.input_ids[:, :P].cpu(), rollout.attention_mask[:, :P].cpu(), strict=True)
        return self.tokenizer.batch_decode([row[m].tolist() for row, m in rows], skip_special_tokens=True)


class Means:
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


def train_online(
    title: str,
    config: Any,
    trainer_of: Callable[..., Sampler],
    roles: Sequence[str],
    rates: Mapping[str, float],
    *,
    observe: Callable[[list[str]], Mapping[str, float]] | None = None,
) -> Path:
    """The loop of a trainer that samples: prompts in, adapters of the trained roles out; returns the folder of the policy's.

    config: settings with model, data, run, reward, rollout and steps. trainer_of(config, model, tokenizer, rewards).
    roles: those of the model; a reward role joins them when scores are learned. rates: {role: peak learning rate} of those that
    train. observe: metrics of each batch of completions, to be logged.

    Raises DataError, RewardError, TrainingError.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    tokenizer: Any = load_tokenizer(config.model.path)
    encoded, fingerprint = load_data(config.data, tokenizer)
    prompts = [prompt.input_ids for prompt in encoded]
    rewards = Rewards(config.reward)
    adapters = {}
    if rewards.adapter is not None:
        roles, adapters = (*roles, "reward"), {"reward": rewards.adapter}
    memory, rollout, group_size = config.run.memory_gib, config.rollout, getattr(config, "group_size", 1)
    room = fitting(
        config,
        title,
        rollout.batch_size // (group_size if title == "online-dpo" else 1),  # of whose prompts each gives one pair
        ((len(ids), rollout.max_new_tokens) for ids in prompts),
        roles=tuple(roles),
        batch_size=rollout.batch_size,
        group_size=group_size,
        greedy=title == "grpo" and config.group.kind == "remax",
        engine=rollout.engine,
        old_logprobs=rollout.old_logprobs,
    )
    model = load_model(config.model, tuple(roles), config.run.seed, adapters, device=device_of(config.run))
    if rewards.adapter is not None and "value" in roles:
        model.copy_role("reward", "value")  # the critic starts from what the reward model knows; its head starts at 0
    trainer = trainer_of(config, model, tokenizer, rewards)
    if memory is not None:
        trainer.limit(room)
    shuffle = Shuffle(len(prompts), config.run.seed)
    size = config.rollout.batch_size // trainer.samples_per_prompt

    def draw(step: int) -> tuple[list[list[int]], torch.Generator]:
        # Every random draw of a step follows from the seed and the step, so a resumed run repeats it.
        generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + step)
        return [prompts[i] for i in shuffle.batch(step, size)], generator

    state: State = {**trainer.state(), "rewards": (rewards.get, rewards.put)}
    identity, flags = {"data": fingerprint}, rewards.fingerprints()
    pipeline = Pipeline(trainer, draw, config.steps)
    context = max(map(len, prompts)) + config.rollout.max_new_tokens
    # An engine's dtype is the trainer's, also of auto.
    dtype = str(next(model.base.parameters()).dtype).removeprefix("torch.")
    with (
        rewards,
        engine_of(replace(config.model, dtype=dtype), config.rollout, Path(config.run.output_dir), context)
        or nullcontext() as pipeline.engine,
        Run(title, config, model, rates, config.steps, identity, state, flags, pipeline.buffers) as run,
    ):
        trainer.ranks = rewards.ranks = run.ranks
        run.shard(trainer.micro_batches, **{"rollout.batch_size": size, **trainer.shared_sizes()})
        if config.reward.normalize == "reference" and run.start == 0:
            rewards.observe(trainer.score(pipeline.reference()).raw_scores)
        for step in run.steps():
            records = [encoded[i].record for i in shuffle.batch(step, size)]
            run.records = [record.source for record in records]
            batch = pipeline.take(step)
            experience = trainer.score(batch.rollout)
            metrics = trainer.update(run, experience, batch.generator) | batch.metrics
            if observe is not None and run.ranks.first:
                metrics |= observe(experience.rollout.texts(tokenizer))
            run.log(step, metrics, *trainer.summary(experience))
            trainer.record(run, step, experience, records)
            if run.ranks.first and run.settings.sample_every and step % run.settings.sample_every == 0:
                run.monitor.samples(step + 1, trainer.sample_rows(experience))
        for role in rates if run.ranks.first else ():
            model.save_adapter(role, run.folder / ("adapter" if role == "policy" else role))
        return run.folder / "adapter"
