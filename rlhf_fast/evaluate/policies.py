"""Completions of several policies on the same prompts, and what judges and the reference say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_fast.batch import pad
from rlhf_fast.config import GenerationConfig
from rlhf_fast.evaluate.judges import Judge
from rlhf_fast.evaluate.metrics import distinct_n, lengths, repetition, words
from rlhf_fast.evaluate.statistics import Comparison, Interval, compare
from rlhf_fast.model import SharedModel
from rlhf_fast.rollout import generate
from rlhf_fast.train.scoring import head_logprobs


@dataclass(frozen=True)
class Samples:
    """N completions of one policy, in the order of their prompts."""

    prompts: list[str]
    completions: list[str]
    kl: np.ndarray
    """(N,) log p(completion) under the policy minus under the reference, in nats: its mean estimates the KL."""
    ref_logprobs: np.ndarray
    """(N,) log p(completion) under the reference, in nats."""
    tokens: np.ndarray
    """(N,) sampled tokens."""

    @property
    def perplexity(self) -> float:
        """Perplexity of the completions under the reference, per token."""
        return math.exp(-self.ref_logprobs.sum() / max(self.tokens.sum(), 1))


@torch.no_grad()
def sample(
    model: SharedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    role: str = "policy",
    samples_per_prompt: int = 1,
    seed: int = 0,
) -> Samples:
    """Complete every prompt (token ids) with the role's adapter and score the completions under the role "reference".

    Two policies called with one seed get the same uniform numbers, so what differs between them is their distribution.
    """
    repeated = [p for p in prompts for _ in range(samples_per_prompt)]
    texts: list[str] = []
    completions: list[str] = []
    columns: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(repeated), config.batch_size):
        ids, mask = pad(repeated[start : start + config.batch_size], left=True, device=model.backbone.device)
        rollout = generate(
            model,
            ids,
            mask,
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            temperature=config.temperature,
            eos_token_id=tokenizer.eos_token_id if config.stop_at_eos else None,
            generator=torch.Generator().manual_seed(seed * 1_000_003 + start),
            role=role,
        )
        first = rollout.prompt_length - 1
        roles = ("reference",) if role == "reference" else (role, "reference")
        out = model(rollout.input_ids, rollout.attention_mask, roles=roles)
        logprobs = {
            name: head_logprobs(
                model,
                out[name].hidden[:, first:-1],
                rollout.responses,
                rollout.response_mask,
                config.temperature,
            ).logprobs.sum(1)
            for name in roles
        }
        columns.append((logprobs[role] - logprobs["reference"], logprobs["reference"], rollout.response_mask.sum(1)))
        completions += rollout.texts(tokenizer)
        texts += tokenizer.batch_decode([row[m].tolist() for row, m in zip(ids, mask, strict=True)])
    kl, ref_logprobs, tokens = (torch.cat(column).double().cpu().numpy() for column in zip(*columns, strict=True))
    return Samples(texts, completions, kl, ref_logprobs, tokens)


def compare_samples(
    before: Samples, after: Samples, judges: Sequence[Judge], *, resamples: int = 4000, level: float = 0.95
) -> list[Comparison]:
    """One row per judge and metric; samples of one prompt are drawn together in the intervals."""
    groups = before.prompts

    def row(name: str, b: np.ndarray, a: np.ndarray, **options: Any) -> Comparison:
        return compare(name, b, a, groups=groups, resamples=resamples, level=level, **options)

    rows = [
        row(j.name, j.score(before.completions), j.score(after.completions), description=j.description) for j in judges
    ]
    split = [[words(text) for text in s.completions] for s in (before, after)]
    watch: dict[str, Any] = {"higher_is_better": None, "group": "Price"}
    rows.append(row("KL to the reference", before.kl, after.kl, unit="nats per completion", **watch))
    rows.append(row("length", *(lengths(s) for s in split), unit="words", **watch))
    rows.append(row("repetition", *(repetition(s) for s in split), unit="share of repeated word pairs", **watch))
    for n in (1, 2):
        b, a = (Interval(distinct_n(s, n)) for s in split)
        rows.append(Comparison(f"distinct-{n}", b, a, group="Price", unit="share of distinct n-grams"))
    rows.append(
        Comparison(
            "perplexity under the reference",
            Interval(before.perplexity),
            Interval(after.perplexity),
            group="Price",
            unit="per token",
        )
    )
    return rows
