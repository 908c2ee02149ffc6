"""slime: log-probs and entropy, KL, GAE; and functions for its dotted-path options.

Supported: slime >= 0.3, < 0.4. slime compiles some of its functions; the replacements run eagerly in their place.

    --custom-advantage-function-path rlhf_fast.integrations.slime.gae_advantages
    --loss-type custom_loss --custom-loss-function-path rlhf_fast.integrations.slime.policy_loss_gspo
                                             (or policy_loss_<any other recipe of rlhf_fast.losses>)
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.integrations._compare import Unsupported, common_dtype, constants, never
from rlhf_fast.integrations._patch import Framework, Socket
from rlhf_fast.losses import RECIPES, policy_loss
from rlhf_fast.ops.advantages import advantages as advantages_op
from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.kl_estimate import kl_estimate
from rlhf_fast.ops.token_logprobs import token_logprobs

UTILS = "slime.utils.ppo_utils"

KL_KINDS = {"k1": ("k1", None), "k2": ("k2", None), "k3": ("k3", None), "low_var_kl": ("k3", 10.0)}
"""{kl_loss_type: (estimator, bound of the estimate)}."""


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, kl_loss_type: str, importance_ratio: Tensor | None = None
) -> Tensor:
    """(...) -> (...) fp32."""
    if importance_ratio is not None:
        raise Unsupported("an importance ratio, which slime applies before the bound")
    if kl_loss_type not in KL_KINDS:
        raise Unsupported(f"kl_loss_type {kl_loss_type!r}")
    kind, clamp = KL_KINDS[kl_loss_type]
    return kl_estimate(log_probs.float(), log_probs_base.float(), kind, clamp=clamp)


def vanilla_gae(rewards: Tensor, values: Tensor, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    """(B, T), every slot real -> advantages and returns, not whitened."""
    constants(rewards=rewards, values=values)
    advantages, returns = gae(rewards, values, gamma=float(gamma), lam=float(lambd))
    dtype = common_dtype(rewards, values)
    return advantages.to(dtype), returns.to(dtype)


def chunked_gae(
    rewards: Tensor, values: Tensor, gamma: float, lambd: float, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """As vanilla_gae; one scan needs no chunks."""
    return vanilla_gae(rewards, values, gamma, lambd)


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(T, V), (T,) -> log-probs (T, 1) and entropy (T,) or None, fp32 each."""
    if log_prob_keep_mask is not None:
        raise Unsupported("log-probs over the kept tokens of a nucleus")
    if _group_size(tp_group) > 1:
        raise Unsupported("a vocabulary that is split over ranks")
    if logits.shape[0] == 0:
        raise Unsupported("no tokens")
    found = token_logprobs(logits, tokens)
    entropy = found.entropy.float() if with_entropy else None
    if entropy is not None and not with_entropy_grad:
        entropy = entropy.detach()
    return found.logprobs.float().unsqueeze(-1), entropy


def _group_size(group: Any) -> int:
    if group is not None and hasattr(group, "size"):
        return group.size()
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def gae_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """For --custom-advantage-function-path: KL, score, GAE and returns of all responses in one pass over packed tokens.

    Reads rewards (one per response), values and kl (lists of (T_i,)) and fills advantages and returns; args.kl_coef, gamma and
    lambd are slime's. Not whitened: --normalize-advantages does that afterwards, over all ranks.

    Raises ValueError with context parallelism, where a rank holds a part of every response.
    """
    _one_context_rank("gae_advantages")
    values, kl = rollout_data["values"], rollout_data["kl"]
    packed, device = torch.cat(values).float(), values[0].device
    per_token = torch.cat(kl).float()
    with torch.no_grad():
        found = advantages_op(
            torch.tensor(rollout_data["rewards"], dtype=torch.float32, device=device),
            packed,
            torch.ones_like(packed, dtype=torch.bool),
            logprobs=per_token,
            ref_logprobs=torch.zeros_like(per_token),
            kl_coef=float(args.kl_coef),
            kl_kind="k1",  # of (kl, 0) is kl
            gamma=float(args.gamma),
            lam=float(args.lambd),
            whiten=False,
            dialect="slime",
            cu_seqlens=_boundaries(values, device),
        )
    sizes = [len(v) for v in values]
    rollout_data["advantages"] = list(found.advantages.split(sizes))
    rollout_data["returns"] = list(found.returns.split(sizes))


def _boundaries(rows: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([0, *(len(x) for x in rows)]).cumsum(0).to(device)


def _one_context_rank(op: str) -> None:
    size = importlib.import_module("megatron.core").mpu.get_context_parallel_world_size()
    if size > 1:
        raise ValueError(f"{op}: context parallelism got {size} ranks, expected 1; slime's own function serves more")


def __getattr__(name: str) -> Any:
    recipe = name.removeprefix("policy_loss_")
    if recipe == name or recipe not in RECIPES or RECIPES[recipe].needs:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return functools.partial(_policy_loss, recipe)


def _policy_loss(
    recipe: str, args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """For --custom-loss-function-path: any recipe of rlhf_fast.losses, then slime's entropy and KL terms.

    logits (1, T, V); advantages, log_probs, ref_log_probs and loss_masks of the batch are lists of (T_i,), one per response.
    Clips, coefficients and the reduction are slime's: sum_of_sample_mean is linear, so its gradient is the weight of a token.

    Raises ValueError with context parallelism, where a rank holds a part of every response.
    """
    _one_context_rank(f"policy_loss_{recipe}")
    slime = importlib.import_module("slime.backends.megatron_utils.loss")
    _, found = slime.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
    )
    logprobs, entropy = torch.cat(found["log_probs"]), torch.cat(found["entropy"])
    old = torch.cat(batch["log_probs"]) if batch.get("log_probs") else logprobs.detach()
    weights = torch.zeros_like(logprobs, requires_grad=True)
    with torch.enable_grad():
        (weights,) = torch.autograd.grad(sum_of_sample_mean(weights), weights)
    policy = policy_loss(
        recipe,
        logprobs,
        old,
        torch.cat(batch["advantages"]),
        torch.cat(batch["loss_masks"]) != 0,
        clip=(float(args.eps_clip), float(args.eps_clip_high)) if "clip" in RECIPES[recipe].reads else None,
        dual_clip=args.eps_clip_c if "dual_clip" in RECIPES[recipe].reads else None,
        importance_weights=weights,
        reduction="token-sum",
        cu_seqlens=_boundaries(found["log_probs"], logprobs.device),
    ).loss
    reported = {"pg_loss": policy, "entropy_loss": sum_of_sample_mean(entropy)}
    loss = policy - args.entropy_coef * reported["entropy_loss"]
    if args.use_kl_loss:
        kl = compute_approx_kl(logprobs, torch.cat(batch["ref_log_probs"]), args.kl_loss_type)
        reported["kl_loss"] = sum_of_sample_mean(kl)
        loss = loss + args.kl_loss_coef * reported["kl_loss"]
    return loss, {name: x.detach().clone() for name, x in {"loss": loss, **reported}.items()}


FRAMEWORK = Framework(
    "slime",
    ("0.3", "0.4"),
    (
        Socket(
            UTILS,
            "calculate_log_probs_and_entropy",
            calculate_log_probs_and_entropy,
            rows=("logits", "tokens"),
            rounds=never,
        ),
        Socket(UTILS, "compute_approx_kl", compute_approx_kl, rounds=never),
        Socket(UTILS, "vanilla_gae", vanilla_gae),
        Socket(UTILS, "chunked_gae", chunked_gae),
    ),
)
