"""Log-probs of tokens from hidden states, by the whole matrix of logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from rlhf_fast.reference.token_logprobs import token_logprobs


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    temperature_value: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """token_logprobs of hidden (..., H) @ weight (V, H)^T + bias (V,); the reference shares weight and bias unless ref_weight.

    A masked row of hidden is not read: it is replaced before the product, since NaN * 0 would spread into the gradient
    of the weight.
    """

    def logits(x: Tensor, w: Tensor) -> Tensor:
        return linear(x if mask is None else x.masked_fill(~mask[..., None], 0.0), w, bias)

    ref_logits = None
    if ref_hidden is not None:
        with torch.no_grad():
            ref_logits = logits(ref_hidden, weight if ref_weight is None else ref_weight)
    return token_logprobs(logits(hidden, weight), token_ids, mask, temperature, ref_logits, temperature_value, softcap)


def sample(
    rows: tuple[int, ...] = (3, 11),
    vocab: int = 97,
    hidden: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ref: bool = False,
) -> dict[str, Tensor]:
    """Tensor arguments of ops.linear_token_logprobs: peaked logits, a ragged mask, bad ids under it."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.rand(*rows, generator=g) > 0.25
    kwargs = {
        "hidden": draw(*rows, hidden).to(dtype),
        "weight": (draw(vocab, hidden) * 3 / hidden**0.5).to(dtype),
        "bias": draw(vocab).to(dtype),
        "token_ids": torch.randint(0, vocab, rows, generator=g).masked_fill(~mask, -100),
        "mask": mask,
    }
    if ref:
        kwargs["ref_hidden"] = kwargs["hidden"] + (0.2 * draw(*rows, hidden)).to(dtype)
    return kwargs
