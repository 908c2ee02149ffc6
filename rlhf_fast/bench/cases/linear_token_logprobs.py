"""linear_token_logprobs against its bare matrix products, materialised logits and the peers' chunked heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases.common import DTYPES, TRUTH_ROWS, leaf, peer
from rlhf_fast.bench.engine import OURS, Call, Case, Results
from rlhf_fast.ops._lm_head import CHUNK_BYTES

ROWS, VOCAB, SEQUENCES = 2048, 49152, 8

Formulation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, ids) -> log-probs."""


def make(width: int, dtype: torch.dtype, rows: int = ROWS, vocab: int = VOCAB) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(rows, width, generator=g).to(dtype),
        "weight": (2 / width**0.5 * torch.randn(vocab, width, generator=g)).to(dtype),
        "ids": torch.randint(0, vocab, (rows,), generator=g),
        "upstream": torch.randn(rows, generator=g),
    }


def ours(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return rlhf_fast.linear_token_logprobs(hidden, weight, ids).logprobs


def materialised(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """All logits in memory; the cheapest eager formulation on them."""
    logits = torch.nn.functional.linear(hidden, weight)
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def of_trl(function: Any) -> Formulation:
    """With its trainer's tile width; entropy left out, since only log-probs are asked for."""
    return lambda hidden, weight, ids: function.apply(hidden, weight, None, ids, 1.0, 8192, None, 1.0, ())[0]


def trl_contender(trained: bool, function: Any) -> Call:
    return both_of(of_trl(function), trained)


def both_of(formulation: Formulation, trained: bool) -> Call:
    def run(x: dict[str, Any]) -> Results:
        hidden, weight = leaf(x["hidden"]), leaf(x["weight"]) if trained else x["weight"]
        logprobs = formulation(hidden, weight, x["ids"])
        logprobs.backward(x["upstream"].to(logprobs.dtype))
        d_weight = weight.grad[:TRUTH_ROWS] if trained and weight.grad is not None else None
        return logprobs.detach(), hidden.grad, d_weight

    return run


def products(dtype: torch.dtype | None, trained: bool, again: bool) -> Call:
    """The matrix products alone, in chunks of the same budget: one for the logits, one for the gradient of each of hidden states
    and trained head, and one that computes the logits `again` where the upstream gradient comes after the forward."""

    def run(x: dict[str, Any]) -> Results:
        hidden, weight = (x[k].to(dtype or x[k].dtype) for k in ("hidden", "weight"))
        step = max(1, CHUNK_BYTES // (VOCAB * 4))
        buffer = torch.empty(step, VOCAB, dtype=hidden.dtype)
        back = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if trained else None
        for i in range(0, ROWS, step):
            h = hidden[i : i + step]
            z = torch.mm(h, weight.t(), out=buffer[: len(h)])
            torch.mm(z, weight, out=back[i : i + step])
            if again:
                torch.mm(h, weight.t(), out=z)
            if d_weight is not None:
                d_weight.addmm_(z.t(), h)
        return None, None, None

    return run


def of_liger(module: Any, trained: bool = False, compiled: bool = True) -> Call:
    """Its loss on the same head, which is all it offers: forward and backward in one, no per-token result."""
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0, compiled=compiled, use_ref_model=False, chunk_size=1)

    def run(x: dict[str, Any]) -> Results:
        hidden = leaf(x["hidden"].view(SEQUENCES, -1, x["hidden"].shape[-1]))
        weight = leaf(x["weight"]) if trained else x["weight"]
        ids = x["ids"].view(SEQUENCES, -1)
        advantages = x["upstream"][:SEQUENCES]
        value = loss(hidden, weight, ids, torch.ones_like(ids), advantages)
        (value[0] if isinstance(value, tuple) else value).backward()
        return None, None, None

    return run


def truth(x: dict[str, Any]) -> Results:
    """Log-probs and gradients of the first rows; the weight's gradient takes all rows, so it is left to the parity tests."""
    few = {k: v[:TRUTH_ROWS] for k, v in x.items() if k != "weight"} | {"weight": x["weight"]}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in few.items()}
    logprobs, d_hidden, _ = both_of(materialised, False)(wide)
    return logprobs, d_hidden, None


def cases() -> Iterator[Case]:
    for width in (576, 2048):
        for label, dtype in DTYPES.items():
            for trained in (False, True):
                if trained and width == 2048:
                    continue  # minutes per call for the peers; the narrow head shows the same
                bare = "bare products"
                found: dict[str, Call | str] = {
                    OURS: both_of(ours, trained),
                    bare: products(None, trained, again=trained),
                    "materialised": both_of(materialised, trained),
                    "TRL": peer(peers.trl_chunked_head, partial(trl_contender, trained)),
                }
                if dtype is torch.bfloat16:
                    found["bare products in fp32"] = products(torch.float32, trained, again=trained)
                if not trained:
                    found["Liger (loss)"] = peer(peers.liger, of_liger)
                fp32 = dtype is torch.float32
                bars = {bare: 1 / (1.2 if trained else 1.1)}
                if not trained:
                    bars |= {"TRL": 1.6 if fp32 else 4.0, "materialised": 1.3 if fp32 else 2.8, "Liger (loss)": 2.0}
                yield Case(
                    "linear_token_logprobs",
                    f"H {width}, [{ROWS}, {VOCAB}] {label}, {'trained' if trained else 'frozen'} head, forward + backward",
                    partial(make, width, dtype),
                    found,
                    truth,
                    bars=bars,
                    memory_bar=None if trained else CHUNK_BYTES + 2 * ROWS * width * 4,
                    seconds=30,
                )
