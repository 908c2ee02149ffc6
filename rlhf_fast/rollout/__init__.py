"""Completions sampled from the policy."""

from __future__ import annotations

from rlhf_fast.rollout.hf import Rollout, generate

__all__ = ["Rollout", "generate"]
