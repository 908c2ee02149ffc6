"""slime in plain PyTorch."""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from integrations.fakes._module import module


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
