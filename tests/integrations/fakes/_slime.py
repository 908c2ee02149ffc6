"""slime in plain PyTorch."""

from __future__ import annotations

import importlib
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

    def compute_opsm_mask(args, full_log_probs, full_old_log_probs, advantages, loss_masks):
        kept, share = [], torch.tensor(0.0)
        for new, old, a, m in zip(full_log_probs, full_old_log_probs, advantages, loss_masks, strict=True):
            stale = ((old - new) * m).sum() / m.sum().clamp(min=1) > args.opsm_delta
            dropped = ((a < 0) & stale).float()
            share = share + dropped.sum() / m.sum().clamp(min=1)
            kept.append(1 - dropped)
        return torch.cat(kept), share

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
        compute_opsm_mask=compute_opsm_mask,
        vanilla_gae=vanilla_gae,
        chunked_gae=chunked_gae,
        calculate_log_probs_and_entropy=calculate_log_probs_and_entropy,
    )

    def get_log_probs_and_entropy(
        logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False, top_p_token_ids=None,
        top_p_token_offsets=None,
    ):  # fmt: skip
        """Every response is the end of its sequence in logits (1, T, V)."""
        found, end = {"log_probs": [], "entropy": []}, 0
        for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
            end += total
            rows = logits[0, end - response - 1 : end - 1]
            logps, entropy = utils.calculate_log_probs_and_entropy(rows, tokens[-response:], None, with_entropy)
            found["log_probs"].append(logps[:, 0])
            found["entropy"].append(entropy)
        return None, found

    def get_sum_of_sample_mean(
        total_lengths, response_lengths, loss_masks, sample_denoms=None, calculate_per_token_loss=False
    ):
        denoms = [m.sum() for m in loss_masks] if sample_denoms is None else sample_denoms

        def reduce(x):
            parts = zip(x.split(response_lengths), loss_masks, denoms, strict=True)
            return sum((p * m).sum() / (1.0 if calculate_per_token_loss else d.clamp(min=1)) for p, m, d in parts)

        return reduce

    def get_rollout_top_p_logprob_kwargs(args, batch):
        if args.rollout_top_p == 1.0:
            return {}
        return {name: batch[f"rollout_{name}"] for name in ("top_p_token_ids", "top_p_token_offsets")}

    def load_function(path):
        home, _, name = path.rpartition(".")
        return getattr(importlib.import_module(home), name)

    module("slime.utils.misc", load_function=load_function)
    module(
        "slime.backends.megatron_utils.loss",
        get_log_probs_and_entropy=get_log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs=get_rollout_top_p_logprob_kwargs,
        get_sum_of_sample_mean=get_sum_of_sample_mean,
    )
    mpu = types.SimpleNamespace(get_context_parallel_world_size=lambda: 1)
    module("megatron.core", mpu=mpu)
    return mpu
