"""verl in plain PyTorch."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from integrations.fakes._module import log_softmax_rows, module
from integrations.fakes._verl_losses import policy_losses


def verl(version="0.9.1"):
    def masked_sum(values, mask, axis=None):
        return (torch.where(mask.bool(), values, 0.0) * mask).sum(axis=axis)

    def masked_mean(values, mask, axis=None):
        return masked_sum(values, mask, axis) / (mask.sum(axis=axis) + 1e-8)

    def masked_whiten(values, mask, shift_mean=True):
        if mask.sum() < 2:
            raise ValueError("The sum of the mask is one, which can cause a division by zero.")
        mean = masked_mean(values, mask)
        var = masked_mean((values - mean) ** 2, mask) * mask.sum() / (mask.sum() - 1)
        whitened = (values - mean) * torch.rsqrt(var + 1e-8)
        return whitened if shift_mean else whitened + mean

    def logprobs_from_logits(logits, labels, inplace_backward=True):
        return log_softmax_rows(logits, labels)

    def entropy_from_logits(logits):
        return torch.logsumexp(logits, -1) - (F.softmax(logits, -1) * logits).sum(-1)

    def entropy_from_logits_with_chunking(logits, chunk_size=2048):
        return entropy_from_logits(logits.float())

    def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
        with torch.no_grad():
            next_value, running, found = 0, 0, []
            for t in reversed(range(values.shape[1])):
                mask = response_mask[:, t]
                delta = token_level_rewards[:, t] + gamma * next_value - values[:, t]
                running = (delta + gamma * lam * running) * mask + (1 - mask) * running
                next_value = values[:, t] * mask + (1 - mask) * next_value
                found.append(running)
            advantages = torch.stack(found[::-1], dim=1)
            return masked_whiten(advantages, response_mask), advantages + values

    def compute_grpo_outcome_advantage(
        token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=True, config=None
    ):
        scores = token_level_rewards.sum(-1)
        found = torch.empty_like(scores)
        for i, each in enumerate(index):
            group = scores[[k for k, other in enumerate(index) if other == each]]
            mean, std = (group.mean(), group.std()) if len(group) > 1 else (0.0, 1.0)
            found[i] = (scores[i] - mean) / (std + epsilon) if norm_adv_by_std_in_grpo else scores[i] - mean
        found = found[:, None] * response_mask
        return found, found

    def compute_grpo_vectorized_outcome_advantage(
        token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=True, config=None
    ):
        return compute_grpo_outcome_advantage(
            token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo, config
        )

    def kl_penalty_forward(logprob, ref_logprob, kl_penalty):
        d = logprob - ref_logprob
        if kl_penalty in ("kl", "k1"):
            return d
        if kl_penalty == "abs":
            return d.abs()
        if kl_penalty in ("mse", "k2"):
            return 0.5 * d.square()
        if kl_penalty in ("low_var_kl", "k3"):
            x = (-d).clamp(-20, 20)
            return (x.exp() - x - 1).clamp(-10, 10)
        raise NotImplementedError

    def kl_penalty(logprob, ref_logprob, kl_penalty):
        forward = kl_penalty_forward(logprob, ref_logprob, kl_penalty.removesuffix("+"))
        if not kl_penalty.endswith("+"):
            return forward
        backward = 0.5 * (logprob - ref_logprob).square()
        return backward - backward.detach() + forward.detach()

    def agg_loss(
        loss_mat,
        loss_mask,
        loss_agg_mode,
        dp_size=1,
        batch_num_tokens=None,
        global_batch_size=None,
        loss_scale_factor=None,
    ):
        if loss_agg_mode == "token-mean":
            if batch_num_tokens is None and dp_size > 1:
                raise ValueError("(global) batch_num_tokens is required when dp_size > 1")
            count = loss_mask.sum() if batch_num_tokens is None else batch_num_tokens
            return masked_sum(loss_mat, loss_mask) / count * dp_size
        if loss_agg_mode == "token-sum":
            return masked_sum(loss_mat, loss_mask) * dp_size
        if loss_agg_mode not in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
            raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode}")
        lengths = loss_mask.sum(-1)
        rows = masked_sum(loss_mat, loss_mask, -1)
        if loss_agg_mode == "seq-mean-token-mean":
            rows = rows / (lengths + 1e-8)
        count = (lengths > 0).sum() if global_batch_size is None else global_batch_size
        loss = (rows * (lengths > 0)).sum() / count * dp_size
        if loss_agg_mode.endswith("norm"):
            loss = loss / (loss_mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
        return loss

    def compute_policy_loss_vanilla(
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode="token-mean",
        config=None,
        rollout_is_weights=None,
    ):
        low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
        high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
        c = config.get("clip_ratio_c", 3.0)
        d = (log_prob - old_log_prob).clamp(-20.0, 20.0)
        plain, clipped = -advantages * d.exp(), -advantages * d.exp().clamp(1 - low, 1 + high)
        worst = torch.maximum(plain, clipped)
        losses = torch.where(advantages < 0, torch.min(-advantages * c, worst), worst)
        lower = (worst > -advantages * c) & (advantages < 0)
        if rollout_is_weights is not None:
            losses = losses * rollout_is_weights
        return agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info), {
            "actor/pg_clipfrac": masked_mean((clipped > plain).float(), response_mask).item(),
            "actor/ppo_kl": masked_mean(-d, response_mask).item(),
            "actor/pg_clipfrac_lower": masked_mean(lower.float(), response_mask).item(),
        }

    def compute_value_loss(
        vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode="token-mean", dp_size=1, batch_num_tokens=None,
        global_batch_size=None, loss_scale_factor=None,
    ):  # fmt: skip
        clipped = torch.max(torch.min(vpreds, values + cliprange_value), values - cliprange_value)
        losses = (vpreds - returns) ** 2, (clipped - returns) ** 2
        loss = agg_loss(
            torch.max(*losses),
            response_mask,
            loss_agg_mode,
            dp_size,
            batch_num_tokens,
            global_batch_size,
            loss_scale_factor,
        )
        return 0.5 * loss, masked_mean((losses[1] > losses[0]).float(), response_mask)

    more = policy_losses(agg_loss, masked_mean, later=not version.startswith("0.9"))
    registry = {name.removeprefix("compute_policy_loss_"): f for name, f in more.items()}
    registry["vanilla"] = compute_policy_loss_vanilla
    del registry["reinforce"]  # called by name

    def register_policy_loss(name):
        def register(function):
            registry[name] = function
            return function

        return register

    functions = {**more, **{k: v for k, v in locals().items() if callable(v)}}
    torch_functional = (
        "logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking", "masked_whiten",
    )  # fmt: skip
    module("verl", __version__=version)
    module("verl.utils.torch_functional", **{k: functions[k] for k in torch_functional})
    algos = module(
        "verl.trainer.ppo.core_algos",
        POLICY_LOSS_REGISTRY=registry,
        ADV_ESTIMATOR_REGISTRY={"gae": compute_gae_advantage_return},
        **{k: v for k, v in functions.items() if k not in torch_functional},
    )
    # An engine imports by name.
    module("verl.workers.utils.losses").agg_loss = algos.agg_loss


class VerlConfig:
    """The part of verl's ActorConfig that a policy loss reads."""

    def __init__(
        self, clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=3.0, **global_batch_info
    ):
        self.clip_ratio, self.clip_ratio_low, self.clip_ratio_high = clip_ratio, clip_ratio_low, clip_ratio_high
        self.clip_ratio_c, self.global_batch_info = clip_ratio_c, global_batch_info
        self.tau_pos, self.tau_neg = 1.0, 1.05
        self.policy_loss = types.SimpleNamespace(
            clip_cov_ratio=0.1, clip_cov_lb=0.1, clip_cov_ub=5.0, kl_cov_ratio=0.1, ppo_kl_coef=0.5
        )

    def get(self, name, default=None):
        return getattr(self, name, default)
