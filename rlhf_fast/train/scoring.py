"""From hidden states of the shared model to log-probs of tokens and to their PPO loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_fast import LossOutput, TokenStats, linear_ppo_loss, linear_token_logprobs
from rlhf_fast.model import SharedModel


def head_logprobs(
    model: SharedModel, hidden: Tensor, token_ids: Tensor, mask: Tensor, temperature: float = 1.0
) -> TokenStats:
    """Log-prob and entropy (...) of token_ids (...) under the LM head on hidden (..., H); the logits are never whole.

    hidden[t] must be the state that predicts token_ids[t]: the caller shifts by one.
    """
    hidden, head = _head(model, hidden)
    return linear_token_logprobs(hidden, model.head_weight, token_ids, mask=mask, temperature=temperature, **head)


def head_ppo_loss(
    model: SharedModel,
    hidden: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    **options: Any,
) -> LossOutput:
    """The PPO loss of the same log-probs, with its gradients found while the logits are there; options of linear_ppo_loss."""
    hidden, head = _head(model, hidden)
    return linear_ppo_loss(
        hidden, model.head_weight, token_ids, old_logprobs, advantages, mask, temperature=temperature, **head, **options
    )


def _head(model: SharedModel, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states with the model's scale, and what else its head does to logits."""
    bias = model.head_bias
    if model.logit_scale != 1.0:
        hidden = hidden * model.logit_scale
        bias = None if bias is None else bias * model.logit_scale
    return hidden, {"bias": bias, "softcap": model.final_softcap}


def next_token_logprobs(
    model: SharedModel, hidden: Tensor, input_ids: Tensor, target_mask: Tensor, temperature: float = 1.0
) -> TokenStats:
    """(B, T - 1) stats of tokens 1 ... T - 1 of input_ids (B, T), from hidden (B, T, H) and target_mask (B, T)."""
    return head_logprobs(model, hidden[:, :-1], input_ids[:, 1:], target_mask[:, 1:], temperature)
