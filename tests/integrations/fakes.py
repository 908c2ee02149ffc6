"""Small stand-ins for the frameworks: their module paths, names and signatures, with the formulas in plain PyTorch."""

from __future__ import annotations

import sys
import types

import torch
import torch.nn.functional as F


def module(name, **members):
    """A module in sys.modules, and an attribute of its parent; its members are defined in it."""
    made = types.ModuleType(name)
    for key, value in members.items():
        if callable(value) and getattr(value, "__module__", None) == __name__:
            value.__module__ = name
        setattr(made, key, value)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            module(parent)
        setattr(sys.modules[parent], child, made)
    return made


def log_softmax_rows(logits, labels):
    return torch.stack(
        [F.log_softmax(x, -1).gather(-1, i[..., None])[..., 0] for x, i in zip(logits, labels, strict=True)]
    )


# ---------------------------------------------------------------------------------------------------------------- trl


def trl(version="1.16.0"):
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        if temperature != 1.0:
            logits = logits / temperature
        wide = index if index.dim() == logits.dim() else index[..., None]
        found = F.log_softmax(logits, -1).gather(-1, wide)
        found = found if index.dim() == logits.dim() else found[..., 0]
        return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)

    def entropy_from_logits(logits, chunk_size=128):
        logps = F.log_softmax(logits, -1)
        return -(logps.exp() * logps).sum(-1)

    def selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
        logps = selective_log_softmax(logits, index, temperature, row_mask)
        entropy = entropy_from_logits(logits / temperature)
        entropy = entropy if entropy_requires_grad else entropy.detach()
        return logps, entropy if row_mask is None else entropy.masked_fill(row_mask == 0, 0.0)

    class ChunkedLogProbFunction(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
            outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ):  # fmt: skip
            ctx.save_for_backward(hidden, weight, bias, targets)
            ctx.rest = temperature, final_logit_softcapping, logit_scale
            logps, entropy = head(hidden, weight, bias, targets, *ctx.rest)
            z = capped(hidden, weight, bias, *ctx.rest[1:]) / temperature
            extra = {
                "log_sum_sq_probs": 2 * F.log_softmax(z, -1),
                "mean_logits": z.mean(-1),
                "is_top1": z.argmax(-1) == targets,
            }
            extra["log_sum_sq_probs"] = extra["log_sum_sq_probs"].logsumexp(-1)
            given = [extra[name] if name in outputs else None for name in extra]
            ctx.mark_non_differentiable(*(x for x in given if x is not None))
            return logps, entropy if "entropy" in outputs else None, *given

        @staticmethod
        def backward(ctx, grad_logps, grad_entropy, *_):
            *inputs, targets = ctx.saved_tensors
            leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                outputs = head(*leaves, targets, *ctx.rest)
            pairs = [(o, g) for o, g in zip(outputs, (grad_logps, grad_entropy), strict=True) if g is not None]
            grads = iter(
                torch.autograd.grad([o for o, _ in pairs], [x for x in leaves if x is not None], [g for _, g in pairs])
            )
            return *(None if x is None else next(grads) for x in leaves), *[None] * 6

    def capped(hidden, weight, bias, softcap, scale):
        logits = F.linear(hidden, weight, bias).float() * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def head(hidden, weight, bias, targets, temperature, softcap, scale):
        logps = F.log_softmax(capped(hidden, weight, bias, softcap, scale) / temperature, -1)
        return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)

    module("trl", __version__=version)
    module("trl.kernels.chunked_logprob", ChunkedLogProbFunction=ChunkedLogProbFunction)
    utils = module(
        "trl.trainer.utils",
        selective_log_softmax=selective_log_softmax,
        entropy_from_logits=entropy_from_logits,
        selective_log_softmax_and_entropy=selective_log_softmax_and_entropy,
        _ChunkedLogProbFunction=ChunkedLogProbFunction,
    )
    # Trainers import the functions by name.
    module("trl.trainer.rloo_trainer").selective_log_softmax = utils.selective_log_softmax


def old_trl():
    """trl 1.10: no temperature, a head without bias whose entropy has no gradient."""

    class _ChunkedLogProbFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, last_hidden, weight, targets, temperature, chunk_size, softcap=None, logit_scale=1.0):
            ctx.save_for_backward(last_hidden, weight, targets)
            ctx.rest = temperature
            logps = F.log_softmax(F.linear(last_hidden, weight) / temperature, -1)
            return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)

        @staticmethod
        def backward(ctx, grad_logps, grad_entropy):
            hidden, weight, targets = ctx.saved_tensors
            leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
            with torch.enable_grad():
                logps = F.log_softmax(F.linear(*leaves) / ctx.rest, -1).gather(-1, targets[:, None])[:, 0]
            return *torch.autograd.grad(logps, leaves, grad_logps), None, None, None, None, None

    def selective_log_softmax(logits, index):
        return log_softmax_rows(logits, index)

    module("trl", __version__="1.10.0.dev0")
    module(
        "trl.trainer.utils",
        selective_log_softmax=selective_log_softmax,
        _ChunkedLogProbFunction=_ChunkedLogProbFunction,
    )


