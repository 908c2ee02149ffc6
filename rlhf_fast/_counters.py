"""Zeros that a launch counts its blocks with (kernels/common/grid.py, csrc/cuda/grid.cuh)."""

from __future__ import annotations

import torch
from torch import Tensor

_kept: dict[tuple[torch.device, int], Tensor] = {}


def counters_for(x: Tensor) -> Tensor:
    """Four zeros (int64) on the device of x for one launch on the current stream; the kernel leaves zeros.

    Launches of one stream follow each other, so they share. A graph that is being captured gets counters of its own, zeroed at
    every replay: it may run beside the stream that it was captured on.
    """
    if x.device.type != "cuda":
        return torch.zeros(4, dtype=torch.int64, device=x.device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(4, dtype=torch.int64, device=x.device)
    key = (x.device, torch.cuda.current_stream(x.device).cuda_stream)
    found = _kept.get(key)
    if found is None:
        found = _kept[key] = torch.zeros(4, dtype=torch.int64, device=x.device)
    return found
