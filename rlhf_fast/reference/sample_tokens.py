"""Sampling of one token per row of logits, in plain PyTorch: the specification of ops.sample_tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_tokens(
    logits: Tensor,
    uniform: Tensor | None,
    mask: Tensor | None = None,
    temperature: Tensor | None = None,
    banned_ids: Tensor | None = None,
    temperature_value: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_ids, logprobs, entropy), each (...), as in ops.sample_tokens.

    logits (..., V); uniform (...) fp64, or None where every temperature is 0; temperature (...) or None:
    `temperature_value`; softcap 0: none. In fp32, or fp64 for fp64 logits; probabilities are summed up in fp64: at 256k
    classes the steps of an fp32 sum are coarser than the probabilities of the tail.
    """
    rows = logits.shape[:-1]
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    real = torch.ones(rows, dtype=torch.bool, device=logits.device) if mask is None else mask
    y = logits.detach().to(wide).masked_fill(~real[..., None], 0.0)  # a NaN in a masked row must not spread
    if softcap:
        y = softcap * torch.tanh(y / softcap)
    if banned_ids is not None:
        y = y.index_fill(-1, banned_ids, -torch.inf)
    given = y.new_full(rows, temperature_value) if temperature is None else temperature.to(wide)
    u = torch.zeros(rows, dtype=torch.float64, device=y.device) if uniform is None else uniform
    row = _first(real & ~((given >= 0) & given.isfinite() & ((given == 0) | ((u >= 0) & (u < 1)))))
    if row is not None:
        raise ValueError(refused(row, float(given.flatten()[row]), float(u.flatten()[row])))

    greedy = given == 0
    log_p = (y / given.masked_fill(greedy | ~real, 1.0)[..., None]).log_softmax(-1)
    p = log_p.exp()
    cumulative = p.cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, u[..., None] * cumulative[..., -1:], right=True).squeeze(-1)
    # The product may round up to the sum; a class without probability is never taken.
    last = (p > 0) * torch.arange(1, p.shape[-1] + 1, device=p.device)
    drawn = torch.minimum(drawn, last.amax(-1).sub(1).clamp(min=0))
    token_ids = torch.where(greedy, y.argmax(-1), drawn)
    logprobs = log_p.gather(-1, token_ids[..., None]).squeeze(-1)
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    broken = entropy.isnan()
    token_ids = token_ids.masked_fill(broken, -1).masked_fill(~real, 0)
    logprobs = logprobs.masked_fill(broken, torch.nan)
    return token_ids, logprobs.masked_fill(~real, 0.0), entropy.masked_fill(~real, 0.0)


def _first(bad: Tensor) -> int | None:
    """The first True, on the CPU; elsewhere looking would stop the queue."""
    if bad.device.type != "cpu" or not bool(bad.any()):
        return None
    return int(bad.flatten().nonzero()[0])


def refused(row: int, temperature: float, uniform: float) -> str:
    """The message for a row whose temperature or number is out of range."""
    if not 0 <= temperature < float("inf"):
        return f"sample_tokens: argument 'temperature' got {temperature} at row {row}, expected a finite number >= 0"
    return f"sample_tokens: argument 'uniform' got {uniform} at row {row}, expected a number in [0, 1)"


def sample(
    shape: tuple[int, ...] = (4, 33),
    vocab: int = 127,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 3.0,
) -> dict[str, Tensor]:
    """Tensor arguments of ops.sample_tokens for tests and benchmarks."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, vocab, generator=g, dtype=torch.float64) * spread).to(dtype)
    return {"logits": logits, "uniform": torch.rand(shape, generator=g, dtype=torch.float64)}
