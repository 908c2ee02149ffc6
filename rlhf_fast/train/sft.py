"""Supervised fine-tuning of the policy adapter: maximise the log-prob of texts, or of the assistant's turns of chats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.batch import Batch, Shuffle, collate, pack
from rlhf_fast.config import SFTConfig
from rlhf_fast.model import SharedModel
from rlhf_fast.train.loop import Run, State, device_of, load_data, load_model, load_tokenizer
from rlhf_fast.train.micro_batches import MicroBatches, fitting
from rlhf_fast.train.rows import packs_well
from rlhf_fast.train.scoring import head_logprobs, next_token_logprobs


def sft_loss(model: SharedModel, batch: Batch, denominator: int, packing: bool = False) -> Tensor:
    """Sum of -log p over the batch's targets, divided by the targets of the whole step: micro-batches add up exactly.

    packing: the sequences go through the model end to end, without padding.
    """
    batch = batch.to(model.backbone.device)
    if packing:
        ids, bounds = pack(batch.input_ids, batch.attention_mask)
        targets = batch.target_mask[batch.attention_mask]
        hidden = model(ids, roles=("policy",), cu_seqlens=bounds).policy.hidden
        # The first token of a sequence is no target, so no state predicts a token of the next one.
        stats = head_logprobs(model, hidden[:-1], ids[1:], targets[1:])
    else:
        hidden = model(batch.input_ids, batch.attention_mask, roles=("policy",)).policy.hidden
        stats = next_token_logprobs(model, hidden, batch.input_ids, batch.target_mask)
    return -stats.logprobs.sum() / max(denominator, 1)


def train_sft(config: SFTConfig) -> Path:
    """Run it; returns the folder of the trained adapter (PEFT format).

    Raises ConfigError, DataError, TrainingError.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    tokenizer: Any = load_tokenizer(config.model.path)
    texts, fingerprint = load_data(config.data, tokenizer, response_only=config.response_only)
    size = fitting(config, "sft", config.micro_batch_size, ((0, len(row.input_ids)) for row in texts))
    torch.manual_seed(config.run.seed)
    model = load_model(config.model, ("policy",), config.run.seed, device=device_of(config.run))
    shuffle = Shuffle(len(texts), config.run.seed)
    total = shuffle.batches(config.batch_size, config.epochs, config.max_steps)
    packing = packs_well(model) if config.packing is None else config.packing
    model.train()
    micro_batches = MicroBatches(size, halve=config.run.halve_on_oom, clear=model.zero_grad)
    state: State = {"micro_batch_size": (micro_batches.get, micro_batches.put)}
    with Run("sft", config, model, {"policy": config.optim.lr}, total, {"data": fingerprint}, state) as run:
        run.shard(micro_batches, batch_size=config.batch_size)
        for step in run.steps():
            rows = [texts[i] for i in shuffle.batch(step, config.batch_size)]
            batch = collate([row.input_ids for row in rows], [row.learn for row in rows])
            targets = int(batch.target_mask[:, 1:].sum())
            run.records = [row.record.source for row in rows]
            own = batch[run.ranks.share(len(batch))]

            def backward(part: slice, batch: Batch = own, targets: int = targets) -> float:
                loss = sft_loss(model, batch[part], targets, packing)
                loss.backward()
                return float(loss.detach())

            loss = sum(run.ranks.join(micro_batches.map(len(own), backward)))
            norm = run.update(loss)
            metrics = {
                "loss": loss,
                "perplexity": math.exp(min(loss, 50.0)),
                "grad_norm": norm,
                "tokens": float(targets),
            }
            run.log(step, metrics, batch.tokens, f"loss {loss:.3f}")
        if run.ranks.first:
            model.save_adapter("policy", run.folder / "adapter")
        return run.folder / "adapter"
