"""Bradley-Terry reward model: the reward adapter and its head on preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import reward_loss
from rlhf_fast.batch import Shuffle, hold_out, pack, pad
from rlhf_fast.config import RewardConfig
from rlhf_fast.data import EncodedPair
from rlhf_fast.model import SharedModel
from rlhf_fast.train.loop import Run, State, device_of, load_data, load_model, load_tokenizer
from rlhf_fast.train.micro_batches import MicroBatches, fitting
from rlhf_fast.train.rows import packs_well

Pair = tuple[list[int], list[int]]


def pair_scores(model: SharedModel, pairs: Sequence[Pair], packing: bool = False) -> tuple[Tensor, Tensor]:
    """Scores (n,) of the chosen and of the rejected sequences, from one forward of 2 n rows, or of all of them end to end."""
    ids, mask = pad([c for c, _ in pairs] + [r for _, r in pairs], device=model.backbone.device)
    if packing:
        flat, bounds = pack(ids, mask)
        scores = model(flat, roles=("reward",), cu_seqlens=bounds).reward.scores
    else:
        scores = model(ids, mask, roles=("reward",)).reward.scores
    return scores[: len(pairs)], scores[len(pairs) :]


@torch.no_grad()
def pair_accuracy(model: SharedModel, pairs: Sequence[Pair], micro_batch_size: int, packing: bool = False) -> float:
    """Share of pairs whose chosen sequence scores higher; ties count one half."""
    right = 0.0
    for i in range(0, len(pairs), micro_batch_size):
        chosen, rejected = pair_scores(model, pairs[i : i + micro_batch_size], packing)
        right += float((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum())
    return right / len(pairs)


def ids_of(pair: EncodedPair) -> Pair:
    return pair.chosen_ids, pair.rejected_ids


def train_reward(config: RewardConfig) -> Path:
    """Run it; returns the folder of the trained adapter and head (PEFT format).

    Raises ConfigError, DataError, TrainingError.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    tokenizer: Any = load_tokenizer(config.model.path)
    encoded, fingerprint = load_data(config.data, tokenizer)
    held_out, kept = hold_out(encoded, config.eval_fraction, config.run.seed)
    lengths = ((0, max(map(len, ids_of(pair)))) for pair in encoded)
    size = fitting(config, "reward", config.micro_batch_size, lengths)
    torch.manual_seed(config.run.seed)
    model = load_model(config.model, ("reward",), config.run.seed, device=device_of(config.run))
    shuffle = Shuffle(len(kept), config.run.seed)
    total = shuffle.batches(config.batch_size, config.epochs, config.max_steps)
    packing = packs_well(model) if config.packing is None else config.packing
    model.train()
    micro_batches = MicroBatches(size, halve=config.run.halve_on_oom, clear=model.zero_grad)
    state: State = {"micro_batch_size": (micro_batches.get, micro_batches.put)}
    with Run("reward", config, model, {"reward": config.optim.lr}, total, {"data": fingerprint}, state) as run:
        run.shard(micro_batches, batch_size=config.batch_size)
        for step in run.steps():
            rows = [kept[i] for i in shuffle.batch(step, config.batch_size)]
            run.records = [pair.record.source for pair in rows]
            batch = [ids_of(pair) for pair in rows]
            own = batch[run.ranks.share(len(batch))]

            def backward(part: slice, batch: list[Pair] = own, total: int = len(batch)) -> dict[str, float]:
                chosen, rejected = pair_scores(model, batch[part], packing)
                loss, stats = reward_loss(
                    chosen, rejected, center_coef=config.center_coef, label_smoothing=config.label_smoothing
                )
                share = len(chosen) / total  # the loss is a mean over its pairs
                (loss * share).backward()
                return {n: share * x for n, x in {**stats.floats(), "loss": float(loss.detach())}.items()}

            parts = run.ranks.join(micro_batches.map(len(own), backward))
            sums = {name: sum(part[name] for part in parts) for name in parts[0]}
            sums["grad_norm"] = run.update(sums["loss"])
            last = step + 1 == total
            if held_out and last:
                model.eval()
                accuracy = lambda pairs: pair_accuracy(model, pairs, micro_batches.size, packing)
                sums["eval_accuracy"] = run.ranks.mean([ids_of(pair) for pair in held_out], accuracy)
                model.train()
            tokens = sum(len(c) + len(r) for c, r in batch)
            run.log(step, sums, tokens, f"loss {sums['loss']:.3f} accuracy {sums['accuracy']:.2f}")
        if run.ranks.first:
            model.save_adapter("reward", run.folder / "adapter")
        return run.folder / "adapter"
