"""verl's policy losses beside the vanilla one, in plain PyTorch."""

from __future__ import annotations

import torch


def policy_losses(agg_loss, masked_mean, later):
    """{function: it}. `later`: verl >= 0.10, whose GSPO takes the mean per sequence whatever the mode."""

    def bounds(config):
        low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
        return low, config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high

    def finish(losses, mask, mode, config, weights, **metrics):
        losses = losses if weights is None else losses * weights
        found = {
            f"actor/{k}": masked_mean(x.float(), mask).item() if torch.is_tensor(x) else x for k, x in metrics.items()
        }
        return agg_loss(losses, mask, mode, **config.global_batch_info), found

    def compute_policy_loss_gspo(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="seq-mean-token-mean", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        low, high = bounds(config)
        d = log_prob - old_log_prob
        mean = (d * response_mask).sum(-1) / response_mask.sum(-1).clamp(min=1)
        ratio = (log_prob - log_prob.detach() + mean.detach()[:, None]).clamp(max=10.0).exp()
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
        return finish(
            torch.maximum(plain, clipped), response_mask, "seq-mean-token-mean" if later else loss_agg_mode, config,
            rollout_is_weights, pg_clipfrac=clipped > plain, ppo_kl=-d, pg_clipfrac_lower=0.0,
        )  # fmt: skip

    def compute_policy_loss_sapo(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="seq-mean-token-mean", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        d = (log_prob - old_log_prob).clamp(-20.0, 20.0)
        tau = torch.where(advantages > 0, config.tau_pos, config.tau_neg).to(d.dtype)
        gate = torch.sigmoid(tau * (d.exp() - 1)) * 4 / tau
        return finish(
            -gate * advantages, response_mask, "seq-mean-token-mean", config, rollout_is_weights, pg_clipfrac=0.0,
            ppo_kl=-d, pg_clipfrac_lower=0.0,
        )  # fmt: skip

    def compute_policy_loss_gpg(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        return finish(-log_prob * advantages, response_mask, loss_agg_mode, config, rollout_is_weights)

    def compute_policy_loss_clip_cov(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        low, high = bounds(config)
        options, real = config.policy_loss, response_mask > 0
        d = log_prob - old_log_prob
        plain, clipped = -advantages * d.exp(), -advantages * d.exp().clamp(1 - low, 1 + high)
        centred = [x - masked_mean(x, response_mask) for x in (advantages, log_prob.detach())]
        covariance = centred[0] * centred[1]
        inside = (covariance < options.clip_cov_ub) & (covariance > options.clip_cov_lb)
        candidates = torch.nonzero(inside & real & ~(clipped > plain))
        keep = torch.ones_like(advantages)
        if len(candidates):
            count = max(int(options.clip_cov_ratio * response_mask.sum().item()), 1)
            rows, columns = candidates[torch.randperm(len(candidates))[:count]].T
            keep[rows, columns] = 0
        return finish(
            torch.maximum(plain, clipped) * keep, response_mask, loss_agg_mode, config, rollout_is_weights,
            pg_clipfrac=keep == 0, ppo_kl=-d,
        )  # fmt: skip

    def compute_policy_loss_kl_cov(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        d = log_prob - old_log_prob
        places = torch.nonzero((response_mask > 0).reshape(-1))[:, 0]
        chosen = torch.zeros(advantages.numel(), dtype=torch.bool)
        if len(places):
            a, logp = (x.detach().reshape(-1)[places] for x in (advantages, log_prob))
            covariance = (a - a.mean()) * (logp - logp.mean())
            chosen[places[covariance.topk(max(1, int(len(places) * config.policy_loss.kl_cov_ratio))).indices]] = True
        losses = -advantages * d.exp() + config.policy_loss.ppo_kl_coef * d.abs() * chosen.reshape(d.shape)
        return finish(losses, response_mask, loss_agg_mode, config, rollout_is_weights, ppo_kl=d.abs())

    def compute_policy_loss_geo_mean(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        low, high = bounds(config)
        rows = lambda x: (x * response_mask).sum(-1) / (response_mask.sum(-1) + 1e-8)
        d, sign = log_prob - old_log_prob, advantages.sign()
        bounded = d.clamp(-low, high)
        losses = -rows(advantages) * rows(sign * torch.min(sign * d, sign * bounded)).exp()
        if rollout_is_weights is not None:
            losses = losses * rows((rollout_is_weights + 1e-10).log()).exp()
        outside = d != bounded
        return losses.mean(), {
            "actor/pg_clipfrac": masked_mean((outside & (advantages > 0)).float(), response_mask).item(),
            "actor/ppo_kl": masked_mean(-d, response_mask).item(),
            "actor/pg_clipfrac_lower": masked_mean((outside & (advantages < 0)).float(), response_mask).item(),
        }

    def compute_policy_loss_cispo(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        low, high = bounds(config)
        d = (log_prob - old_log_prob).clamp(-20.0, 20.0)
        ratio = d.exp().detach()
        weight = ratio.clamp(1 - low, 1 + high)
        return finish(
            -weight * advantages * log_prob, response_mask, loss_agg_mode, config, rollout_is_weights,
            pg_clipfrac=ratio != weight, ppo_kl=-d, pg_clipfrac_lower=0.0,
        )  # fmt: skip

    def compute_policy_loss_reinforce(
        rollout_log_prob, log_prob, advantages, response_mask, loss_agg_mode="seq-mean-token-sum", config=None,
        rollout_is_weights=None,
    ):  # fmt: skip
        losses, kl = -advantages * log_prob, rollout_log_prob - log_prob
        return finish(losses, response_mask, loss_agg_mode, config, rollout_is_weights, ppo_kl=kl)

    return {name: f for name, f in locals().items() if name.startswith("compute_policy_loss_")}
