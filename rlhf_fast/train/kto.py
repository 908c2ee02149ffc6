"""KTO on answers that are judged alone (Ethayarajh et al. 2024, arXiv 2402.01306): no pairs, a baseline from the batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import kto_loss
from rlhf_fast.batch import Shuffle, hold_out
from rlhf_fast.config import KTOConfig
from rlhf_fast.data import EncodedLabel
from rlhf_fast.model import SharedModel
from rlhf_fast.train.loop import Run, State, device_of, load_data, load_model, load_tokenizer
from rlhf_fast.train.micro_batches import MicroBatches, fitting
from rlhf_fast.train.preference import answer_logprobs, mismatched_logratios
from rlhf_fast.train.rows import packs_well

logger = logging.getLogger(__name__)

ROLES = ("policy", "reference")
MOST = 4 / 3
"""The paper keeps desirable_weight n_desirable / (undesirable_weight n_undesirable) between 1 and this."""


def weights_of(config: KTOConfig, labels: Sequence[bool]) -> tuple[float, float]:
    """(desirable, undesirable) weight for data with these labels; a warning where they stay out of balance."""
    desirable, undesirable = config.desirable_weight, config.undesirable_weight
    good = sum(labels)
    bad = len(labels) - good
    if not good or not bad:
        logger.warning("kto: %d answers are desirable and %d are not; the loss wants both", good, bad)
        return desirable, undesirable
    ratio = desirable * good / (undesirable * bad)
    if 1 <= ratio <= MOST:
        return desirable, undesirable
    raised = (desirable / ratio, undesirable) if ratio < 1 else (desirable, undesirable * ratio / MOST)
    if config.balance:
        logger.warning("kto: %d answers are desirable and %d are not; weights %g and %g", good, bad, *raised)
        return raised
    logger.warning(
        "kto: %d answers are desirable and %d are not, so that with weights %g and %g the first weigh %.2f times the others; "
        "between 1 and %.2f is advised, as with weights %g and %g (balance sets them)",
        *(good, bad, desirable, undesirable, ratio, MOST, *raised),
    )
    return desirable, undesirable


class Trainer:
    """The loss on labelled answers."""

    def __init__(self, config: KTOConfig, weights: tuple[float, float], model: SharedModel, packing: bool) -> None:
        self.beta, self.weights, self.model, self.packing = config.beta, weights, model, packing

    def __call__(
        self, answers: Sequence[EncodedLabel], total: int, kl_logratios: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss, sums of the statistics) of some of `total` answers: micro-batches add up to the batch."""
        found = answer_logprobs(self.model, _pieces(answers), ROLES, packing=self.packing)
        loss, stats = kto_loss(
            found["policy"].logprobs,
            found["reference"].logprobs,
            torch.tensor([x.record.label for x in answers], device=self.model.backbone.device),
            kl_logratios=kl_logratios,
            beta=self.beta,
            desirable_weight=self.weights[0],
            undesirable_weight=self.weights[1],
            normalizer=total,
        )
        each = stats.floats()
        sums = {
            "loss": float(loss.detach()),
            "desirable": each["desirable"],
            "undesirable": each["undesirable"],
            "desirable_reward": each["desirable_reward"] * each["desirable"],
            "undesirable_reward": each["undesirable_reward"] * each["undesirable"],
        }
        return loss, sums

    @torch.no_grad()
    def reward(self, answers: Sequence[EncodedLabel], micro_batch_size: int) -> float:
        """Mean of beta x log-ratio."""
        total = 0.0
        for i in range(0, len(answers), micro_batch_size):
            part = _pieces(answers[i : i + micro_batch_size])
            found = answer_logprobs(self.model, part, ROLES, packing=self.packing)
            total += self.beta * float((found["policy"].logprobs - found["reference"].logprobs).sum())
        return total / len(answers)


def _pieces(answers: Sequence[EncodedLabel]) -> list[tuple[list[int], int]]:
    return [(x.input_ids, x.prompt_length) for x in answers]


def train_kto(config: KTOConfig) -> Path:
    """Run it; returns the folder of the trained policy adapter (PEFT format, relative to the base with its folds).

    Raises ConfigError, DataError, TrainingError.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    tokenizer: Any = load_tokenizer(config.model.path)
    encoded, fingerprint = load_data(config.data, tokenizer)
    held_out, kept = hold_out(encoded, config.eval_fraction, config.run.seed)
    weights = weights_of(config, [x.record.label for x in kept])
    size = fitting(config, "kto", config.micro_batch_size, ((0, len(x.input_ids)) for x in encoded))
    torch.manual_seed(config.run.seed)
    model = load_model(config.model, ROLES, config.run.seed, device=device_of(config.run))
    trainer = Trainer(config, weights, model, packs_well(model) if config.packing is None else config.packing)
    shuffle = Shuffle(len(kept), config.run.seed)
    total = shuffle.batches(config.batch_size, config.epochs, config.max_steps)
    model.train()
    micro_batches = MicroBatches(size, halve=config.run.halve_on_oom, clear=model.zero_grad)
    state: State = {"micro_batch_size": (micro_batches.get, micro_batches.put)}
    with Run("kto", config, model, {"policy": config.optim.lr}, total, {"data": fingerprint}, state) as run:
        run.shard(micro_batches, batch_size=config.batch_size)
        for step in run.steps():
            batch = [kept[i] for i in shuffle.batch(step, config.batch_size)]
            run.records = [x.record.source for x in batch]
            own = batch[run.ranks.share(len(batch))]
            kl = mismatched_logratios(model, _pieces(batch), run.ranks, micro_batches.size, packing=trainer.packing)

            def backward(part: slice, own: list[EncodedLabel] = own, kl: Tensor = kl) -> dict[str, float]:
                loss, sums = trainer(own[part], config.batch_size, kl)
                loss.backward()
                return sums

            parts = run.ranks.join(micro_batches.map(len(own), backward))
            sums = {name: sum(part[name] for part in parts) for name in parts[0]}
            good, bad = sums.pop("desirable"), sums.pop("undesirable")
            sums["desirable_reward"] /= max(good, 1.0)
            sums["undesirable_reward"] /= max(bad, 1.0)
            sums |= {"desirable": good / (good + bad), "kl": max(float(kl.mean()), 0.0)}
            sums["grad_norm"] = run.update(sums["loss"])
            if held_out and step + 1 == total:
                model.eval()
                reward = lambda answers: trainer.reward(answers, micro_batches.size)
                for name, label in (("desirable", True), ("undesirable", False)):
                    if found := [x for x in held_out if x.record.label is label]:
                        sums[f"eval_{name}_reward"] = run.ranks.mean(found, reward)
                model.train()
            tokens = sum(len(x.input_ids) for x in batch)
            run.log(step, sums, tokens, f"loss {sums['loss']:.3f} kl {sums['kl']:.2f}")
        if run.ranks.first:
            model.save_adapter("policy", run.folder / "adapter")
        return run.folder / "adapter"
