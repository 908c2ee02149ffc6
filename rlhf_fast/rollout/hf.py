"""Sampling in the training process: a decode loop over the shared base with a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_fast.model import SharedModel


@dataclass(frozen=True)
class Rollout:
    """Prompts (left-padded to P tokens) followed by their completions (right-padded to R tokens)."""

    input_ids: Tensor
    """(B, P + R) int64; padding holds id 0."""
    attention_mask: Tensor
    """(B, P + R) bool."""
    response_mask: Tensor
    """(B, R) bool: the sampled tokens, end-of-sequence included."""
    finished: Tensor
    """(B,) bool: the completion ended with end-of-sequence."""

    @property
    def prompt_length(self) -> int:
        """P."""
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    @property
    def responses(self) -> Tensor:
        """(B, R) sampled tokens."""
        return self.input_ids[:, self.prompt_length :]

    def texts(self, tokenizer) -> list[str]:  # type: ignore[no-untyped-def]
        """Completions as text, without special tokens."""
        rows = [row[m].tolist() for row, m in zip(self.responses, self.response_mask, strict=True)]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)


def sample_tokens(
    logits: Tensor, temperature: float, generator: torch.Generator | None = None, place: tuple[int, int] | None = None
) -> Tensor:
    """One token per row of logits (B, V) from softmax(logits / temperature), by inversion with one uniform a row.

    place: as in `generate`.

    No top-k, top-p or repetition penalty: the ratio of PPO needs the probability of what was sampled.
    """
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    # fp64: at 256k entries the steps of an fp32 sum are coarser than the probabilities of the tail.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    first, rows = place or (0, logits.shape[0])
    uniform = torch.rand(rows, 1, dtype=torch.float64, generator=generator)
    uniform = uniform[first : first + logits.shape[0]].to(logits.device)
    # right=True: the first entry above the draw, so a token of probability 0 is never taken.
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return tokens.squeeze(1).clamp_(max=logits.shape[1] - 1)


@torch.no_grad()
def generate(
    model: SharedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
    role: str = "policy",
    place: tuple[int, int] | None = None,
) -> Rollout:
    """Sample completions of left-padded prompts.

    Args:
        model: the shared model; `role` says whose adapter samples.
        prompt_ids, prompt_mask: (B, P), left-padded, as from batch.pad(..., left=True).
        max_new_tokens: most tokens of a completion; the loop ends early when every row has finished.
        min_new_tokens: end-of-sequence has probability 0 before this many tokens.
        temperature: logits are divided by it.
        eos_token_id: ends a completion; None = completions of max_new_tokens tokens.
        generator: CPU generator of the draws; one uniform number per row and step.
        place: (first, rows) where the prompts are the rows from `first` on in a batch of `rows`, whose draws they get.

    Raises:
        ValueError: prompts that are not left-padded, or numbers out of range.
    """
    if max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens:
        got = f"{min_new_tokens} and {max_new_tokens}"
        raise ValueError(
            f"generate: arguments 'min_new_tokens', 'max_new_tokens' got {got}, expected 0 <= min <= max, max >= 1"
        )
    if not temperature > 0:
        raise ValueError(f"generate: argument 'temperature' got {temperature}, expected a number above 0")
    if not bool(prompt_mask[:, -1].all()):
        raise ValueError("generate: argument 'prompt_mask' got right padding, expected left padding")
    B, P = prompt_ids.shape
    ids = torch.cat([prompt_ids.where(prompt_mask, 0), prompt_ids.new_zeros(B, max_new_tokens)], dim=1)
    mask = torch.cat([prompt_mask, prompt_mask.new_zeros(B, max_new_tokens)], dim=1)
    positions = (prompt_mask.cumsum(1) - 1).clamp_(min=0)
    finished = torch.zeros(B, dtype=torch.bool, device=ids.device)
    cache = DynamicCache(config=model.base.config)
    fresh = ids[:, :P]
    steps = 0
    with model.as_role(role):
        for t in range(P, P + max_new_tokens):
            logits = model.base(
                input_ids=fresh,
                attention_mask=mask[:, :t].long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            if eos_token_id is not None and t - P < min_new_tokens:
                logits = logits.index_fill(1, torch.tensor([eos_token_id], device=logits.device), -torch.inf)
            tokens = sample_tokens(logits, temperature, generator, place)
            ids[:, t] = tokens.where(~finished, 0)
            mask[:, t] = ~finished
            steps += 1
            if eos_token_id is not None:
                finished = finished | (mask[:, t] & (tokens == eos_token_id))
                if bool(finished.all()):
                    break
            fresh = ids[:, t : t + 1]
            positions = positions[:, -1:] + 1
    return Rollout(ids[:, : P + steps], mask[:, : P + steps], mask[:, P : P + steps], finished)
