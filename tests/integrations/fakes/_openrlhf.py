"""OpenRLHF in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from integrations.fakes._module import log_softmax_rows, module


def openrlhf(broken=(), version="0.11.2"):
    """`broken`: modules whose import fails, as without deepspeed or flash_attn."""

    def mean(x, mask, dim=None):
        return (x * mask).sum(dim) / mask.sum(dim)

    def aggregate_loss(
        loss, loss_mask, token_level_loss=True, dp_size=1, batch_num_tokens=None, global_batch_size=None
    ):
        total = loss * loss_mask
        if token_level_loss:
            return mean(loss, loss_mask) if batch_num_tokens is None else total.sum() / batch_num_tokens * dp_size
        per_row = total.sum(-1) / (loss_mask.sum(-1) + 1e-8)
        real = (loss_mask.sum(-1) > 0).float()
        rows = global_batch_size
        return mean(per_row, real) if rows is None else (per_row * real).sum() / rows * dp_size

    class PolicyLoss(torch.nn.Module):
        """As in 0.11.2; 0.11.0 has other names for the correction and returns no filtered share."""

        def __init__(
            self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, policy_loss_type="ppo", **correction
        ):  # fmt: skip
            super().__init__()
            self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
            self.token_level_loss, self.policy_loss_type = (
                token_level_loss and policy_loss_type != "gspo",
                policy_loss_type,
            )
            later = {
                "is_correction_level": "off", "is_correction_mode": "mask", "is_correction_gating": "ratio",
                "is_correction_threshold": (0.5, 5.0),
            }  # fmt: skip
            first = {
                "enable_vllm_is_correction": False, "vllm_is_truncated_threshold": None, "vllm_is_correction_type": "tis"
            }  # fmt: skip
            vars(self).update({**(first if version == "0.11.0" else later), **correction})

        def weights(self, old, rollout, mask):
            """(weight per token, filtered)."""
            if version == "0.11.0":
                kind = {"tis": "token clip", "icepop": "token mask", "seq-mask-tis": "seq mask"}[
                    self.vllm_is_correction_type
                ]
                low, high = self.vllm_is_truncated_threshold
            else:
                kind = f"{self.is_correction_level} {self.is_correction_mode}"
                low, high = self.is_correction_threshold
            w = (old - rollout).exp()
            if self.policy_loss_type == "ppo" and getattr(self, "is_correction_gating", "") == "tv":
                outside = (rollout.exp() - old.exp()).abs() > high
                return w * ~outside, mean(outside.float(), mask)
            if kind == "seq mask":
                inside = mean(old - rollout, mask, -1).exp()
                inside = (inside >= low) & (inside <= high)
                return w * inside[:, None], (~inside).float().mean()
            outside = (w < low) | (w > high)
            return w.clamp(low, high) if kind == "token clip" else w * ~outside, mean(outside.float(), mask)

        def forward(
            self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
            batch_num_tokens=None, global_batch_size=None,
        ):  # fmt: skip
            corrects = getattr(self, "is_correction_level", "off") != "off" or getattr(
                self, "enable_vllm_is_correction", False
            )
            raw = log_probs - old_log_probs
            ratio = raw.clamp(-20.0, 20.0).exp()
            if self.policy_loss_type == "gspo":
                d = log_probs - rollout_log_probs if corrects else raw
                ratio = ((d * action_mask).sum(-1) / action_mask.sum(-1).clamp(min=1)).exp()[:, None] * action_mask
            one, two = ratio * advantages, ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high) * advantages
            best = torch.min(one, two)
            if self.dual_clip is not None:
                best = torch.where(advantages < 0, torch.max(best, self.dual_clip * advantages), best)
            rollout_kl = filtered = None
            if corrects and self.policy_loss_type == "ppo":
                weights, filtered = self.weights(old_log_probs, rollout_log_probs, action_mask)
                best = weights * best
                rollout_kl = mean(rollout_log_probs - old_log_probs, action_mask)
            loss = aggregate_loss(
                -best, action_mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size
            )
            found = loss, mean((two < one).float(), action_mask), mean(-raw.detach(), action_mask), rollout_kl
            return found if version == "0.11.0" else (*found, filtered)

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
            return 0.5 * aggregate_loss(
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

    class LogExpLoss(torch.nn.Module):
        def forward(self, chosen_reward, reject_reward, margin=None):
            return torch.log(1 + torch.exp(reject_reward - chosen_reward)).mean()

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

        def get_cumulative_returns(self, rewards, action_mask, gamma):
            rewards, running, found = rewards * action_mask, 0, []
            for t in reversed(range(rewards.shape[1])):
                running = rewards[:, t] + gamma * running
                found.append(running)
            return torch.stack(found[::-1], dim=1)

    parts = {
        "openrlhf.models.loss": (aggregate_loss, PolicyLoss, ValueLoss, DPOLoss, PairWiseLoss, LogExpLoss),
        "openrlhf.models.utils": (log_probs_from_logits, compute_approx_kl, compute_reward),
        "openrlhf.trainer.ppo_utils.experience_maker": (RemoteExperienceMaker,),
    }
    module("openrlhf", __version__=version)
    for name, members in parts.items():
        if name not in broken:
            module(name, **{m.__name__: m for m in members})
