"""OpenRLHF: policy, value, preference and reward losses, log-probs, KL, rewards and GAE.

Supported: openrlhf >= 0.11, < 0.12. Losses are patched as methods of their classes, so that instances and names that were
imported before follow. Only what can be imported is patched; openrlhf.models itself needs deepspeed and flash_attn.

The losses are built inside Ray actors, so every worker process has to be patched:

    ray.init(runtime_env={"worker_process_setup_hook": "rlhf_fast.integrations.openrlhf.setup_worker"})

Corrections: slots outside of the action mask give 0 (OpenRLHF keeps KL there, and multiplies NaN by 0), a score without a real
token is dropped, LogExpLoss does not overflow, and with half_precision=True half-precision inputs are computed in fp32 and rounded
once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.corrections import rollout_correction
from rlhf_fast.integrations import patch_on_import
from rlhf_fast.integrations._compare import Unsupported, as_mask, common_dtype, constants, never
from rlhf_fast.integrations._patch import Framework, Socket
from rlhf_fast.integrations._reduction import aggregate
from rlhf_fast.losses import policy_loss
from rlhf_fast.ops.advantages import advantages as advantages_op
from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.kl_estimate import kl_estimate
from rlhf_fast.ops.ppo_loss import ppo_loss
from rlhf_fast.ops.reward_loss import reward_loss
from rlhf_fast.ops.token_logprobs import token_logprobs
from rlhf_fast.preference import preference_loss
from rlhf_fast.surrogates import RATIO_CLAMP, SEQUENCE_CLAMP

LOSS = "openrlhf.models.loss"
UTILS = "openrlhf.models.utils"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"

KL_CLAMP = 10.0
KL_WEIGHT = 10.0
"""Largest importance weight of a KL gradient."""


def setup_worker() -> None:
    """For Ray's worker_process_setup_hook: patches the modules of OpenRLHF that the worker imports, as it imports them."""
    patch_on_import("openrlhf")


def _reduction(
    token_level_loss: bool, dp_size: int, batch_num_tokens: Any, global_batch_size: Any
) -> tuple[str, Any, float]:
    """(reduction, normalizer, factor) of aggregate_loss."""
    kind = "token-mean" if token_level_loss else "seq-mean-token-mean"
    normalizer = batch_num_tokens if token_level_loss else global_batch_size
    return kind, normalizer, 1.0 if normalizer is None else float(dp_size)


