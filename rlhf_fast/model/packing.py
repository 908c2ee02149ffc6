"""Several sequences packed into one row of tokens: positions that restart, attention that ends at their borders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available

from rlhf_fast._op import served
from rlhf_fast.ops.varlen_attention import apply as varlen_attention

FLASH = "flash_attention_2"
"""transformers' name for flash-attn's kernels (Dao 2023, arXiv:2307.08691)."""
SPLIT = "rlhf_fast_split"
"""Attention of each sequence by itself, what flash-attn is where it does not run: by our op on a CPU, else by PyTorch's attention, one
sequence after the other. The cost of a row of tokens is that of its sequences, not the square of its length."""
FLASH_HEAD = 256
"""Largest head dimension of those kernels."""


@dataclass(frozen=True)
class Packing:
    """Where S sequences lie among N packed tokens; none of them is empty."""

    cu_seqlens: Tensor
    """(S + 1,) int64 boundaries from 0 to N."""
    positions: Tensor
    """(1, N) int64: place of each token in its own sequence."""
    longest: int
    """Tokens of the longest sequence."""

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside the context SPLIT attends within these sequences."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    @property
    def last(self) -> Tensor:
        """(S,) int64: the last token of each sequence."""
        return self.cu_seqlens[1:] - 1

    def arguments(self, copies: int, implementation: str) -> dict[str, Any]:
        """What a decoder is told of `copies` rows that are packed alike.

        transformers confines attention by the positions where no mask is given; flash-attn takes the rows as one long row and
        wants its boundaries.
        """
        told: dict[str, Any] = {"position_ids": self.positions.expand(copies, -1)}
        if implementation == FLASH:
            starts = torch.arange(copies, device=self.positions.device) * self.positions.shape[1]
            bounds = (self.cu_seqlens[1:] + starts[:, None]).flatten()
            bounds = torch.cat([bounds.new_zeros(1), bounds]).to(torch.int32)
            told |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            told |= {"max_length_q": self.longest, "max_length_k": self.longest}
        return told


_current: ContextVar[Packing] = ContextVar("packing")


def _split_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of packed rows (B, heads, N, D), as transformers' interface has it: (B, N, heads, D)."""
    bounds = _current.get().cu_seqlens
    # As PyTorch's attention takes them; the window has been looked at where the mask is made.
    causal = options.get("is_causal") is not False and getattr(module, "is_causal", True)
    if attention_mask is None and causal and not options.get("dropout") and served(query, "varlen_attention"):
        return _in_one_pass(query, key, value, bounds, options.get("scaling")), None
    lengths = bounds.diff().tolist()
    parts = []
    each = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    for (q, k, v), (start, stop) in zip(each, pairwise(bounds.tolist()), strict=True):
        mask = None if attention_mask is None else attention_mask[:, :, start:stop, start:stop]
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(parts, dim=1), None


def _in_one_pass(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None) -> Tensor:
    """The same by our op, which takes the sequences of all rows at once."""
    B, _, N, D = query.shape
    starts = torch.arange(B, device=bounds.device)[:, None] * N
    every = torch.cat([bounds[:1], (bounds[1:] + starts).flatten()])
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    return varlen_attention(q, k, v, every, D**-0.5 if scale is None else scale, 0).view(B, N, query.shape[1], -1)


def _split_mask(local_size: int | None = None, **options: Any) -> Tensor | None:
    """None where every sequence fits into the window: then causality is all there is to say."""
    if local_size is None or _current.get().longest <= local_size:
        return None
    return sdpa_mask(local_size=local_size, **{**options, "allow_is_causal_skip": False})


AttentionInterface.register(SPLIT, _split_attention)
AttentionMaskInterface.register(SPLIT, _split_mask)


def flash_missing(base: PreTrainedModel) -> str | None:
    """Why flash-attn cannot serve a packed pass of this model where it lies now, or None."""
    weight: Tensor = base.get_input_embeddings().weight  # type: ignore[assignment]
    if weight.device.type != "cuda":
        return f"the model is on device {weight.device}, flash-attn runs on cuda"
    if not is_flash_attn_2_available():
        return "flash-attn is not installed: pip install 'rlhf-fast[flash]'"
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the model computes in {dtype}, flash-attn in bfloat16 or float16"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (8, 0):
        return f"the device has compute capability {capability[0]}.{capability[1]}, flash-attn needs 8.0"
    config = base.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width > FLASH_HEAD:
        return f"attention heads are {width} wide, those of flash-attn at most {FLASH_HEAD}"
    return None


def implementation_of(base: PreTrainedModel) -> tuple[str, str | None]:
    """(attention implementation of a packed pass, why it is not flash-attn)."""
    own = base.config._attn_implementation
    reason = flash_missing(base)
    if reason is None and own != FLASH:
        reason = _refused(base, FLASH)
    if reason is None:
        return FLASH, None
    return (SPLIT if own == "sdpa" and _refused(base, SPLIT) is None else own), reason


def _refused(base: PreTrainedModel, implementation: str) -> str | None:
    """Why the model does not attend by it, or None."""
    try:
        with attending(base, implementation):
            if base.config._attn_implementation == implementation:
                return None
            return f"{type(base).__name__} fixes its attention when it is built"
    except (ImportError, ValueError) as error:
        return f"transformers: {' '.join(str(error).split())}"


@contextmanager
def attending(base: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The base attends by `implementation` inside the context."""
    config = base.config
    before = config._attn_implementation
    if before == implementation:
        yield
        return
    parts = {name: part._attn_implementation for name in config.sub_configs if (part := getattr(config, name, None))}
    base.set_attn_implementation(implementation)
    try:
        yield
    finally:
        base.set_attn_implementation({"": before, **parts})
