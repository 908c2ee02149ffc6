"""Completions sampled from the policy."""

from __future__ import annotations

from rlhf_fast.rollout.decoders import attention_of
from rlhf_fast.rollout.engines import Engine, EngineError, Request, sample
from rlhf_fast.rollout.hf import PackedRollout, Rollout, generate

__all__ = ["Engine", "EngineError", "PackedRollout", "Request", "Rollout", "attention_of", "generate", "sample"]
