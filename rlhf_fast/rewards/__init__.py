"""What a completion is worth to a function or a server: in this process, in worker processes, over HTTP."""

from __future__ import annotations

from rlhf_fast.rewards.backends import Backend, Call, Failure, InProcess, Scorer
from rlhf_fast.rewards.functions import (
    Completions,
    ContractError,
    RewardError,
    RewardFunction,
    Scores,
    fingerprint,
    load_callable,
)
from rlhf_fast.rewards.pool import Pool
from rlhf_fast.rewards.server import Server
from rlhf_fast.rewards.steps import split_steps, step_ends

__all__ = [
    "Backend",
    "Call",
    "Completions",
    "ContractError",
    "Failure",
    "InProcess",
    "Pool",
    "RewardError",
    "RewardFunction",
    "Scorer",
    "Scores",
    "Server",
    "fingerprint",
    "load_callable",
    "split_steps",
    "step_ends",
]
