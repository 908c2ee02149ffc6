"""DPO and its kin: the policy adapter on preference pairs, with the base itself for the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import SequenceLogprobs, gather_rows, preference_loss, running_delta, sequence_logprobs
from rlhf_fast.batch import Shuffle, collate, hold_out, pack, unpack
from rlhf_fast.config import PreferenceConfig, PreferenceLossConfig
from rlhf_fast.data import EncodedPair
from rlhf_fast.model import SharedModel
from rlhf_fast.preference_kinds import KINDS
from rlhf_fast.train.loop import Run, State, TrainingError, device_of, load_data, load_model, load_tokenizer
from rlhf_fast.train.micro_batches import MicroBatches, fitting
from rlhf_fast.train.ranks import Ranks
from rlhf_fast.train.rows import packs_well
from rlhf_fast.train.scoring import head_logprobs, next_token_logprobs

Answer = tuple[list[int], int]
"""Tokens of a prompt with an answer, and where the answer begins."""


class AnswerTokens(NamedTuple):
    """Log-probs of the tokens of answers."""

    logprobs: dict[str, Tensor]
    """Role -> (n, T) in nats, 0 where there is no token."""
    mask: Tensor
    """(n, T)."""

    def whole(self, tail_weight: float = 1.0) -> dict[str, SequenceLogprobs]:
        """Of whole answers. With a tail_weight, answers come as those that won followed by those that lost, in the same order."""
        common = None
        if tail_weight != 1:
            common = self.mask.sum(1).unflatten(0, (2, len(self.mask) // 2)).amin(0).repeat(2)
        return {
            role: sequence_logprobs(x, self.mask, common_lengths=common, tail_weight=tail_weight)
            for role, x in self.logprobs.items()
        }


def answer_tokens(
    model: SharedModel,
    answers: Sequence[Answer],
    roles: Sequence[str],
    *,
    packing: bool = False,
    temperature: float = 1.0,
) -> AnswerTokens:
    """Log-probs of the tokens of answers under each role, from one call of the model."""
    learn = [[t >= start for t in range(len(ids))] for ids, start in answers]
    batch = collate([ids for ids, _ in answers], learn).to(model.backbone.device)
    if packing:
        ids, bounds = pack(batch.input_ids, batch.attention_mask)
        learned = batch.target_mask[batch.attention_mask]
        out = model(ids, roles=roles, cu_seqlens=bounds)
    else:
        out = model(batch.input_ids, batch.attention_mask, roles=roles)
    found = {}
    for role in roles:
        hidden = out[role].hidden
        if packing:
            # The first token of a sequence is no target, so no state predicts a token of the next one.
            logprobs = head_logprobs(model, hidden[:-1], ids[1:], learned[1:], temperature).logprobs
            found[role] = unpack(torch.cat([logprobs.new_zeros(1), logprobs]), batch.attention_mask)[:, 1:]
        else:
            stats = next_token_logprobs(model, hidden, batch.input_ids, batch.target_mask, temperature)
            found[role] = stats.logprobs
    return AnswerTokens(found, batch.target_mask[:, 1:])


def answer_logprobs(
    model: SharedModel,
    answers: Sequence[Answer],
    roles: Sequence[str],
    tail_weight: float = 1.0,
    packing: bool = False,
    temperature: float = 1.0,
) -> dict[str, SequenceLogprobs]:
    """The same of whole answers; tail_weight as in `AnswerTokens.whole`."""
    return answer_tokens(model, answers, roles, packing=packing, temperature=temperature).whole(tail_weight)


@torch.no_grad()
def mismatched_logratios(
    model: SharedModel,
    answers: Sequence[Answer],
    ranks: Ranks,
    micro_batch_size: int,
    *,
    packing: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """(n,) log-ratios policy / reference of the answers of a batch to each other's prompts, for z0 of KTO (arXiv 2402.01306).

    Prompt i gets the answer to prompt i + 1, the last one that to the first. answers: those of all ranks, which share the work.
    """
    own, others = ranks.share(len(answers)), [*answers[1:], *answers[:1]]
    strange = [(ids[:n] + other[m:], n) for (ids, n), (other, m) in zip(answers[own], others[own], strict=True)]
    roles, found = ("policy", "reference"), [torch.zeros(0, device=model.backbone.device)]
    passes = max(-(-len(strange) // micro_batch_size), ranks.passes(len(answers), micro_batch_size))
    for i in range(0, passes * micro_batch_size, micro_batch_size):
        part = strange[i : i + micro_batch_size]
        # Without one of its own a rank reads another's, for the layers that it holds.
        each = answer_logprobs(model, part or answers[:1], roles, packing=packing, temperature=temperature)
        found.append((each["policy"].logprobs - each["reference"].logprobs)[: len(part)])
    return ranks.rows({"kl": torch.cat(found)})["kl"]


def _answers(pairs: Sequence[EncodedPair]) -> list[Answer]:
    return [(p.chosen_ids, p.prompt_length) for p in pairs] + [(p.rejected_ids, p.prompt_length) for p in pairs]


def _of_all_ranks(found: SequenceLogprobs, n: int) -> SequenceLogprobs:
    """Of the n pairs of every rank, a number of its own: all that won, then all that lost."""
    return SequenceLogprobs(*(torch.cat([gather_rows(x[:n]), gather_rows(x[n:])]) for x in found))


class Trainer:
    """The loss on pairs, with what some kinds keep between steps. temperature: logits are divided by it."""

    def __init__(
        self, loss: PreferenceLossConfig, model: SharedModel, packing: bool = False, temperature: float = 1.0
    ) -> None:
        self.loss, self.model, self.packing, self.temperature, self.ranks = loss, model, packing, temperature, Ranks()
        self.roles = ("policy", "reference") if loss.needs_reference else ("policy",)
        self.lengths = any(KINDS[name].per_token or KINDS[name].lengths for name in loss.kinds)
        """Whether the kinds read the lengths of whole answers."""
        self.across = any(KINDS[name].across for name in loss.kinds)
        self.put([0.0, 0.0])

    def get(self) -> list[float]:
        """bco's delta and how many answers are behind it, for a checkpoint."""
        return [float(self.delta), float(self.seen)]

    def put(self, state: list[float]) -> None:
        """Those of a checkpoint."""
        device = self.model.backbone.device
        self.delta, self.seen = (torch.tensor(x, dtype=torch.float64, device=device) for x in state)

    def mismatched(self, answers: Sequence[Answer], micro_batch_size: int) -> Tensor | None:
        """(n,) log-ratios that kto compares with, from the answers that won, of all ranks; None for the other kinds."""
        if "kto" not in self.loss.kinds:
            return None
        return mismatched_logratios(
            self.model, answers, self.ranks, micro_batch_size, packing=self.packing, temperature=self.temperature
        )

    def __call__(
        self, pairs: Sequence[EncodedPair], total: int, kl_logratios: Tensor | None
    ) -> tuple[Tensor, dict[str, float], Tensor]:
        """(loss, shares of the statistics, implicit rewards (2 n,)) of n of `total` pairs: micro-batches add up to the batch."""
        found = answer_tokens(
            self.model, _answers(pairs), self.roles, packing=self.packing, temperature=self.temperature
        )
        return self.of(found, total, kl_logratios)

    def of(
        self, found: AnswerTokens, total: int, kl_logratios: Tensor | None
    ) -> tuple[Tensor, dict[str, float], Tensor]:
        """The same from the log-probs of n answers that won followed by the n that lost against them."""
        n, own, parts = len(found.mask) // 2, slice(None), 1
        policy, reference = found.logprobs["policy"], found.logprobs.get("reference")
        options = self.loss.arguments()
        if "bco" in self.loss.kinds:
            options["delta"] = self.delta.to(policy.dtype)
        gathered = self.across and self.ranks.world > 1
        if gathered or self.loss.tail_weight != 1:
            whole = found.whole(self.loss.tail_weight)
            if gathered:  # every rank finds the loss of all pairs, and the gradient of its own
                whole = {role: _of_all_ranks(of_role, n) for role, of_role in whole.items()}
                before = sum(self.ranks.gather(n)[: self.ranks.rank])
                n, own, parts = total, slice(before, before + n), self.ranks.world
            policy = whole["policy"].logprobs
            reference = None if reference is None else whole["reference"].logprobs
            lengths = whole["policy"].lengths
            if self.lengths:
                options |= {"chosen_lengths": lengths[:n], "rejected_lengths": lengths[n:]}
        else:
            options |= {"chosen_mask": found.mask[:n], "rejected_mask": found.mask[n:]}
        loss, chosen, rejected = preference_loss(
            policy[:n],
            policy[n:],
            None if reference is None else reference[:n],
            None if reference is None else reference[n:],
            kl_logratios=kl_logratios,
            normalizer=total,
            **options,
        )
        shares = {
            "loss": float(loss.detach()) / parts,
            "accuracy": float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()) / total / parts,
            "reward_chosen": float(chosen.sum()) / total / parts,
            "reward_rejected": float(rejected.sum()) / total / parts,
            "logprob_chosen": float(policy[:n].detach().sum()) / total / parts,
            "logprob_rejected": float(policy[n:].detach().sum()) / total / parts,
        }
        return loss, shares, torch.cat([chosen[own], rejected[own]])

    def step(
        self,
        run: Run,
        rows: int,
        micro_batches: MicroBatches,
        backward: Callable[[slice], tuple[dict[str, float], Tensor]],
        *,
        least: int = 0,
    ) -> dict[str, float]:
        """One update from `rows` pairs of this rank, and what it says of the pairs of all.

        backward: the shares and the implicit rewards of some of them, with their gradients. least: as in MicroBatches.map.
        """
        parts = micro_batches.map(rows, backward, least=least)
        implicit = torch.cat([rewards for _, rewards in parts] or [torch.zeros(0, device=self.delta.device)])
        self.seen_rewards(self.ranks.rows({"rewards": implicit})["rewards"])
        every = self.ranks.join([shares for shares, _ in parts])
        sums = {name: sum(shares[name] for shares in every) for name in every[0]}
        sums["margin"] = sums["reward_chosen"] - sums["reward_rejected"]
        sums["grad_norm"] = run.update(sums["loss"])
        return sums

    def seen_rewards(self, rewards: Tensor) -> None:
        """Take the implicit rewards of a batch into bco's delta."""
        self.delta, self.seen = running_delta(self.delta, self.seen, rewards.double())

    @torch.no_grad()
    def accuracy(self, pairs: Sequence[EncodedPair], micro_batch_size: int) -> float:
        """Share of pairs whose chosen answer has the higher implicit reward; ties count one half."""
        right = 0.0
        for i in range(0, len(pairs), micro_batch_size):
            part = pairs[i : i + micro_batch_size]
            found = answer_logprobs(self.model, _answers(part), self.roles, packing=self.packing)
            rewards = found["policy"].logprobs
            if "reference" in found:
                rewards = rewards - found["reference"].logprobs
            elif self.lengths:
                rewards = rewards / found["policy"].lengths
            chosen, rejected = rewards.view(2, -1)
            right += float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum())
        return right / len(pairs)


