"""slime's policy loss with any recipe of ours, and what its options plug into: rollout corrections, reducers, stale answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.corrections import off_policy_mask, rollout_correction
from rlhf_fast.integrations._compare import Unsupported
from rlhf_fast.losses import RECIPES, policy_loss
from rlhf_fast.ops.kl_estimate import kl_estimate
from rlhf_fast.reference._reduce import spread, sums, token_weights

KL_KINDS = {"k1": ("k1", None), "k2": ("k2", None), "k3": ("k3", None), "low_var_kl": ("k3", 10.0)}
"""{kl_loss_type: (estimator, bound of the estimate)}."""


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, kl_loss_type: str, importance_ratio: Tensor | None = None
) -> Tensor:
    """(...) -> (...) fp32; an importance ratio comes before the bound, with its gradient."""
    if kl_loss_type not in KL_KINDS:
        raise Unsupported(f"kl_loss_type {kl_loss_type!r}")
    kind, clamp = KL_KINDS[kl_loss_type]
    if importance_ratio is None:
        return kl_estimate(log_probs.float(), log_probs_base.float(), kind, clamp=clamp)
    found = importance_ratio * kl_estimate(log_probs.float(), log_probs_base.float(), kind)
    return found if clamp is None else found.clamp(-clamp, clamp)


def compute_opsm_mask(
    args: Any,
    full_log_probs: Sequence[Tensor],
    full_old_log_probs: Sequence[Tensor],
    advantages: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Lists of (T_i,) -> 0 for the tokens of stale answers with a negative advantage and 1 for the rest, (N,), and their number
    over the real tokens of their answer, summed over the answers."""
    A, real = torch.cat(list(advantages)), torch.cat(list(loss_masks)) != 0
    boundaries = boundaries_of(full_log_probs, A.device)
    new, old = (torch.cat(list(x)).detach() for x in (full_log_probs, full_old_log_probs))
    delta = float(args.opsm_delta)
    kept = off_policy_mask(new, old, torch.full_like(A, -1.0), real, threshold=delta, cu_seqlens=boundaries)
    stale = spread(sums((real & ~kept).float(), boundaries), A, boundaries) > 0
    dropped = (stale & (A < 0)).float()
    share = sums(dropped, boundaries) / sums(real.float(), boundaries).clamp(min=1)
    return 1 - dropped, share.sum()


def tis(
    kind: str,
    args: Any,
    *,
    pg_loss: Tensor,
    train_log_probs: Sequence[Tensor],
    rollout_log_probs: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    **_: Any,
) -> tuple[Tensor, Sequence[Tensor], dict[str, Tensor]]:
    """For --custom-tis-function-path: losses times the weights of `rollout_correction` of a kind, bounded by tis_clip_low and
    tis_clip; masks as they were; and slime's metrics (N,).

    Raises ValueError with context parallelism for the kinds that look at whole answers.
    """
    old, rollout = torch.cat(list(train_log_probs)), torch.cat(list(rollout_log_probs))
    low, high = float(args.tis_clip_low), float(args.tis_clip)
    if kind.startswith("token"):
        real, boundaries = torch.ones_like(old, dtype=torch.bool), torch.tensor([0, len(old)], device=old.device)
    else:
        one_context_rank(f"tis_{kind.replace('-', '_')}")
        real, boundaries = torch.cat(list(loss_masks)) != 0, boundaries_of(train_log_probs, old.device)
    weights = rollout_correction(
        old.detach(), rollout.detach(), real, kind=kind, bounds=(low, high), cu_seqlens=boundaries
    ).weights
    with torch.no_grad():
        ratio = (old - rollout).exp()
        metrics = {"tis": ratio, "tis_clipfrac": ((weights != ratio) & real).float(), "tis_abs": (ratio - 1).abs()}
    return pg_loss * weights, loss_masks, metrics


def reducer(
    reduction: str,
    horizon: int,
    total_lengths: Sequence[int],
    response_lengths: Sequence[int],
    loss_masks: Sequence[Tensor],
    calculate_per_token_loss: bool = False,
) -> Callable[[Tensor], Tensor]:
    """For --custom-pg-loss-reducer-function-path: the sum over the answers of their token sums (or means) over the horizon; slime
    divides by their number.

    Raises ValueError with context parallelism, and with --calculate-per-token-loss, where slime divides by the tokens.
    """
    one_context_rank("reducer")
    if calculate_per_token_loss:
        raise ValueError("reducer: argument 'calculate_per_token_loss' got True, expected False")
    masks = torch.cat(list(loss_masks))
    real = masks != 0
    boundaries = boundaries_of(loss_masks, masks.device)

    def reduce(x: Tensor) -> Tensor:
        weights = token_weights(real, x.dtype, reduction, None, float(horizon), boundaries)
        return (weights * x.where(real, 0.0)).sum()

    return reduce


