"""What the cells of the CUDA kernels share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast import cuda


def stream_of(x: Tensor) -> int:
    """Handle of the stream that torch is on, on the device of x."""
    return torch.cuda.current_stream(x.device).cuda_stream


def run(name: str, like: Tensor, *fields: Any) -> None:
    """Launches `name` on the device of `like` and on torch's stream there, without waiting for it.

    fields: those of its struct in csrc/cuda/ops.h by position, tensors (or None) for the pointers, the stream left out.
    """
    with torch.cuda.device_of(like):
        cuda.kernel(name)(*fields, stream_of(like))