def _given(action_mask: Tensor | None) -> Tensor:
    if action_mask is None:
        raise Unsupported("no action mask")
    return action_mask


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> Tensor:
    """(B, T) losses -> scalar: the mean over the tokens, or that of the means of the sequences."""
    kind, normalizer, factor = _reduction(token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    if not token_level_loss and loss.dim() != 2:
        raise Unsupported(f"a loss of {loss.dim()} dimensions")
    found = aggregate(loss, _given(loss_mask), kind, normalizer)
    return (found * factor).to(common_dtype(loss, loss_mask))


def policy_loss_forward(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> tuple[Tensor | None, ...]:
    """(B, T) -> loss, clip fraction, KL of the un-clamped ratio, and of a rollout correction its KL and what it filters."""
    action_mask = _given(action_mask)
    real = as_mask(action_mask)
    constants(old_log_probs=old_log_probs, advantages=advantages, rollout_log_probs=rollout_log_probs)
    kind, normalizer, factor = _reduction(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    how: dict[str, Any] = {
        "clip": (float(self.clip_eps_low), float(self.clip_eps_high)),
        "dual_clip": self.dual_clip,
        "reduction": kind,
        "normalizer": normalizer,
    }
    dtype = common_dtype(log_probs, old_log_probs, action_mask)
    share = torch.promote_types(torch.float32, action_mask.dtype)
    mean = lambda x: (x.where(real, 0.0).sum() / real.sum().clamp(min=1)).to(dtype)
    rollout = rollout_log_probs if _corrects(self) else None
    rollout_kl = filtered = weights = None
    if _corrects(self) and rollout is None:
        raise Unsupported("a correction of the rollout's log-probs without them")
    if self.policy_loss_type == "gspo":
        old = old_log_probs if rollout is None else rollout
        _bounded((log_probs - old).detach(), real)
        found = policy_loss("gspo", log_probs, old, advantages, real, **how)
        kl = mean((old_log_probs - log_probs).detach())
    elif self.policy_loss_type == "ppo":
        if rollout is not None:
            weights, filtered = _correction(self, old_log_probs, rollout, real, share)
            rollout_kl = mean(rollout - old_log_probs)
        found = ppo_loss(
            log_probs,
            old_log_probs,
            advantages,
            real,
            ref_logprobs=old_log_probs,
            kl_kind="k1",
            importance_weights=weights,
            **how,
        )
        kl = -found.stats["kl"].to(dtype)
    else:
        raise Unsupported(f"policy_loss_type {self.policy_loss_type!r}")
    loss = (found.loss * factor).to(common_dtype(log_probs, old_log_probs, action_mask, advantages))
    clipped = found.stats["clip_fraction"].to(share)
    # openrlhf 0.11.2 adds the filtered fraction.
    return loss, clipped, kl, rollout_kl, *([filtered] if hasattr(self, "is_correction_level") else [])


def _corrects(self: Any) -> bool:
    return getattr(self, "is_correction_level", "off") != "off" or getattr(self, "enable_vllm_is_correction", False)


CORRECTIONS = {
    "tis": "token-tis", "icepop": "token-mis", "seq-mask-tis": "geometric",
    ("token", "clip"): "token-tis", ("token", "mask"): "token-mis", ("seq", "mask"): "geometric",
}  # fmt: skip
"""{vllm_is_correction_type of 0.11.0, (is_correction_level, is_correction_mode) of later ones: kind of rollout_correction}."""


def _correction(self: Any, old: Tensor, rollout: Tensor, real: Tensor, share: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights of the tokens, and the filtered share of the tokens or, for a filter of sequences, of the rows."""
    if hasattr(self, "is_correction_level"):
        if self.is_correction_gating != "ratio":
            raise Unsupported(f"is_correction_gating {self.is_correction_gating!r}")
        kind = CORRECTIONS.get((self.is_correction_level, self.is_correction_mode))
        low, high = self.is_correction_threshold
    else:
        kind = CORRECTIONS.get(self.vllm_is_correction_type)
        low, high = self.vllm_is_truncated_threshold
    if kind is None:
        raise Unsupported("an unknown correction of the rollout's log-probs")
    found = rollout_correction(old, rollout, real, kind=kind, bounds=(float(low), float(high)))
    if kind != "geometric":
        return found.weights, found.stats["bounded_fraction"].to(share)
    # What is kept has the weights of its tokens: "mask" of a sequence is not their mean.
    _bounded(old - rollout, real)
    weights = rollout_correction(old, rollout, found.keep, kind="token").weights
    return weights, 1 - found.keep.any(-1).float().mean()


def _bounded(log_ratio: Tensor, real: Tensor) -> None:
    """Raises Unsupported for a log-ratio that only ours clamps: a token's beyond 20, or a sequence's mean above 10."""
    d = log_ratio.where(real, 0.0)
    means = d.sum(-1) / real.sum(-1).clamp(min=1)
    if bool((d.abs() > RATIO_CLAMP).any() | (means > SEQUENCE_CLAMP).any()):
        raise Unsupported("a log-ratio that OpenRLHF does not clamp here")


def value_loss_forward(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
) -> Tensor:
    """(B, T) -> clipped value loss."""
    kind, normalizer, factor = _reduction(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    constants(old_values=old_values, returns=returns)
    nothing = torch.zeros_like(old_values)
    found = ppo_loss(
        nothing,
        nothing,
        nothing,
        as_mask(_given(action_mask)),
        values=values,
        old_values=None if self.clip_eps is None else old_values,
        returns=returns,
        value_clip=None if self.clip_eps is None else float(self.clip_eps),
        value_coef=1.0,
        reduction=kind,
        normalizer=normalizer,
    )
    return (found.loss * factor).to(common_dtype(values, returns, action_mask))


def dpo_loss_forward(
    self: Any,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) -> loss and implicit rewards; IPO on the summed log-probs."""
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    constants(reference_chosen_logps=reference_chosen_logps, reference_rejected_logps=reference_rejected_logps)
    smoothing = 0.0 if self.ipo else float(self.label_smoothing)  # OpenRLHF's ipo does not read it
    kind = "ipo" if self.ipo else "cdpo"
    found = preference_loss(*logps, kind=kind, beta=float(self.beta), label_smoothing=smoothing)
    dtype = common_dtype(*logps)
    return found.loss.to(dtype), found.chosen_rewards.to(dtype), found.rejected_rewards.to(dtype)


def pairwise_loss_forward(
    self: Any, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None
) -> Tensor:
    """(B,) or (B, 1) -> Bradley-Terry loss."""
    constants(margin=margin)
    loss = reward_loss(chosen_reward, reject_reward, margin=margin).loss
    return loss.to(common_dtype(chosen_reward, reject_reward, margin))


def log_exp_loss_forward(
    self: Any, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None
) -> Tensor:
    """(B,) or (B, 1) -> the same loss without a margin, which overflows for no difference of the rewards."""
    return pairwise_loss_forward(self, chosen_reward, reject_reward)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """(..., V), (...) -> (...)."""
    if temperature != 1.0:
        raise Unsupported("a temperature, by which OpenRLHF divides the logits in place")
    return token_logprobs(logits, labels).logprobs.to(logits.dtype)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """(...) -> (...) fp32, every estimator within +-10."""
    if kl_estimator not in ("k1", "k2", "k3"):
        raise Unsupported(f"estimator {kl_estimator!r}")
    plus = "+" if unbiased_gradient else ""
    found = kl_estimate(log_probs.float(), log_probs_base.float(), kl_estimator + plus, clamp=KL_CLAMP)
    if not unbiased_gradient or log_probs_old is None:
        return found
    weights = (log_probs.detach().float() - log_probs_old.detach().float()).exp().clamp(max=KL_WEIGHT)
    return found.detach() + weights * (found - found.detach())  # the gradient alone has the weights


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """Scores (B,), KL (B, T) -> token rewards (B, T): -kl_coef kl, and the score at the last real token."""
    if not isinstance(r, Tensor) or not isinstance(kl, Tensor):
        raise Unsupported("rewards or KL that are no tensor")
    constants(r=r, kl=kl)
    if reward_clip_range:
        r = r.clamp(*reward_clip_range)
    zeros = torch.zeros_like(kl)
    found = advantages_op(
        r,
        zeros,
        as_mask(_given(action_mask)),
        logprobs=kl,
        ref_logprobs=zeros,
        kl_coef=max(0.0, float(kl_coef)),
        kl_kind="k1",  # of (kl, 0) is kl
        whiten=False,
    )
    return found.rewards.to(kl.dtype)


def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """(B, T) -> advantages and returns, not whitened; masked slots between real tokens decay."""
    constants(values=values, rewards=rewards)
    found = gae(rewards, values, as_mask(_given(action_mask)), gamma=float(gamma), lam=float(lambd), gap="decay")
    dtype = common_dtype(values, rewards, action_mask)
    return found[0].to(dtype), found[1].to(dtype)


def get_cumulative_returns(self: Any, rewards: Tensor, action_mask: Tensor, gamma: float) -> Tensor:
    """(B, T) -> discounted returns; masked slots between real tokens take a step of time."""
    constants(rewards=rewards)
    found = gae(
        rewards, torch.zeros_like(rewards), as_mask(_given(action_mask)), gamma=float(gamma), lam=1.0, gap="decay"
    )
    return found[1].to(rewards.dtype)


FRAMEWORK = Framework(
    "openrlhf",
    ("0.11", "0.12"),
    (
        Socket(LOSS, "aggregate_loss", aggregate_loss),
        Socket(LOSS, "PolicyLoss.forward", policy_loss_forward),
        Socket(LOSS, "ValueLoss.forward", value_loss_forward),
        Socket(LOSS, "DPOLoss.forward", dpo_loss_forward),
        Socket(LOSS, "PairWiseLoss.forward", pairwise_loss_forward),
        Socket(LOSS, "LogExpLoss.forward", log_exp_loss_forward),
        Socket(UTILS, "log_probs_from_logits", log_probs_from_logits, rows=("logits", "labels")),
        Socket(UTILS, "compute_approx_kl", compute_approx_kl, rounds=never),
        Socket(UTILS, "compute_reward", compute_reward, counts="action_mask"),
        Socket(
            MAKER,
            "RemoteExperienceMaker.get_advantages_and_returns",
            get_advantages_and_returns,
            counts="action_mask",
        ),
        Socket(MAKER, "RemoteExperienceMaker.get_cumulative_returns", get_cumulative_returns, counts="action_mask"),
    ),
)
