"""verl's losses: aggregation, value loss, its registry of policy losses, and our recipes in that registry."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.integrations._compare import Unsupported, as_mask, common_dtype, constants
from rlhf_fast.integrations._patch import numbers
from rlhf_fast.integrations._reduction import aggregate
from rlhf_fast.losses import RECIPES, policy_loss
from rlhf_fast.ops.ppo_loss import clip_range, ppo_loss
from rlhf_fast.surrogates import RATIO_CLAMP

ALGOS = "verl.trainer.ppo.core_algos"

MODES = {
    "token-mean": ("token-mean", "tokens"),
    "token-sum": ("token-sum", None),
    "seq-mean-token-sum": ("seq-mean-token-sum", "sequences"),
    "seq-mean-token-sum-norm": ("seq-mean-token-sum", "sequences"),
    "seq-mean-token-mean": ("seq-mean-token-mean", "sequences"),
}
"""{loss_agg_mode: (reduction, what it divides by)}."""


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
    return how.scaled(aggregate(loss_mat, loss_mask, how.kind, how.normalizer)).to(common_dtype(loss_mat, loss_mask))


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


class _Call(NamedTuple):
    """Arguments of one of verl's policy losses."""

    logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    """Real tokens, bool."""
    log_ratio: Tensor
    """log_prob - old_log_prob without gradient, 0 where masked, not clamped."""
    config: Any
    weights: Tensor | None
    """rollout_is_weights."""


Prepared = tuple[dict[str, Any], dict[str, Tensor | None]]
"""(keywords of `policy_loss`, {metric: a number per token whose mean it is, None for 0})."""


def _replacement(
    recipe: str,
    prepare: Callable[[_Call], Prepared],
    *,
    mode: str = "token-mean",
    reduce: Callable[[str, Tensor, Any], _Reduction] = _reduction,
    ratio: str = "clamped",
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """One of verl's policy losses as a recipe of rlhf_fast.losses.

    mode: default of loss_agg_mode. reduce: what verl makes of the mode. ratio: "clamped" to +-20 in the logarithm like ours,
    "free", or "none" for a loss without one.
    """

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = mode,
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if config is None:
            raise Unsupported("no config")
        how = reduce(loss_agg_mode, response_mask, config)
        constants(old_log_prob=old_log_prob, advantages=advantages, rollout_is_weights=rollout_is_weights)
        real = as_mask(response_mask)
        with torch.no_grad():
            log_ratio = (log_prob - old_log_prob).where(real, 0.0)
            if ratio == "free" and bool((log_ratio.abs() > RATIO_CLAMP).any()):
                raise Unsupported(f"a log-ratio beyond {RATIO_CLAMP:g}, which verl does not clamp here")
            keywords, columns = prepare(_Call(log_prob, advantages, real, log_ratio, config, rollout_is_weights))
            metrics = _means(columns, real)
        keywords = {"importance_weights": rollout_is_weights, **keywords}
        found = policy_loss(
            recipe,
            log_prob,
            None if ratio == "none" else old_log_prob,
            advantages,
            real,
            reduction=how.kind,
            normalizer=how.normalizer,
            **keywords,
        )
        used = (log_prob, advantages, response_mask, rollout_is_weights, *(() if ratio == "none" else (old_log_prob,)))
        return how.scaled(found.loss).to(common_dtype(*used)), metrics

    loss.__name__ = loss.__qualname__ = f"compute_policy_loss_{recipe}"
    loss.__doc__ = f"(B, T) -> policy_loss({recipe!r}) with verl's numbers, and verl's metrics in one transfer."
    return loss


def _means(columns: Mapping[str, Tensor | None], mask: Tensor) -> dict[str, float]:
    """Means over the real tokens, 0 without any."""
    given = {name: x for name, x in columns.items() if x is not None}
    means: list[float] = []
    if given:
        count = mask.sum().clamp(min=1)
        means = torch.stack([x.where(mask, 0.0).sum() / count for x in given.values()]).tolist()
    return {**dict.fromkeys(columns, 0.0), **dict(zip(given, means, strict=True))}


def _metrics(kl: Tensor, clipped: Tensor | None = None, lower: Tensor | None = None) -> dict[str, Tensor | None]:
    columns = {"actor/pg_clipfrac": clipped, "actor/ppo_kl": -kl, "actor/pg_clipfrac_lower": lower}
    return {name: None if x is None else x.to(kl.dtype) for name, x in columns.items()}


def _gspo(c: _Call) -> Prepared:
    low, high = _clips(c.config)
    lengths = c.mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = (c.log_ratio.sum(-1, keepdim=True) / lengths).clamp(max=10.0).exp()
    A = c.advantages
    clipped = -A * ratio.clamp(1 - low, 1 + high) > -A * ratio
    return {"clip": (low, high)}, _metrics(c.log_ratio, clipped)


def _sapo(c: _Call) -> Prepared:
    taus = {"tau_positive": float(c.config.tau_pos), "tau_negative": float(c.config.tau_neg)}
    return {"options": taus}, _metrics(_clamped(c.log_ratio))


def _cispo(c: _Call) -> Prepared:
    low, high = _clips(c.config)
    d = _clamped(c.log_ratio)
    ratio = d.exp()
    # No ratio is below 0, and verl's examples leave the lower bound out with a clip_ratio_low of 10.
    return {"clip": (min(low, 1.0), high)}, _metrics(d, ratio != ratio.clamp(1 - low, 1 + high))


def _gpg(c: _Call) -> Prepared:
    return {}, {}


def _clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-RATIO_CLAMP, RATIO_CLAMP)