def boundaries_of(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([0, *(len(x) for x in rows)]).cumsum(0).to(device)


def one_context_rank(op: str) -> None:
    size = importlib.import_module("megatron.core").mpu.get_context_parallel_world_size()
    if size > 1:
        raise ValueError(f"{op}: context parallelism got {size} ranks, expected 1; slime's own function serves more")


def weights_of(reduce: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Weight of every token in a linear reduction: its gradient."""
    x = torch.zeros_like(like, requires_grad=True)
    with torch.enable_grad():
        return torch.autograd.grad(reduce(x), x)[0]


def custom_policy_loss(
    recipe: str, args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """For --custom-loss-function-path: any recipe of rlhf_fast.losses, then slime's entropy and KL terms.

    logits (1, T, V); advantages, log_probs, ref_log_probs and loss_masks of the batch are lists of (T_i,), one per response.
    Clips, coefficients and the reduction are slime's, and so are use_rollout_logprobs, use_opsm, use_tis (a TIS function gets
    losses of 1, so what it returns are the weights), custom reducers of the policy term, use_unbiased_kl and nucleus masks.
    pg_clipfrac is the share of clipped tokens times the number of answers.

    Raises ValueError with context parallelism, where a rank holds a part of every response.
    """
    one_context_rank(f"policy_loss_{recipe}")
    slime = importlib.import_module("slime.backends.megatron_utils.loss")
    load = importlib.import_module("slime.utils.misc").load_function
    lengths = {name: batch[name] for name in ("total_lengths", "response_lengths")}
    masks = batch["loss_masks"]
    _, found = slime.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        with_entropy=True,
        **lengths,
        **slime.get_rollout_top_p_logprob_kwargs(args, batch),
    )
    logprobs, entropy = torch.cat(found["log_probs"]), torch.cat(found["entropy"])
    trained = batch.get("log_probs") or [x.detach() for x in found["log_probs"]]
    before = batch["rollout_log_probs"] if args.use_rollout_logprobs else trained
    old = torch.cat(before)
    factor = torch.ones_like(logprobs)
    reported: dict[str, Tensor] = {}
    measure = reduce = sum_of_sample_mean
    if args.use_opsm:
        factor, reported["opsm_clipfrac"] = compute_opsm_mask(
            args, found["log_probs"], before, batch["advantages"], masks
        )
    if args.use_tis or args.get_mismatch_metrics:
        path = args.custom_tis_function_path
        correct = load(path) if path is not None else lambda *x, **y: tis("token-tis", *x, **y)
        factor, masks, metrics = correct(
            args=args,
            pg_loss=factor,
            train_log_probs=trained,
            rollout_log_probs=batch["rollout_log_probs"],
            loss_masks=masks,
            **lengths,
        )
        reduce = slime.get_sum_of_sample_mean(
            *lengths.values(), masks, batch["rollout_mask_sums"], args.calculate_per_token_loss
        )
        reported["ois"] = measure((logprobs.detach() - old).exp())
        reported |= {name: measure(x) for name, x in metrics.items()}
    path = getattr(args, "custom_pg_loss_reducer_function_path", None)
    of_policy = reduce if path is None else load(path)(*lengths.values(), masks, args.calculate_per_token_loss)
    policy = policy_loss(
        recipe,
        logprobs,
        old,
        torch.cat(batch["advantages"]),
        torch.cat(batch["loss_masks"]) != 0,
        clip=(float(args.eps_clip), float(args.eps_clip_high)) if "clip" in RECIPES[recipe].reads else None,
        dual_clip=args.eps_clip_c if "dual_clip" in RECIPES[recipe].reads else None,
        importance_weights=weights_of(of_policy, logprobs) * factor,
        reduction="token-sum",
        cu_seqlens=boundaries_of(found["log_probs"], logprobs.device),
    )
    reported["pg_loss"] = policy.loss
    reported["entropy_loss"] = reduce(entropy)
    reported["pg_clipfrac"] = policy.stats["clip_fraction"] * reduce(torch.ones_like(logprobs))
    reported["ppo_kl"] = reduce(old - logprobs)
    loss = policy.loss - args.entropy_coef * reported["entropy_loss"]
    if args.use_kl_loss:
        ratio = (logprobs - old).exp() if args.use_unbiased_kl else None
        kl = compute_approx_kl(logprobs, torch.cat(batch["ref_log_probs"]), args.kl_loss_type, ratio)
        reported["kl_loss"] = reduce(kl)
        loss = loss + args.kl_loss_coef * reported["kl_loss"]
    if not logprobs.numel():
        loss = loss + 0 * logits.sum()  # every parameter has a gradient on every rank
    if batch.get("rollout_log_probs"):
        compared = logprobs if args.use_rollout_logprobs else old
        difference = (compared - torch.cat(batch["rollout_log_probs"])).abs()
        reported["train_rollout_logprob_abs_diff"] = reduce(difference)
    return loss, {name: x.detach().clone() for name, x in {"loss": loss, **reported}.items()}
