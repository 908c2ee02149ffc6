"""A token per row of logits, its log-probability and the entropy of its distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._native import DTYPES, contiguous, kernel
from rlhf_fast._op import Op, cpp, no_doubles, triton
from rlhf_fast._types import SampledTokens
from rlhf_fast.ops.token_logprobs import _layout, wide
from rlhf_fast.reference.sample_tokens import refused
from rlhf_fast.reference.sample_tokens import sample_tokens as reference


def sample_tokens(
    logits: Tensor,
    uniform: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    banned_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> SampledTokens:
    """One token per row, its log-probability and the entropy of the distribution it was drawn from, in one read of the logits.

    With p = softmax(softcap tanh(logits / softcap) / temperature) the token is the first whose cumulative probability exceeds
    `uniform` (inversion; Devroye 1986, Non-Uniform Random Variate Generation, III.2.1). One number a row decides, so the same
    number gives the same token in any batch, and a seeded stream per sequence makes sampling independent of its neighbours.
    There is no top-k, top-p or min-p: the ratio of PPO needs the probability of what was sampled, and training computes it from
    the whole distribution.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64; any leading strides. Constants: nothing here has a gradient.
        uniform: (...) fp64 in [0, 1); may be None with temperature 0.
        temperature: number >= 0, or tensor (...) of them. 0 takes the most likely token, the first of equals; its log-prob
            and the entropy are then those at temperature 1, since a point mass has none to tell.
        softcap: number > 0, applied before the temperature; None = none.
        banned_ids: (K,) integer, classes of probability 0 in every row (end-of-sequence before a shortest length). The log-prob
            and the entropy are those of the distribution without them. An id outside of [0, V) raises.
        mask: (...) True = sample this row; None = all. Masked rows are never read and give token 0 and statistics 0.

    Returns:
        SampledTokens(token_ids, logprobs, entropy), each (...): int64, and fp32 (fp64 for fp64 logits) in nats. A row that holds NaN
        or +inf, or nothing but -inf, has no distribution: token -1 and NaN. Its sums accumulate in fp32 or wider as in
        token_logprobs, with the same bits for a row in any batch.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument. Numbers and temperatures in tensors are
            looked at on the CPU alone; elsewhere such a row has no token.
    """
    _check.floating("sample_tokens", "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise _check.error(ValueError, "sample_tokens", "logits", f"shape {tuple(logits.shape)}", "(..., V) with V > 0")
    rows, V = logits.shape[:-1], logits.shape[-1]
    logits = logits.detach()
    per_row = None
    value = 1.0
    if isinstance(temperature, Tensor):
        _check.floating("sample_tokens", "temperature", temperature)
        _check.shape("sample_tokens", "temperature", temperature, rows, "logits without V")
        _check.device("sample_tokens", "temperature", temperature, logits, "logits")
        per_row = temperature.detach().to(wide(logits.dtype))
    else:
        value = _check.number("sample_tokens", "temperature", temperature, 0.0)
    if uniform is None:
        if per_row is not None or value > 0:
            raise _check.error(TypeError, "sample_tokens", "uniform", None, "a tensor, but for temperature 0")
    else:
        _check.floating("sample_tokens", "uniform", uniform)
        _check.shape("sample_tokens", "uniform", uniform, rows, "logits without V")
        _check.device("sample_tokens", "uniform", uniform, logits, "logits")
        if uniform.dtype is not torch.float64:
            raise _check.error(TypeError, "sample_tokens", "uniform", uniform.dtype, "torch.float64")
    mask = None if mask is None else _checked_mask(mask, rows, logits)
    cap = 0.0 if softcap is None else _check.number("sample_tokens", "softcap", softcap, 0.0, open_low=True)
    if banned_ids is not None:
        banned_ids = _checked_bans(banned_ids, V, logits)
    return SampledTokens(*_sample_tokens(logits, uniform, mask, per_row, banned_ids, value, cap))


def _checked_mask(mask: Tensor, rows: torch.Size, logits: Tensor) -> Tensor:
    _check.boolean("sample_tokens", "mask", mask)
    _check.shape("sample_tokens", "mask", mask, rows, "logits without V")
    _check.device("sample_tokens", "mask", mask, logits, "logits")
    return mask.to(torch.bool)


def _checked_bans(banned_ids: Tensor, V: int, logits: Tensor) -> Tensor:
    _check.integer("sample_tokens", "banned_ids", banned_ids)
    if banned_ids.dim() != 1:
        raise _check.error(ValueError, "sample_tokens", "banned_ids", f"shape {tuple(banned_ids.shape)}", "(K,)")
    _check.device("sample_tokens", "banned_ids", banned_ids, logits, "logits")
    known = banned_ids.is_cpu and type(banned_ids) is Tensor and not torch.compiler.is_compiling()
    if known and bool(((banned_ids < 0) | (banned_ids >= V)).any()):
        raise _check.error(ValueError, "sample_tokens", "banned_ids", banned_ids.tolist(), f"token ids in [0, {V})")
    return banned_ids.to(torch.int64)


def _forward(logits, uniform, mask, temperature, banned_ids, temperature_value, softcap):  # type: ignore[no-untyped-def]
    rows, vocab = logits.shape[:-1], logits.shape[-1]
    logits, _, (inner, outer_stride, inner_stride, *_) = _layout(logits, None)
    uniform, mask, temperature, banned_ids = map(contiguous, (uniform, mask, temperature, banned_ids))
    token_ids = torch.empty(rows, dtype=torch.int64)
    logprobs = torch.empty(rows, dtype=wide(logits.dtype))
    entropy = torch.empty_like(logprobs)
    row = kernel("sample_tokens")(
        logits,
        uniform,
        banned_ids,
        mask,
        temperature,
        token_ids,
        logprobs,
        entropy,
        token_ids.numel(),
        vocab,
        inner,
        outer_stride,
        inner_stride,
        0 if banned_ids is None else banned_ids.numel(),
        temperature_value,
        softcap,
        DTYPES[logits.dtype],
        torch.get_num_threads(),
    )
    if row >= 0:
        t = temperature_value if temperature is None else float(temperature.flatten()[row])
        raise ValueError(refused(row, t, float("nan") if uniform is None else float(uniform.flatten()[row])))
    return token_ids, logprobs, entropy


def _fake(logits, uniform, mask, temperature, banned_ids, temperature_value, softcap):  # type: ignore[no-untyped-def]
    rows = logits.shape[:-1]
    logprobs = logits.new_empty(rows, dtype=wide(logits.dtype))
    return logits.new_empty(rows, dtype=torch.int64), logprobs, torch.empty_like(logprobs)


_sample_tokens = Op(
    "sample_tokens",
    "(Tensor logits, Tensor? uniform, Tensor? mask, Tensor? temperature, Tensor? banned_ids, float temperature_value, "
    "float softcap) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    backends=[triton("sample_tokens", declines=lambda logits, *_: no_doubles(logits)), cpp(_forward)],
    strided=True,
)
