"""Completions sampled from the policy."""

from __future__ import annotations

from rlhf_fast.rollout.decoders import attention_of
from rlhf_fast.rollout.engines import Engine, Request, sample
from rlhf_fast.rollout.hf import PackedRollout, Rollout, generate

__all__ = ["Engine", "PackedRollout", "Request", "Rollout", "attention_of", "generate", "sample"]
