"""The public ops: argument checks, documentation and registration; the maths is in rlhf_fast.reference."""

from __future__ import annotations

from rlhf_fast.ops.gae import gae

__all__ = ["gae"]
