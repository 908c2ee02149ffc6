"""verl: log-probs, entropy, KL, advantages, whitening, policy and value losses.

Supported: verl >= 0.9, < 0.11. Metrics stay Python floats and dtypes stay verl's. Corrections: slots outside of the response
mask give 0 (verl leaves whitened leftovers there, and a NaN there spreads through its sums), a loss without a real token is 0
instead of NaN, equal scores of a GRPO group give exactly 0, and with half_precision=True half-precision inputs are computed in
fp32 and rounded once.

`inplace_backward` of logprobs_from_logits needs no answer: our backward never writes into the logits.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_fast.integrations._compare import Unsupported, any_half, as_mask, common_dtype, constants, never
from rlhf_fast.integrations._patch import Framework, Socket
from rlhf_fast.losses import RECIPES, policy_loss
from rlhf_fast.ops.advantages import advantages as advantages_op
from rlhf_fast.ops.group_advantages import group_advantages
from rlhf_fast.ops.kl_estimate import kl_estimate
from rlhf_fast.ops.ppo_loss import ppo_loss
from rlhf_fast.ops.token_logprobs import token_logprobs
from rlhf_fast.ops.whiten import whiten
from rlhf_fast.reference._reduce import token_weights

ALGOS = "verl.trainer.ppo.core_algos"
TORCH = "verl.utils.torch_functional"

KL_KINDS = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
K3_CLAMP = (20.0, 10.0)
MODES = {
    "token-mean": ("token-mean", "tokens"),
    "token-sum": ("token-sum", None),
    "seq-mean-token-sum": ("seq-mean-token-sum", "sequences"),
    "seq-mean-token-sum-norm": ("seq-mean-token-sum", "sequences"),
    "seq-mean-token-mean": ("seq-mean-token-mean", "sequences"),
}
"""{loss_agg_mode: (reduction, what it divides by)}."""
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


class _Reduction:
    """A loss_agg_mode of verl as a reduction of ours, a normalizer and a factor."""

    def __init__(
        self,
        mode: str,
        mask: Tensor,
        dp_size: int = 1,
        batch_num_tokens: Any = None,
        global_batch_size: Any = None,
        loss_scale_factor: Any = None,
    ) -> None:
        if mode not in MODES:
            raise Unsupported(f"loss_agg_mode {mode!r}")
        self.kind, count = MODES[mode]
        counts = {"tokens": batch_num_tokens, "sequences": global_batch_size}
        self.normalizer = None if count is None else counts[count]
        if self.normalizer is None and count is not None and dp_size > 1:
            raise Unsupported(f"no global number of {count} for dp_size {dp_size}")
        if mask.dim() != 2:
            raise Unsupported(f"a loss of {mask.dim()} dimensions")
        self.factor = float(dp_size)
        if mode == "seq-mean-token-sum-norm":
            self.factor /= mask.shape[-1] if loss_scale_factor is None else loss_scale_factor

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.factor == 1.0 else loss * self.factor


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> Tensor:
    """(B, T) losses -> scalar."""
    how = _Reduction(loss_agg_mode, loss_mask, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    real = as_mask(loss_mask)
    if real.shape != loss_mat.shape:
        raise Unsupported(f"a mask {tuple(real.shape)} for a loss {tuple(loss_mat.shape)}")
    tensor = isinstance(how.normalizer, Tensor)
    weights = token_weights(
        real,
        torch.promote_types(loss_mat.dtype, torch.float32),
        how.kind,
        how.normalizer if tensor else None,
        0.0 if tensor or how.normalizer is None else _positive(how.normalizer),
        None,
    )
    return how.scaled((weights * loss_mat.where(real, 0.0)).sum()).to(common_dtype(loss_mat, loss_mask))


def _positive(x: Any) -> float:
    if not x > 0:
        raise Unsupported(f"a denominator of {x}")
    return float(x)


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> tuple[Tensor, Tensor]:
    """(B, T) -> clipped value loss, and the fraction of tokens whose clipped loss is larger."""
    how = _Reduction(loss_agg_mode, response_mask, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    constants(returns=returns, values=values)
    nothing = torch.zeros_like(values)
    found = ppo_loss(
        nothing,
        nothing,
        nothing,
        as_mask(response_mask),
        values=vpreds,
        old_values=values,
        returns=returns,
        value_clip=float(cliprange_value),
        value_coef=1.0,
        reduction=how.kind,
        normalizer=how.normalizer,
    )
    loss = how.scaled(found.loss).to(common_dtype(vpreds, values, returns, response_mask))
    return loss, found.stats["value_clip_fraction"].to(torch.promote_types(torch.float32, response_mask.dtype))


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """(B, T) -> clipped, dual-clipped loss and its metrics, in one pass and one transfer."""
    low, high = _clips(config)
    how = _reduction(loss_agg_mode, response_mask, config)
    constants(old_log_prob=old_log_prob, advantages=advantages, rollout_is_weights=rollout_is_weights)
    real = as_mask(response_mask)
    found = ppo_loss(
        log_prob,
        old_log_prob,
        advantages,
        real,
        clip=(low, high),
        dual_clip=float(config.get("clip_ratio_c", 3.0)),
        ref_logprobs=old_log_prob,
        kl_kind="k1",
        importance_weights=rollout_is_weights,
        reduction=how.kind,
        normalizer=how.normalizer,
    )
    stats = found.stats.floats()
    metrics = {
        "actor/pg_clipfrac": stats["clip_fraction"],
        "actor/ppo_kl": _ppo_kl(stats, log_prob, old_log_prob, real),
        "actor/pg_clipfrac_lower": stats["dual_clip_fraction"],
    }
    dtype = common_dtype(log_prob, old_log_prob, advantages, response_mask, rollout_is_weights)
    return how.scaled(found.loss).to(dtype), metrics


def _ppo_kl(stats: dict[str, float], new: Tensor, old: Tensor, real: Tensor) -> float:
    """Mean of the clamped old - new."""
    if not stats["ratio_clamped"]:
        return -stats["kl"]
    return float((old - new.detach()).clamp(-20.0, 20.0)[real].mean())


def _clips(config: Any) -> tuple[float, float]:
    if config is None:
        raise Unsupported("no config")
    low, high = (getattr(config, f"clip_ratio_{side}") for side in ("low", "high"))
    return (
        float(config.clip_ratio if low is None else low),
        float(config.clip_ratio if high is None else high),
    )


def _reduction(mode: str, mask: Tensor, config: Any) -> _Reduction:
    return _Reduction(mode, mask, **config.global_batch_info)


def _recipe(recipe: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """A row of rlhf_fast.losses.RECIPES behind verl's signature; clips, mode and denominators come from verl's config."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        how = _reduction(loss_agg_mode, response_mask, config)
        found = policy_loss(
            recipe,
            log_prob,
            old_log_prob,
            advantages,
            as_mask(response_mask),
            clip=_clips(config) if "clip" in RECIPES[recipe].reads else None,
            importance_weights=rollout_is_weights,
            reduction=how.kind,
            normalizer=how.normalizer,
        )
        stats = found.stats.floats()
        return how.scaled(found.loss), {
            f"actor/{name}": stats[name] for name in ("clip_fraction", "approx_kl", "ratio_max")
        }

    loss.__name__ = loss.__qualname__ = f"rlhf_fast_{recipe}"
    loss.__doc__ = f"policy_loss({recipe!r}) with the clips, the loss_agg_mode and the denominators of verl's config."
    return loss


def register_policy_losses() -> list[str]:
    """Add the recipes of rlhf_fast.losses that need no further tensor to verl's registry. Returns their names there.

    They are chosen by `policy_loss.loss_mode=rlhf_fast_<recipe>`.
    """
    register = importlib.import_module(ALGOS).register_policy_loss
    recipes = [recipe for recipe, rules in RECIPES.items() if not rules.needs]
    for recipe in recipes:
        register(f"rlhf_fast_{recipe}")(_recipe(recipe))
    return [f"rlhf_fast_{recipe}" for recipe in recipes]


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
        Socket(ALGOS, "compute_value_loss", compute_value_loss),
    ),
)
