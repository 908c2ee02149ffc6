"""A base model from a local folder."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_fast.model.quantized import loading, settle


def load_base(
    op: str, path: str | os.PathLike[str], dtype: torch.dtype, quantize: str, device: torch.device | str
) -> PreTrainedModel:
    """The causal LM of a folder on a device: safetensors only, no remote code, no network.

    Raises ValueError, naming `op`, if there is no such model or its layers cannot be quantised as asked.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    options |= loading(op, quantize, dtype, device)
    try:
        base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except OSError as error:
        raise ValueError(f"{op}: no local safetensors model at {str(path)!r}: {error}") from error
    settle(op, base)
    # A quantised model is there already, and refuses to move.
    return base if quantize != "none" else base.to(device)  # type: ignore[arg-type]
