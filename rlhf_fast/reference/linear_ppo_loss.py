"""The PPO loss of hidden states under a language-model head, through the full logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.reference import linear_token_logprobs as of_head
from rlhf_fast.reference import ppo_loss as of_tokens


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor,
    temperature: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    importance_weights: Tensor | None,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature_value: float,
    softcap: float,
    *numbers: float | str,
) -> tuple[Tensor, Tensor]:
    """(loss, stats): ppo_loss of the log-probs and entropies of linear_token_logprobs; `numbers` are those of ppo_loss.

    old_logprobs and the tensors after it have the dtype of the loss.
    """
    logprobs, entropy, _, _ = of_head.linear_token_logprobs(
        hidden, weight, bias, token_ids, mask, temperature, None, None, None, temperature_value, softcap, "linear_ppo_loss"
    )  # fmt: skip
    logprobs, entropy = logprobs.to(old_logprobs.dtype), entropy.to(old_logprobs.dtype)
    return of_tokens.ppo_loss(
        logprobs, old_logprobs, advantages, mask, entropy, ref_logprobs, values, old_values, returns, importance_weights,
        normalizer, cu_seqlens, *numbers, "token", "clip",  # type: ignore[arg-type]
    )  # fmt: skip


def sample(
    shape: tuple[int, ...] = (4, 9),
    vocab: int = 127,
    hidden_size: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Keyword arguments of ops.linear_ppo_loss with every optional tensor: ratios on both sides of both clips."""
    head = of_head.sample(shape, vocab, hidden_size, dtype=dtype, seed=seed, ref=False)
    tokens = of_tokens.sample(shape, dtype=torch.float64, seed=seed)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in head.items()}
    order = ("hidden", "weight", "bias", "token_ids", "mask")
    logprobs = of_head.linear_token_logprobs(*map(wide.get, order), None, None, None, None, 1.0, 0.0)[0]  # type: ignore[arg-type]
    moved = {k: tokens[k] - tokens["logprobs"] + logprobs for k in ("old_logprobs", "ref_logprobs")}
    rest = ("advantages", "values", "old_values", "returns", "importance_weights")
    return head | {k: v.to(dtype) for k, v in (moved | {k: tokens[k] for k in rest}).items()}
