"""What a completion is worth to a function or a server: in this process, in worker processes, over HTTP."""

from __future__ import annotations

from rlhf_fast.rewards.backends import Backend, Call, Failure, InProcess, Scorer
from rlhf_fast.rewards.functions import ContractError, RewardError, RewardFunction, fingerprint, load_callable
from rlhf_fast.rewards.pool import Pool
from rlhf_fast.rewards.server import Server

__all__ = [
    "Backend",
    "Call",
    "ContractError",
    "Failure",
    "InProcess",
    "Pool",
    "RewardError",
    "RewardFunction",
    "Scorer",
    "Server",
    "fingerprint",
    "load_callable",
]
