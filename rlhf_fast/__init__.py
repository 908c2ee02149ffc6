"""rlhf_fast: a kernel-optimised RLHF engine.

The loss backend (this namespace) needs torch alone; `rlhf_fast.model`, `rlhf_fast.rollout` and `rlhf_fast.train` need the
extra `train`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from rlhf_fast._op import backends, use_backend
from rlhf_fast._types import Advantages, LossOutput, PreferenceOutput, SampledTokens, TokenStats
from rlhf_fast._version import __version__
from rlhf_fast.advantage_estimators import VTrace, gdpo_advantages, lambda_returns, length_adaptive_lambda, vtrace
from rlhf_fast.corrections import off_policy_mask, rollout_correction
from rlhf_fast.denominators import Denominators, gather_rows
from rlhf_fast.entropy import EntropyController, covariance_mask, top_entropy_mask
from rlhf_fast.integrations import patch, unpatch
from rlhf_fast.losses import policy_loss, preference_loss
from rlhf_fast.ops import (
    advantages,
    cached_attention,
    dpo_loss,
    gae,
    group_advantages,
    kl_estimate,
    linear_ppo_loss,
    linear_token_logprobs,
    lora_linear,
    ppo_loss,
    reward_loss,
    rms_norm,
    rotary,
    sample_tokens,
    silu_mul,
    token_logprobs,
    varlen_attention,
    whiten,
)
from rlhf_fast.preference import running_delta, update_reference
from rlhf_fast.ranking import kto_loss, plackett_luce_loss, with_length_covariate
from rlhf_fast.sequences import SequenceLogprobs, sequence_logprobs

__all__ = [
    "Advantages",
    "Denominators",
    "EntropyController",
    "LoraConfig",
    "LossOutput",
    "PreferenceOutput",
    "SampledTokens",
    "SequenceLogprobs",
    "SharedModel",
    "TokenStats",
    "VTrace",
    "__version__",
    "advantages",
    "backends",
    "cached_attention",
    "covariance_mask",
    "dpo_loss",
    "gae",
    "gather_rows",
    "gdpo_advantages",
    "group_advantages",
    "kl_estimate",
    "kto_loss",
    "lambda_returns",
    "length_adaptive_lambda",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "lora_linear",
    "off_policy_mask",
    "patch",
    "plackett_luce_loss",
    "policy_loss",
    "ppo_loss",
    "preference_loss",
    "reward_loss",
    "rms_norm",
    "rollout_correction",
    "rotary",
    "running_delta",
    "sample_tokens",
    "sequence_logprobs",
    "silu_mul",
    "token_logprobs",
    "top_entropy_mask",
    "unpatch",
    "update_reference",
    "use_backend",
    "varlen_attention",
    "vtrace",
    "whiten",
    "with_length_covariate",
]

# In a checkout and in an editable install the Triton kernels lie beside this package, not inside it.
_root = Path(__file__).resolve().parent.parent
if not (_root / "rlhf_fast" / "kernels").exists() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

_LAZY = {"SharedModel": "rlhf_fast.model", "LoraConfig": "rlhf_fast.model"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rlhf_fast' has no attribute {name!r}")
