"""verl: log-probs, entropy, KL, advantages, whitening, policy and value losses.

Supported: verl >= 0.9, < 0.11. Metrics stay Python floats and dtypes stay verl's. Of its policy losses, vanilla, gspo, sapo, cispo,
gpg, clip_cov, kl_cov, geo_mean and the REINFORCE of bypass_mode are ours; dppo_tv, dppo_kl and dro have no recipe here.
Corrections: slots outside of the response mask give 0 (verl leaves whitened leftovers there, and a NaN there spreads through its
sums), a loss without a real token is 0 instead of NaN, equal scores of a GRPO group give exactly 0, and with half_precision=True
half-precision inputs are computed in fp32 and rounded once.

`inplace_backward` of logprobs_from_logits needs no answer: our backward never writes into the logits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.integrations._compare import Unsupported, any_half, as_mask, common_dtype, never
from rlhf_fast.integrations._patch import Framework, Socket
from rlhf_fast.integrations.verl_losses import (
    ALGOS,
    REPLACED,
    agg_loss,
    compute_policy_loss_reinforce,
    compute_policy_loss_vanilla,
    compute_value_loss,
)
from rlhf_fast.ops.advantages import advantages as advantages_op
from rlhf_fast.ops.group_advantages import group_advantages
from rlhf_fast.ops.kl_estimate import kl_estimate
from rlhf_fast.ops.token_logprobs import token_logprobs
from rlhf_fast.ops.whiten import whiten

TORCH = "verl.utils.torch_functional"

KL_KINDS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
K3_CLAMP = (20.0, 10.0)
FLASH_IGNORES = -100
"""Label for which flash-attn's cross entropy is 0."""


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """(..., V), (...) -> (...)."""
    if getattr(sys.modules.get(TORCH), "NPU_CROSS_ENTROPY_LOSS_AVAILABLE", False):
        raise Unsupported("verl uses the cross entropy of an NPU")
    if _flash():
        return token_logprobs(logits, labels, mask=labels != FLASH_IGNORES).logprobs
    return token_logprobs(logits, labels).logprobs.to(logits.dtype)


def _flash() -> bool:
    """Whether verl takes log-probs from flash-attn, which computes and returns fp32."""
    available = getattr(sys.modules.get(TORCH), "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)
    return available and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"


def _rounds_logprobs(tensors: Sequence[Tensor]) -> bool:
    return any_half(tensors) and not _flash()


def entropy_from_logits(logits: Tensor) -> Tensor:
    """(..., V) -> (...)."""
    return _entropy(logits).to(logits.dtype)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """(N, V) -> (N,) fp32; one pass needs no chunks."""
    return _entropy(logits).float()


def _entropy(logits: Tensor) -> Tensor:
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, ids).entropy


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Like values; 0 where masked."""
    return whiten(values, _several(mask), shift_mean=shift_mean).to(values.dtype)


def _several(mask: Tensor) -> Tensor:
    """The mask as bool; verl refuses to whiten fewer than two numbers."""
    real = as_mask(mask)
    if int(real.sum()) < 2:
        raise Unsupported("fewer than two real tokens")
    return real


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(B, T) -> whitened advantages and returns, (B, T) each; 0 where masked."""
    if values.dtype is not token_level_rewards.dtype:
        raise Unsupported(f"rewards are {token_level_rewards.dtype}, values {values.dtype}")
    with torch.no_grad():
        found = advantages_op(
            token_level_rewards, values, _several(response_mask), gamma=float(gamma), lam=float(lam), dialect="verl"
        )
    dtype = values.dtype
    return found.advantages.to(dtype), found.returns.to(dtype)


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """(B, T) rewards and the prompt of every row -> one advantage per row, on its real tokens, twice."""
    scores = token_level_rewards.detach().sum(dim=-1)
    ids, alone = _groups(index, scores)
    kind = "grpo" if norm_adv_by_std_in_grpo else "dr_grpo"
    found = group_advantages(scores, ids, kind, eps=epsilon).to(scores.dtype)
    if alone is not None:  # verl compares the only answer to a prompt with mean 0 and std 1
        found = torch.where(alone, scores / (1 + epsilon) if norm_adv_by_std_in_grpo else scores, found)
    found = found.unsqueeze(-1) * response_mask
    return found, found


def _groups(index: Any, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """Labels of any type (verl uses strings) as integers, and the rows that are alone in their group, if there are any."""
    index = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
    if index.shape != tuple(scores.shape):
        raise Unsupported(f"index of shape {index.shape} for {tuple(scores.shape)} rows")
    _, groups, sizes = np.unique(index, return_inverse=True, return_counts=True)
    alone = torch.from_numpy(sizes[groups] == 1).to(scores.device) if (sizes == 1).any() else None
    return torch.from_numpy(groups).to(scores.device), alone


def _signal(given: Mapping[str, Any]) -> Tensor:
    """Slots of groups whose scores differ: verl scales the rounding of equal scores up by 1 / epsilon, ours gives 0."""
    scores = given["token_level_rewards"].sum(dim=-1)
    ids, alone = _groups(given["index"], scores)
    differs = group_advantages(scores, ids, "dr_grpo") != 0
    return (differs if alone is None else differs | alone)[:, None].expand(given["response_mask"].shape)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """(...) -> (...); `low_var_kl+` and its like have the gradient of k2."""
    return kl_penalty_forward(logprob, ref_logprob, kl_penalty)


def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """(...) -> (...)."""
    kind = KL_KINDS.get(kl_penalty.removesuffix("+"))
    if kind is None:
        raise Unsupported(f"estimator {kl_penalty!r}")
    plus = "+" if kl_penalty.endswith("+") and kind != "k2" else ""
    found = kl_estimate(logprob, ref_logprob, kind + plus, clamp=K3_CLAMP if kind == "k3" else None)
    return found.to(common_dtype(logprob, ref_logprob))


FRAMEWORK = Framework(
    "verl",
    ("0.9", "0.11"),
    (
        Socket(TORCH, "logprobs_from_logits", logprobs_from_logits, rows=("logits", "labels"), rounds=_rounds_logprobs),
        Socket(TORCH, "entropy_from_logits", entropy_from_logits, rows=("logits",)),
        Socket(
            TORCH,
            "entropy_from_logits_with_chunking",
            entropy_from_logits_with_chunking,
            rows=("logits",),
            rounds=never,
        ),
        Socket(TORCH, "masked_whiten", masked_whiten, counts="mask"),
        Socket(ALGOS, "compute_gae_advantage_return", compute_gae_advantage_return, counts="response_mask"),
        Socket(ALGOS, "compute_grpo_outcome_advantage", compute_grpo_outcome_advantage, counts=_signal),
        Socket(ALGOS, "compute_grpo_vectorized_outcome_advantage", compute_grpo_outcome_advantage, counts=_signal),
        Socket(ALGOS, "kl_penalty", kl_penalty),
        Socket(ALGOS, "kl_penalty_forward", kl_penalty_forward),
        Socket(ALGOS, "agg_loss", agg_loss),
        Socket(ALGOS, "compute_policy_loss_vanilla", compute_policy_loss_vanilla),
        *(Socket(ALGOS, f"compute_policy_loss_{name}", ours) for name, ours in REPLACED.items()),
        Socket(ALGOS, "compute_policy_loss_reinforce", compute_policy_loss_reinforce),
        Socket(ALGOS, "compute_value_loss", compute_value_loss),
    ),
)
