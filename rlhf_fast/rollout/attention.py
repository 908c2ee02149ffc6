"""Our attention over cached keys as one of transformers' attention implementations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rlhf_fast._op import OPS, Backend
from rlhf_fast.ops.cached_attention import TRITON_WIDTH, WIDTH
from rlhf_fast.rollout.cache import PrefixCache

NAME = "rlhf_fast_cached"
"""Its name in transformers. No mask belongs to it: what a token sees is said by the pass."""


@dataclass
class Pass:
    """What the tokens of one forward pass see: all (tokens,) int64, by row of the batch and then by position."""

    cache: PrefixCache
    prefix_rows: Tensor
    prefix_start: Tensor
    prefix_stop: Tensor
    rows: Tensor | None = None
    """Slots with keys of their own; None while the prompts are read."""
    lengths: Tensor | None = None
    """Keys of the slots, the token's own included."""
    windows: dict[int, int | None] | None = None
    """Filled with the sliding window of every layer that attends, when given."""


_current: Pass | None = None
_WIDEST = {"cpp": WIDTH, "triton": TRITON_WIDTH}
"""Kernels that attend and write the token's keys in one call, and their largest head width."""


def kernel_on(device: torch.device) -> Backend:
    """The cell of cached_attention that is in use on the device."""
    return OPS["cached_attention"].select(device.type)


@contextmanager
def passing(what: Pass) -> Iterator[None]:
    """What a base that attends by NAME sees inside the context; one pass at a time."""
    global _current
    before, _current = _current, what
    try:
        yield
    finally:
        _current = before


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query (B, heads, S, D) over the cache of the current pass -> (B, S, heads, Dv)."""
    if _current is None:
        raise RuntimeError(f"{NAME}: attention outside of a rollout")
    told, part = _current, _current.cache.parts[_current.cache.last]
    B, heads, S, width = query.shape
    tokens = query[:, :, 0] if S == 1 else query.transpose(1, 2).reshape(B * S, heads, width)
    if told.windows is not None:
        told.windows[told.cache.last] = sliding_window
    own = told.rows is not None
    out = kernel_on(query.device).fn(
        tokens,
        part.keys,
        part.values,
        told.rows,
        told.lengths,
        part.prefix_keys,
        part.prefix_values,
        told.prefix_rows,
        told.prefix_start,
        told.prefix_stop,
        width**-0.5 if scaling is None else scaling,
        softcap or 0.0,
        sliding_window or 0,
        key[:, :, 0] if own else None,
        value[:, :, 0] if own else None,
    )
    return out.view(B, S, heads, out.shape[-1]), None


AttentionInterface.register(NAME, _attention)


def unusable(base: PreTrainedModel) -> str | None:
    """Why our attention cannot serve this model where it lies now, before it is tried; or None."""
    weight: Tensor = base.get_input_embeddings().weight  # type: ignore[assignment]
    device = weight.device.type
    kernel = kernel_on(weight.device).name
    if kernel not in _WIDEST:
        return f"no kernel of cached_attention is in use on {device}"
    if torch.is_autocast_enabled(device):
        return "autocast is on"
    if weight.dtype is torch.float64:
        return "the model computes in fp64"
    if not base._can_set_attn_implementation():
        return f"{type(base).__name__} has an attention of its own"
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))}"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"heads are wider than {_WIDEST[kernel]}" if width > _WIDEST[kernel] else None


def windows_of(base: PreTrainedModel, layers: int) -> list[int | None]:
    """The sliding window of every layer by the model's config."""
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
