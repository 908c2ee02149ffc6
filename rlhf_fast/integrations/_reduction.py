"""A matrix of losses to a scalar, for frameworks that compute the terms themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations._compare import Unsupported, as_mask
from rlhf_fast.reference._reduce import token_weights


def aggregate(loss: Tensor, mask: Tensor, reduction: str, normalizer: Any) -> Tensor:
    """Like-shaped losses and a mask of 0 and 1 -> scalar, fp32 or wider; masked losses are never read.

    normalizer: a number or a 0-d tensor in the place of the reduction's own denominator, or None.
    """
    real = as_mask(mask)
    if real.shape != loss.shape:
        raise Unsupported(f"a mask {tuple(real.shape)} for a loss {tuple(loss.shape)}")
    given = normalizer if isinstance(normalizer, Tensor) else None
    number = 0.0
    if given is None and normalizer is not None:
        if not normalizer > 0:
            raise Unsupported(f"a denominator of {normalizer}")
        number = float(normalizer)
    weights = token_weights(real, torch.promote_types(loss.dtype, torch.float32), reduction, given, number, None)
    return (weights * loss.where(real, 0.0)).sum()