# --------------------------------------------------------------------------------------------------------------- verl


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

    registry = {"vanilla": compute_policy_loss_vanilla}

    def register_policy_loss(name):
        def register(function):
            registry[name] = function
            return function

        return register

    functions = {k: v for k, v in locals().items() if callable(v)}
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

    def get(self, name, default=None):
        return getattr(self, name, default)


# ----------------------------------------------------------------------------------------------------------- openrlhf


def openrlhf(broken=()):
    """`broken`: modules whose import fails, as without deepspeed or flash_attn."""

    def mean(x, mask, dim=None):
        return (x * mask).sum(dim) / mask.sum(dim)

    def aggregate(loss, mask, token_level, dp_size, tokens, rows):
        if token_level:
            return mean(loss, mask) if tokens is None else (loss * mask).sum() / tokens * dp_size
        per_row = (loss * mask).sum(-1) / (mask.sum(-1) + 1e-8)
        real = (mask.sum(-1) > 0).float()
        return mean(per_row, real) if rows is None else (per_row * real).sum() / rows * dp_size

    class PolicyLoss(torch.nn.Module):
        def __init__(
            self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, policy_loss_type="ppo",
            is_correction_level="off",
        ):  # fmt: skip
            super().__init__()
            self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
            self.token_level_loss, self.policy_loss_type = token_level_loss, policy_loss_type
            self.is_correction_level = is_correction_level

        def forward(
            self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
            batch_num_tokens=None, global_batch_size=None,
        ):  # fmt: skip
            raw = log_probs - old_log_probs
            ratio = raw.clamp(-20.0, 20.0).exp()
            if self.policy_loss_type == "gspo":
                ratio = (mean(raw, action_mask, -1)).exp()[:, None]
            one, two = ratio * advantages, ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high) * advantages
            best = torch.min(one, two)
            if self.dual_clip is not None:
                best = torch.where(advantages < 0, torch.max(best, self.dual_clip * advantages), best)
            loss = aggregate(-best, action_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
            clipped = mean((two < one).float(), action_mask)
            return loss, clipped, mean(-raw.detach(), action_mask), None, None

    class ValueLoss(torch.nn.Module):
        def __init__(self, clip_eps=None, token_level_loss=True):
            super().__init__()
            self.clip_eps, self.token_level_loss = clip_eps, token_level_loss

        def forward(
            self,
            values,
            old_values,
            returns,
            action_mask=None,
            dp_size=1,
            batch_num_tokens=None,
            global_batch_size=None,
        ):
            loss = (values - returns) ** 2
            if self.clip_eps is not None:
                clipped = old_values + (values - old_values).clamp(-self.clip_eps, self.clip_eps)
                loss = torch.max((clipped - returns) ** 2, loss)
            return 0.5 * aggregate(
                loss, action_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
            )

    class DPOLoss(torch.nn.Module):
        def __init__(self, beta, label_smoothing=0.0, ipo=False):
            super().__init__()
            self.beta, self.label_smoothing, self.ipo = beta, label_smoothing, ipo

        def forward(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
            chosen, rejected = (
                policy_chosen_logps - reference_chosen_logps,
                policy_rejected_logps - reference_rejected_logps,
            )
            d, e = chosen - rejected, self.label_smoothing
            if self.ipo:
                losses = (d - 1 / (2 * self.beta)) ** 2
            else:
                losses = -F.logsigmoid(self.beta * d) * (1 - e) - F.logsigmoid(-self.beta * d) * e
            return losses.mean(), self.beta * chosen.detach(), self.beta * rejected.detach()

    class PairWiseLoss(torch.nn.Module):
        def forward(self, chosen_reward, reject_reward, margin=None):
            return -F.logsigmoid(chosen_reward - reject_reward - (0 if margin is None else margin)).mean()

    def log_probs_from_logits(logits, labels, temperature=1.0):
        if temperature != 1.0:
            logits.div_(temperature)
        return log_softmax_rows(logits, labels)

    def compute_approx_kl(log_probs, log_probs_base, log_probs_old=None, kl_estimator="k1", unbiased_gradient=False):
        d = log_probs.float() - log_probs_base.float()
        value = {
            "k1": lambda: d,
            "k2": lambda: d**2 / 2,
            "k3": lambda: (-d.clamp(min=-10)).exp() - 1 + d.clamp(min=-10),
        }
        if kl_estimator not in value:
            raise ValueError(f"Unknown kl_estimator: {kl_estimator}")
        found = value[kl_estimator]().clamp(-10, 10)
        if not unbiased_gradient:
            return found
        weight = 1.0 if log_probs_old is None else (log_probs - log_probs_old).exp().clamp(max=10.0).detach()
        surrogate = weight * d**2 / 2
        return found.detach() + surrogate - surrogate.detach()

    def compute_reward(r, kl_coef, kl, action_mask=None, reward_clip_range=None):
        if reward_clip_range:
            r = r.clamp(*reward_clip_range)
        last = action_mask.shape[1] - 1 - action_mask.long().fliplr().argmax(1, keepdim=True)
        return torch.zeros_like(kl).scatter_(1, last, r[:, None].to(kl.dtype)) - max(kl_coef, 0.0) * kl

    class RemoteExperienceMaker:
        def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd):
            values, rewards = values * action_mask, rewards * action_mask
            running, found = 0, []
            for t in reversed(range(values.shape[1])):
                following = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
                running = rewards[:, t] + gamma * following - values[:, t] + gamma * lambd * running
                found.append(running)
            advantages = torch.stack(found[::-1], dim=1)
            return advantages, advantages + values

    parts = {
        "openrlhf.models.loss": (PolicyLoss, ValueLoss, DPOLoss, PairWiseLoss),
        "openrlhf.models.utils": (log_probs_from_logits, compute_approx_kl, compute_reward),
        "openrlhf.trainer.ppo_utils.experience_maker": (RemoteExperienceMaker,),
    }
    module("openrlhf", __version__="0.11.2")
    for name, members in parts.items():
        if name not in broken:
            module(name, **{m.__name__: m for m in members})


# -------------------------------------------------------------------------------------------------------------- slime


def slime():
    def compute_approx_kl(log_probs, log_probs_base, kl_loss_type, importance_ratio=None):
        d = log_probs.float() - log_probs_base.float()
        kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d, "low_var_kl": (-d).exp() - 1 + d}[kl_loss_type]
        kl = kl if importance_ratio is None else importance_ratio * kl
        return kl.clamp(-10, 10) if kl_loss_type == "low_var_kl" else kl

    def vanilla_gae(rewards, values, gamma, lambd):
        running, found = torch.zeros_like(rewards[:, 0]), []
        for t in reversed(range(rewards.shape[1])):
            following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
            running = rewards[:, t] + gamma * following - values[:, t] + gamma * lambd * running
            found.append(running)
        advantages = torch.stack(found[::-1], dim=1)
        return advantages, advantages + values

    def chunked_gae(rewards, values, gamma, lambd, chunk_size=128):
        return vanilla_gae(rewards, values, gamma, lambd)

    def calculate_log_probs_and_entropy(
        logits, tokens, tp_group, with_entropy=False, chunk_size=-1, log_prob_keep_mask=None, with_entropy_grad=True
    ):
        if log_prob_keep_mask is not None:
            kept = logits.masked_fill(~log_prob_keep_mask, -torch.inf)
        else:
            kept = logits
        logps = F.log_softmax(kept.float(), -1).gather(-1, tokens[:, None])
        if not with_entropy:
            return logps, None
        full = F.log_softmax(logits.float(), -1)
        entropy = -(full.exp() * full).sum(-1)
        return logps, entropy if with_entropy_grad else entropy.detach()

    module("slime", __version__="0.3.1")
    utils = module(
        "slime.utils.ppo_utils",
        compute_approx_kl=compute_approx_kl,
        vanilla_gae=vanilla_gae,
        chunked_gae=chunked_gae,
        calculate_log_probs_and_entropy=calculate_log_probs_and_entropy,
    )

    def get_log_probs_and_entropy(
        logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False, non_loss_data=True
    ):
        """Every response is the end of its sequence in logits (1, T, V)."""
        found, end = {"log_probs": [], "entropy": []}, 0
        for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
            end += total
            rows = logits[0, end - response - 1 : end - 1]
            logps, entropy = utils.calculate_log_probs_and_entropy(rows, tokens[-response:], None, with_entropy)
            found["log_probs"].append(logps[:, 0])
            found["entropy"].append(entropy)
        return None, found

    module("slime.backends.megatron_utils.loss", get_log_probs_and_entropy=get_log_probs_and_entropy)
    mpu = types.SimpleNamespace(get_context_parallel_world_size=lambda: 1)
    module("megatron.core", mpu=mpu)
    return mpu


MAKERS = {"trl": trl, "verl": verl, "openrlhf": openrlhf, "slime": slime}