def _geo_mean(c: _Call) -> Prepared:
    """verl averages advantages and the logarithms of the weights over a sequence, and the losses over all rows."""
    low, high = _clips(c.config)
    rows = lambda x: x.where(c.mask, 0.0).sum(-1, keepdim=True) / (c.mask.sum(-1, keepdim=True) + 1e-8)
    d, A = c.log_ratio, c.advantages
    first = A.gather(-1, c.mask.to(torch.uint8).argmax(-1, keepdim=True))
    if bool(((first != A) & c.mask).any()):
        raise Unsupported("advantages that differ within a sequence")
    outside = d != d.clamp(-low, high)
    keywords: dict[str, Any] = {"clip": (low, high)}
    if c.weights is not None:
        keywords["importance_weights"] = rows((c.weights + 1e-10).log()).exp().expand_as(d)
    return keywords, _metrics(d, outside & (A > 0), outside & (A < 0))


def _verl_mean(x: Tensor, mask: Tensor) -> Tensor:
    """verl's mean to the bit: which tokens are chosen hangs on it."""
    return x.where(mask, 0.0).sum() / (mask.sum() + 1e-8)


def _clip_cov(c: _Call) -> Prepared:
    """Draws the tokens as verl does, from the same random numbers."""
    low, high = clip_range("policy_loss", _clips(c.config))  # what is refused is refused before it draws
    options = c.config.policy_loss
    fraction, least, most = (
        default if given is None else given
        for given, default in (
            (options.clip_cov_ratio, 0.0002), (options.clip_cov_lb, 1.0), (options.clip_cov_ub, 5.0),
        )
    )  # fmt: skip
    A, logp, ratio = c.advantages, c.logprobs.detach(), c.log_ratio.exp()
    clipped = -A * ratio.clamp(1 - low, 1 + high) > -A * ratio
    covariance = (A - _verl_mean(A, c.mask)) * (logp - _verl_mean(logp, c.mask))
    candidates = torch.nonzero(c.mask & ~clipped & (covariance > least) & (covariance < most))
    selected = torch.zeros_like(c.mask)
    if len(candidates):
        drawn = candidates[torch.randperm(len(candidates))[: max(int(fraction * int(c.mask.sum())), 1)]]
        selected[drawn[:, 0], drawn[:, 1]] = True
    weights = (~selected).to(c.log_ratio.dtype)
    weights = weights if c.weights is None else weights * c.weights
    found = _metrics(c.log_ratio, selected)
    del found["actor/pg_clipfrac_lower"]
    return {"clip": (low, high), "importance_weights": weights}, found


def _kl_cov(c: _Call) -> Prepared:
    """Takes the tokens as verl does, which breaks ties as topk on the CPU does."""
    options = c.config.policy_loss
    fraction = 0.0002 if options.kl_cov_ratio is None else options.kl_cov_ratio
    penalty = 1.0 if options.ppo_kl_coef is None else options.ppo_kl_coef
    places = torch.nonzero(c.mask.reshape(-1))[:, 0]
    selected = torch.zeros_like(c.mask)
    if len(places):
        A, logp = (x.detach()[c.mask].cpu() for x in (c.advantages, c.logprobs))
        covariance = (A - A.mean()) * (logp - logp.mean())
        largest = torch.topk(covariance, max(1, int(len(covariance) * fraction))).indices
        selected.view(-1)[places[largest.to(places.device)]] = True
    return {"options": {"penalty": float(penalty)}, "selected": selected}, {"actor/ppo_kl": c.log_ratio.abs()}


def _reinforce(c: _Call) -> Prepared:
    return {}, {"actor/ppo_kl": -c.log_ratio}


def _per_sequence(mode: str, mask: Tensor, config: Any) -> _Reduction:
    return _reduction("seq-mean-token-mean", mask, config)


def _gspo_reduction(mode: str, mask: Tensor, config: Any) -> _Reduction:
    """verl 0.9 lets the mode decide, later ones do not."""
    later = numbers(getattr(sys.modules.get("verl"), "__version__", "")) >= (0, 10)
    return _reduction("seq-mean-token-mean" if later else mode, mask, config)


def _over_all_rows(mode: str, mask: Tensor, config: Any) -> _Reduction:
    """The mean over the rows at hand, those without a real token too, whatever the mode and the global numbers."""
    return _Reduction("seq-mean-token-mean", mask, global_batch_size=max(1, len(mask)))


REPLACED: dict[str, Callable[..., tuple[Tensor, dict[str, Any]]]] = {
    "gspo": _replacement("gspo_token", _gspo, mode="seq-mean-token-mean", reduce=_gspo_reduction, ratio="free"),
    "sapo": _replacement("sapo", _sapo, mode="seq-mean-token-mean", reduce=_per_sequence),
    "gpg": _replacement("gpg", _gpg, ratio="none"),
    # Clip-Cov is PPO without some tokens: as weights of 0 it is one pass.
    "clip_cov": _replacement("ppo", _clip_cov, ratio="free"),
    "kl_cov": _replacement("kl_cov", _kl_cov, ratio="free"),
    "geo_mean": _replacement("gmpo", _geo_mean, reduce=_over_all_rows, ratio="free"),
    "cispo": _replacement("cispo", _cispo),
}
"""{name in verl's registry: ours}; dppo_tv, dppo_kl and dro have no recipe here, and bypass_mode calls the others."""

_score = _replacement("reinforce", _reinforce, mode="seq-mean-token-sum", ratio="none")


def compute_policy_loss_reinforce(
    rollout_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """(B, T) -> REINFORCE and its metrics, which bypass_mode calls."""
    return _score(rollout_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)


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