def train_preference(config: PreferenceConfig) -> Path:
    """Run it; returns the folder of the trained policy adapter (PEFT format, relative to the base with its folds).

    Raises ConfigError, DataError, TrainingError.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    tokenizer: Any = load_tokenizer(config.model.path)
    encoded, fingerprint = load_data(config.data, tokenizer)
    held_out, kept = hold_out(encoded, config.eval_fraction, config.run.seed)
    roles = ("policy", "reference") if config.loss.needs_reference else ("policy",)
    across = any(KINDS[name].across for name in config.loss.kinds)
    lengths = ((0, max(len(pair.chosen_ids), len(pair.rejected_ids))) for pair in encoded)
    size = fitting(config, "dpo", config.micro_batch_size, lengths, roles=roles, whole=across)
    torch.manual_seed(config.run.seed)
    model = load_model(config.model, roles, config.run.seed, device=device_of(config.run))
    trainer = Trainer(config.loss, model, packs_well(model) if config.packing is None else config.packing)
    shuffle = Shuffle(len(kept), config.run.seed)
    total = shuffle.batches(config.batch_size, config.epochs, config.max_steps)
    model.train()
    halve = config.run.halve_on_oom and not trainer.across
    micro_batches = MicroBatches(size, halve=halve, clear=model.zero_grad)
    state: State = {
        "delta": (trainer.get, trainer.put),
        "micro_batch_size": (micro_batches.get, micro_batches.put),
    }
    with Run("dpo", config, model, {"policy": config.optim.lr}, total, {"data": fingerprint}, state) as run:
        trainer.ranks = run.ranks
        if trainer.across and run.ranks.world > config.batch_size:
            raise TrainingError(
                f"dpo: {run.ranks.world} ranks for batch_size = {config.batch_size}, expected at most as many"
            )
        run.shard(micro_batches, batch_size=config.batch_size)
        for step in run.steps():
            batch = [kept[i] for i in shuffle.batch(step, config.batch_size)]
            run.records = [pair.record.source for pair in batch]
            own = run.ranks.share(len(batch))
            kl_logratios = trainer.mismatched([(p.chosen_ids, p.prompt_length) for p in batch], micro_batches.size)

            def backward(
                part: slice,
                batch: list[EncodedPair] = batch[own],
                total: int = len(batch),
                kl: Tensor | None = kl_logratios,
            ) -> tuple[dict[str, float], Tensor]:
                loss, shares, rewards = trainer(batch[part], total, kl)
                loss.backward()
                return shares, rewards

            sums = trainer.step(run, len(batch[own]), micro_batches, backward)
            if held_out and step + 1 == total:
                model.eval()
                accuracy = lambda pairs: trainer.accuracy(pairs, micro_batches.size)
                sums["eval_accuracy"] = run.ranks.mean(held_out, accuracy)
                model.train()
            tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in batch)
            run.log(step, sums, tokens, f"loss {sums['loss']:.3f} accuracy {sums['accuracy']:.2f}")
        if run.ranks.first:
            model.save_adapter("policy", run.folder / "adapter")
        return run.folder / "adapter"
