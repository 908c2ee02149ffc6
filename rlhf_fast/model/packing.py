"""Several sequences packed into one row of tokens: positions that restart, attention that ends at their borders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

FLASH = "flash_attention_2"
"""transformers' name for flash-attn's kernels (Dao 2023, arXiv:2307.08691)."""
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
        try:
            with attending(base, FLASH):
                if base.config._attn_implementation != FLASH:
                    reason = f"{type(base).__name__} fixes its attention when it is built"
        except (ImportError, ValueError) as error:
            reason = f"transformers: {' '.join(str(error).split())}"
    return (own, reason) if reason is not None else (FLASH, None)


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
