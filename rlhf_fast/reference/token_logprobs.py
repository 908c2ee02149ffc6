"""Log-probability, entropy, log-sum-exp and exact KL of every token, one softmax at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    ref_logits: Tensor | None,
    temperature_value: float,
    softcap: float,
    op: str = "token_logprobs",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logprobs, entropy, logsumexp, kl), each (...), of z = softcap(logits) / temperature.

    logits, ref_logits (..., V); token_ids, mask (...); temperature (...) or None: temperature_value; softcap 0: none.
    fp32, or fp64 for fp64 logits. The reference and the temperature are constants. A row that holds NaN or +inf, or nothing
    but -inf, gives NaN; a class whose probability is 0 adds nothing to the entropy, to KL and to the gradient.
    """
    real = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
    if temperature is not None:
        temperature = _checked_temperature(op, temperature.detach().masked_fill(~real, 1.0))
    scale = temperature_value if temperature is None else temperature.to(wide)[..., None]

    def scaled(x: Tensor) -> Tensor:
        x = x.to(wide).masked_fill(~real[..., None], 0.0)  # a NaN in a masked row must not spread
        if softcap:
            x = softcap * torch.tanh(x / softcap)
        return x / scale

    z = scaled(logits)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    dead = p == 0  # 0 * -inf
    ids = token_ids.to(torch.int64).masked_fill(~real, 0)
    ids, ok = _checked_ids(op, ids, logits.shape[-1])
    logprobs = log_p.gather(-1, ids[..., None]).squeeze(-1)
    entropy = -(p * log_p.masked_fill(dead, 0.0)).sum(-1)
    logsumexp = z.logsumexp(-1)
    kl = None
    if ref_logits is not None:
        log_q = scaled(ref_logits.detach()).log_softmax(-1)
        kl = (p * (log_p - log_q).masked_fill(dead & ~log_q.isnan(), 0.0)).sum(-1)
    keep = real & ok

    def result(x: Tensor) -> Tensor:
        return x.masked_fill(~keep, float("nan")).masked_fill(~real, 0.0)

    logsumexp = logsumexp.masked_fill(~logsumexp.isfinite(), float("nan"))
    return result(logprobs), result(entropy), result(logsumexp), None if kl is None else result(kl)


def _checked_ids(op: str, ids: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Legal ids, and where they were legal to begin with. On a CPU an illegal one raises."""
    ok = (ids >= 0) & (ids < vocab)
    if ids.device.type == "cpu" and not bool(ok.all()):
        row = int((~ok).flatten().nonzero()[0])
        raise ValueError(refused_id(op, row, int(ids.flatten()[row]), vocab))
    return ids.clamp(0, vocab - 1), ok


def _checked_temperature(op: str, temperature: Tensor) -> Tensor:
    bad = ~((temperature > 0) & temperature.isfinite())
    if temperature.device.type == "cpu" and bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        raise ValueError(refused_temperature(op, row, float(temperature.flatten()[row])))
    return temperature


def refused_id(op: str, row: int, token_id: int, vocab: int) -> str:
    """The message for a token id outside of the vocabulary."""
    return f"{op}: argument 'token_ids' got {token_id} at row {row}, expected a token id in [0, {vocab})"


def refused_temperature(op: str, row: int, temperature: float) -> str:
    """The message for a temperature that is not a finite number > 0."""
    return f"{op}: argument 'temperature' got {temperature} at row {row}, expected a finite number > 0"


def sample(
    shape: tuple[int, ...] = (4, 33),
    vocab: int = 127,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ref: bool = True,
    spread: float = 3.0,
) -> dict[str, Tensor]:
    """Tensor arguments of ops.token_logprobs for tests and benchmarks: a close reference, a ragged mask, bad ids under it."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocab, generator=g, dtype=torch.float64) * spread
    near = logits + 0.3 * torch.randn(*shape, vocab, generator=g, dtype=torch.float64)
    mask = torch.rand(shape, generator=g) > 0.25
    token_ids = torch.randint(0, vocab, shape, generator=g).masked_fill(~mask, -100)
    kwargs = {"logits": logits.to(dtype), "token_ids": token_ids, "mask": mask}
    if ref:
        kwargs["ref_logits"] = near.to(dtype)
    return kwargs
