"""Scalar heads of the value and reward roles."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HEAD_INIT = {"value": "zero", "reward": "normal"}
"""The roles that have a head, and how its weight starts."""


class ScalarHead(nn.Module):
    """One number per token, in fp32 whatever the dtype of the base: `hidden (…, H) -> (…)`.

    init "zero": weight 0 (a value head that starts without an opinion); "normal": weight ~ N(0, 1 / (H + 1)),
    as the reward head of Stiennon et al. 2020, arXiv:2009.01325. The bias starts at 0.
    """

    def __init__(self, hidden_size: int, init: str, generator: torch.Generator, device: torch.device) -> None:
        super().__init__()
        weight = torch.zeros(1, hidden_size)
        if init == "normal":
            weight.normal_(0.0, 1.0 / math.sqrt(hidden_size + 1), generator=generator)
        self.weight = nn.Parameter(weight.to(device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.weight.float().t()).squeeze(-1) + self.bias.float()


def at_last_real(token_scores: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (B,): the entry at the last True of each row of `mask`, for left and right padding alike."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask).argmax(dim=1, keepdim=True)
    return token_scores.gather(1, last).squeeze(1)
