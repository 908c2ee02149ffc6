"""Token statistics of hidden states under a language-model head, through the full logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.reference.token_logprobs import token_logprobs


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature_value: float,
    softcap: float,
    op: str = "linear_token_logprobs",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logprobs, entropy, logsumexp, kl), each (...), of logits = hidden weight^T + bias.

    hidden (..., H), weight (V, H), bias (V,), ref_hidden (..., R), ref_weight (V, R) or None: `weight`, ref_bias (V,).
    Mixed dtypes are promoted; the logits are stored in the promoted one, whatever autocast says.
    """

    logits = _project(hidden, weight, bias, mask)
    ref_logits = None
    if ref_hidden is not None:
        shared = ref_weight is None
        with torch.no_grad():
            ref_logits = _project(
                ref_hidden, weight if ref_weight is None else ref_weight, bias if shared else ref_bias, mask
            )
    return token_logprobs(logits, token_ids, mask, temperature, ref_logits, temperature_value, softcap, op)


def _project(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, w.dtype)
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0.0)  # 0 * NaN in the gradient of the weight
    with _without_autocast(x.device.type):
        return F.linear(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype))


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Autocast would round fp32 operands of a product to its own dtype."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def sample(
    shape: tuple[int, ...] = (4, 9),
    vocab: int = 127,
    hidden_size: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ref: bool = True,
    bias: bool = True,
) -> dict[str, Tensor]:
    """Tensor arguments of ops.linear_token_logprobs for tests and benchmarks."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g, dtype=torch.float64) * std).to(dtype)

    mask = torch.rand(shape, generator=g) > 0.25
    kwargs = {
        "hidden": normal(*shape, hidden_size),
        "weight": normal(vocab, hidden_size, std=2.0 / hidden_size**0.5),
        "token_ids": torch.randint(0, vocab, shape, generator=g).masked_fill(~mask, -100),
        "mask": mask,
    }
    if bias:
        kwargs["bias"] = normal(vocab)
    if ref:
        kwargs["ref_hidden"] = (kwargs["hidden"].double() + 0.1 * normal(*shape, hidden_size).double()).to(dtype)
        kwargs["ref_weight"] = normal(vocab, hidden_size, std=2.0 / hidden_size**0.5)
    return kwargs
