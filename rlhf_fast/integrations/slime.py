"""slime: log-probs and entropy, KL, GAE, stale answers; and functions for its dotted-path options.

Supported: slime >= 0.3, < 0.4. slime compiles some of its functions; the replacements run eagerly in their place. Its
compute_policy_loss and compute_cispo_loss stay: they are one compiled pass over (N,) numbers.

    --custom-advantage-function-path rlhf_fast.integrations.slime.gae_advantages
    --loss-type custom_loss --custom-loss-function-path rlhf_fast.integrations.slime.policy_loss_gspo
                                             (or policy_loss_<any other recipe of rlhf_fast.losses>)
    --custom-tis-function-path rlhf_fast.integrations.slime.tis_token_mis
                                             (IcePop; or tis_<any other kind of rlhf_fast.rollout_correction>)
    --custom-pg-loss-reducer-function-path rlhf_fast.integrations.slime.reducer_constant_4096
                                             (Dr. GRPO over 4096 tokens; or reducer_seq_mean_token_mean)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.corrections import KINDS
from rlhf_fast.integrations._compare import Unsupported, common_dtype, constants, never
from rlhf_fast.integrations._patch import Framework, Socket
from rlhf_fast.integrations.slime_losses import (
    boundaries_of,
    compute_approx_kl,
    compute_opsm_mask,
    custom_policy_loss,
    one_context_rank,
    reducer,
    tis,
)  # fmt: skip
from rlhf_fast.losses import RECIPES
from rlhf_fast.ops.advantages import advantages as advantages_op
from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.token_logprobs import token_logprobs

UTILS = "slime.utils.ppo_utils"


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
    one_context_rank("gae_advantages")
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
            cu_seqlens=boundaries_of(values, device),
        )
    sizes = [len(v) for v in values]
    rollout_data["advantages"] = list(found.advantages.split(sizes))
    rollout_data["returns"] = list(found.returns.split(sizes))


def __getattr__(name: str) -> Any:
    """The functions by dotted path that are named after a recipe, a kind of correction or a reduction."""
    prefix, _, rest = name.partition("_")
    recipe = name.removeprefix("policy_loss_")
    if recipe != name and recipe in RECIPES and not RECIPES[recipe].needs:
        return functools.partial(custom_policy_loss, recipe)
    if prefix == "tis" and rest.replace("_", "-") in KINDS:
        return functools.partial(tis, rest.replace("_", "-"))
    if name == "reducer_seq_mean_token_mean":
        return functools.partial(reducer, "seq-mean-token-mean", 1)
    horizon = name.removeprefix("reducer_constant_")
    if horizon != name and horizon.isdecimal() and int(horizon):
        return functools.partial(reducer, "token-sum", int(horizon))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
        Socket(UTILS, "compute_opsm_mask", compute_opsm_mask),
        Socket(UTILS, "vanilla_gae", vanilla_gae),
        Socket(UTILS, "chunked_gae", chunked_gae),
    ),
)
