"""The public ops: argument checks, documentation and registration; the maths is in rlhf_fast.reference."""

from __future__ import annotations

from rlhf_fast.ops.advantages import advantages
from rlhf_fast.ops.cached_attention import cached_attention
from rlhf_fast.ops.dpo_loss import dpo_loss
from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.group_advantages import group_advantages
from rlhf_fast.ops.kl_estimate import kl_estimate
from rlhf_fast.ops.linear_ppo_loss import linear_ppo_loss
from rlhf_fast.ops.linear_token_logprobs import linear_token_logprobs
from rlhf_fast.ops.lora_linear import lora_linear
from rlhf_fast.ops.ppo_loss import ppo_loss
from rlhf_fast.ops.reward_loss import reward_loss
from rlhf_fast.ops.rms_norm import rms_norm
from rlhf_fast.ops.rotary import rotary
from rlhf_fast.ops.sample_tokens import sample_tokens
from rlhf_fast.ops.silu_mul import silu_mul
from rlhf_fast.ops.token_logprobs import token_logprobs
from rlhf_fast.ops.varlen_attention import varlen_attention
from rlhf_fast.ops.whiten import whiten

__all__ = [
    "advantages",
    "cached_attention",
    "dpo_loss",
    "gae",
    "group_advantages",
    "kl_estimate",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "lora_linear",
    "ppo_loss",
    "reward_loss",
    "rms_norm",
    "rotary",
    "sample_tokens",
    "silu_mul",
    "token_logprobs",
    "varlen_attention",
    "whiten",
]
