"""What the public functions return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor


class Stats(Mapping[str, Tensor]):
    """Named statistics in one small tensor: `stats["clip_fraction"]` is a 0-d view, `floats()` costs one transfer."""

    def __init__(self, tensor: Tensor, names: tuple[str, ...]) -> None:
        self.tensor = tensor
        self.names = names

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.tensor[self.names.index(name)]
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def floats(self) -> dict[str, float]:
        """Every statistic as a Python float, with a single synchronisation."""
        return dict(zip(self.names, self.tensor.tolist(), strict=True))

    def __repr__(self) -> str:
        return f"Stats({self.floats()})"


class TokenStats(NamedTuple):
    """Per-token results of a log-prob op, each (...) and fp32 (fp64 for fp64 input), in nats; 0 where masked."""

    logprobs: Tensor
    """log p(token)."""
    entropy: Tensor
    """Entropy of the distribution."""
    logsumexp: Tensor
    """log sum exp of the scaled logits."""
    kl: Tensor | None
    """Exact KL(policy || reference) over the vocabulary, or None without a reference."""


class SampledTokens(NamedTuple):
    """One token per row, each (...); 0 where masked."""

    token_ids: Tensor
    """int64; -1 for a row of logits that is no distribution."""
    logprobs: Tensor
    """log p(token) in nats, under the distribution it was drawn from; fp32 (fp64 for fp64 logits)."""
    entropy: Tensor
    """Entropy of that distribution in nats."""


class Advantages(NamedTuple):
    """What PPO trains on; each (B, T), 0 where masked."""

    advantages: Tensor
    """Whitened when asked for."""
    returns: Tensor
    """Value targets, from the advantages before whitening."""
    rewards: Tensor
    """Token rewards after KL shaping."""
    kl: Tensor
    """Per-token KL estimate in nats (zeros without a reference)."""


class LossOutput(NamedTuple):
    """A scalar loss to call backward on, and its statistics (detached)."""

    loss: Tensor
    stats: Stats


class PreferenceOutput(NamedTuple):
    """Preference loss (scalar) and the implicit rewards (B,), detached, in units of beta x nats."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
