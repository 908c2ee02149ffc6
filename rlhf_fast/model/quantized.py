"""A frozen base in 8 or 4 bits by bitsandbytes (Dettmers et al. 2022, arXiv:2208.07339; 2023, arXiv:2305.14314), under adapters
that stay in fp32."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from typing import Any

import torch
from torch import nn

from rlhf_fast import _check

KINDS = ("none", "int8", "nf4")
"""int8: one scale a row, activations rounded to int8 by row as well. nf4: blocks of 64 normal-float numbers with scales that are
quantised in turn, multiplied in the dtype of the rest of the model."""
BLOCK, SCALES = 64, 256
"""Numbers under one scale of nf4, and scales under one of their own."""


def loading(op: str, kind: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Keywords of transformers' from_pretrained, which quantises on the device. Raises ValueError for an unknown kind, and where bitsandbytes is missing."""
    _check.choice(op, "quantize", kind, KINDS)
    if kind == "none":
        return {}
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            expected = f"none without {package}: pip install 'rlhf-fast[quant]'"
            raise _check.error(ValueError, op, "quantize", repr(kind), expected)
    _import_without_downloads()
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        # No columns apart in fp16: which ones would be picked by all rows of a batch, and a row must not depend on the others.
        bits = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        return {"quantization_config": bits, "device_map": {"": device}}
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def _import_without_downloads() -> None:
    """bitsandbytes asks the package `kernels`, where there is one, for compiled code from a hub as soon as it is imported."""
    if "bitsandbytes" in sys.modules:
        return
    told = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, quiet = sys.modules.get("kernels"), told.disabled
    sys.modules["kernels"], told.disabled = None, True  # type: ignore[assignment]
    try:
        importlib.import_module("bitsandbytes")
    finally:
        told.disabled = quiet
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


def settle(op: str, base: nn.Module) -> None:
    """Make a base that was just loaded compute the same with and without gradients.

    On a CPU with AVX512-BF16 bitsandbytes lays 4-bit weights out anew for passes without gradients: their product is then in bf16, and
    their scales are whole again. Raises ValueError for 4-bit layers on a CPU whose width is no multiple of 64: bitsandbytes 0.50.2
    quantises their rows with scales that it reads at other places (relative error of a normal weight 0.27 instead of 0.09).
    """
    for name, module in base.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        weight, width = module.weight, module.in_features
        if (
            isinstance(weight, torch.Tensor)
            and weight.device.type == "cpu"
            and isinstance(width, int)
            and width % BLOCK
        ):
            expected = f"int8 or none on a CPU for {name} of {width} features, no multiple of {BLOCK}"
            raise _check.error(ValueError, op, "quantize", "'nf4'", expected)


def weight_bytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of a quantised weight (rows, columns) with its scales."""
    numbers = rows * columns
    if kind == "int8":
        return numbers + 4 * rows
    scales = -(-numbers // BLOCK)
    return -(-numbers // 2) + scales + 4 * -(-scales // SCALES) + 4 * (16 + 256 + 1)  # and the tables of both
