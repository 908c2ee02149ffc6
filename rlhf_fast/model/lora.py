"""Low-rank adapters: their configuration and their parameters (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """Shape of every new adapter of a model: `y = W x + (alpha / r) B A x`.

    Raises TypeError or ValueError for a value out of range.
    """

    r: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """Numerator of the scale alpha / r."""
    dropout: float = 0.0
    """Probability of zeroing an input of A, in train mode only."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """Suffixes of module names such as ("q_proj", "v_proj"), or "all-linear": every linear layer of the
    decoder layers (never the LM head or an embedding)."""

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int):
            raise TypeError(f"LoraConfig: argument 'r' got {self.r!r}, expected an integer")
        if self.r < 1:
            raise ValueError(f"LoraConfig: argument 'r' got {self.r}, expected at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoraConfig: argument 'alpha' got {self.alpha!r}, expected a finite number above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoraConfig: argument 'dropout' got {self.dropout!r}, expected a number in [0, 1)")
        if not self.target_modules:
            raise ValueError("LoraConfig: argument 'target_modules' got nothing, expected at least one module name")

    @property
    def suffixes(self) -> tuple[str, ...] | None:
        """The module name suffixes asked for; None stands for every linear layer."""
        if self.target_modules == ALL_LINEAR:
            return None
        return (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)


class LowRank(NamedTuple):
    """The update `scale * B A` of one linear layer, as data."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float

    def delta(self) -> Tensor:
        """The update as a full fp32 matrix (out, in)."""
        return self.scale * (self.b.float() @ self.a.float())


class LoraPair(nn.Module):
    """The trainable fp32 factors A (r, in) and B (out, r) of one role on one linear layer."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.scale = scale
        self.dropout = dropout

    @classmethod
    def fresh(cls, config: LoraConfig, in_features: int, out_features: int, generator: torch.Generator) -> LoraPair:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming-uniform with a = sqrt(5)) and B = 0: the update is 0."""
        bound = 1.0 / math.sqrt(in_features)
        a = torch.empty(config.r, in_features).uniform_(-bound, bound, generator=generator)
        return cls(a, torch.zeros(out_features, config.r), config.alpha / config.r, config.dropout)

    def data(self) -> LowRank:
        """A detached fp32 copy on the CPU."""
        a, b = (p.detach().to("cpu", torch.float32, copy=True) for p in (self.lora_A, self.lora_B))
        return LowRank(a, b, self.scale)

    def extra_repr(self) -> str:
        return f"r={self.lora_A.shape[0]}, scale={self.scale}, dropout={self.dropout}"
