"""Checks of what a forward of the shared model is given."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast.model.packing import Packing


def padded(op: str, input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids (B, T) int64 with 0 at pads, and the mask (B, T) bool."""
    _check.integer(op, "input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise _check.error(ValueError, op, "input_ids", f"shape {tuple(input_ids.shape)}", "(B, T), no 0")
    mask = _check.mask_like(op, attention_mask, input_ids, "input_ids", "attention_mask")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    empty = ~mask.any(dim=1)
    if empty.any():
        got = f"no real token in row {int(empty.nonzero()[0])}"
        raise _check.error(ValueError, op, "attention_mask", got, "at least one")
    input_ids = input_ids.long().masked_fill(~mask, 0)
    wrong = (input_ids < 0) | (input_ids >= vocabulary)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        got = f"{int(input_ids[row, column])} at row {row}, position {column}"
        raise _check.error(ValueError, op, "input_ids", got, f"ids in [0, {vocabulary})")
    return input_ids, mask


def packed(
    op: str, input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor, vocabulary: int
) -> tuple[Tensor, Packing]:
    """Ids (1, N) int64 and where their sequences lie. The boundaries are read: a kernel wants the longest length as a number."""
    _check.integer(op, "input_ids", input_ids)
    if input_ids.dim() != 1 or input_ids.numel() == 0:
        raise _check.error(
            ValueError, op, "input_ids", f"shape {tuple(input_ids.shape)}", "(N,), no 0, with cu_seqlens"
        )
    if attention_mask is not None:
        raise _check.error(ValueError, op, "attention_mask", "a tensor", "None with cu_seqlens")
    tokens = input_ids.shape[0]
    bounds = _check.cu_seqlens(op, cu_seqlens, tokens, input_ids)
    values = bounds.tolist()
    lengths = [b - a for a, b in pairwise(values)]
    if values[0] != 0 or values[-1] != tokens or min(lengths) < 1:
        expected = f"boundaries from 0 to {tokens} with a token between any two"
        raise _check.error(ValueError, op, "cu_seqlens", values[:8], expected)
    input_ids = input_ids.long()
    wrong = (input_ids < 0) | (input_ids >= vocabulary)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise _check.error(
            ValueError, op, "input_ids", f"{int(input_ids[place])} at position {place}", f"ids in [0, {vocabulary})"
        )
    starts = bounds[:-1].repeat_interleave(bounds.diff(), output_size=tokens)
    positions = torch.arange(tokens, device=input_ids.device) - starts
    return input_ids.unsqueeze(0), Packing(bounds, positions.unsqueeze(0), max(lengths))


def checked_roles(roles: Sequence[str], known: Sequence[str], what: str, allow_none: bool = False) -> tuple[str, ...]:
    """Role names among `known`, none twice, as a tuple."""
    if isinstance(roles, str):
        raise _check.error(TypeError, "SharedModel", "roles", repr(roles), "a sequence of role names")
    for role in roles:
        if role not in known:
            raise _check.error(ValueError, "SharedModel", "roles", repr(role), f"{what}: {', '.join(known)}")
    if len(set(roles)) != len(roles) or not (roles or allow_none):
        raise _check.error(ValueError, "SharedModel", "roles", list(roles), "at least one role, none twice")
    return tuple(roles)
