"""linear_ppo_loss against its bare matrix products, its two steps, materialised logits and the peers' heads with an eager loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases import linear_token_logprobs as head
from rlhf_fast.bench.cases.common import DTYPES, TRUTH_ROWS, leaf, peer
from rlhf_fast.bench.cases.linear_token_logprobs import CHUNK_BYTES, ROWS, SEQUENCES, VOCAB, products
from rlhf_fast.bench.engine import OURS, Call, Case, Results

CLIP, ENTROPY_COEF = 0.2, 0.01

Formulation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(hidden, weight, ids) -> log-probs and, with a bonus, entropies."""
Loss = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
"""(hidden, weight, inputs) -> loss."""


def make(width: int, dtype: torch.dtype) -> dict[str, Any]:
    x = head.make(width, dtype)
    with torch.no_grad():
        now = rlhf_fast.linear_token_logprobs(x["hidden"], x["weight"], x["ids"]).logprobs
    # One advantage per sequence is all that Liger takes.
    advantages = x.pop("upstream")[:SEQUENCES].repeat_interleave(ROWS // SEQUENCES)
    noise = torch.randn(ROWS, generator=torch.Generator().manual_seed(1))
    return {
        **x,
        "old_logprobs": now + 0.05 * noise,
        "advantages": advantages,
        "mask": torch.ones(ROWS, dtype=torch.bool),
    }


def both_of(loss_of: Loss, trained: bool) -> Call:
    def run(x: dict[str, Any]) -> Results:
        hidden, weight = leaf(x["hidden"]), leaf(x["weight"]) if trained else x["weight"]
        loss = loss_of(hidden, weight, x)
        loss.backward()
        return loss.detach(), hidden.grad, None

    return run


def ours(coef: float, hidden: Tensor, weight: Tensor, x: dict[str, Any]) -> Tensor:
    rest = (x[k] for k in ("ids", "old_logprobs", "advantages", "mask"))
    return rlhf_fast.linear_ppo_loss(hidden, weight, *rest, entropy_coef=coef).loss


def two_steps(coef: float, hidden: Tensor, weight: Tensor, x: dict[str, Any]) -> Tensor:
    found = rlhf_fast.linear_token_logprobs(hidden, weight, x["ids"])
    rest = (x[k] for k in ("old_logprobs", "advantages", "mask"))
    entropy = found.entropy if coef else found.entropy.detach()
    return rlhf_fast.ppo_loss(found.logprobs, *rest, entropy=entropy, entropy_coef=coef).loss


def eager_loss(logprobs: Tensor, entropy: Tensor | None, coef: float, x: dict[str, Any], total: int = ROWS) -> Tensor:
    """The loss alone, without statistics, as a mean over `total` tokens."""
    rows = slice(0, len(logprobs))
    ratio, advantages = (logprobs - x["old_logprobs"][rows]).exp(), x["advantages"][rows]
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).sum() / total
    return loss if entropy is None else loss - coef * entropy.sum() / total


def with_eager_loss(formulation: Formulation, coef: float, total: int = ROWS) -> Loss:
    return lambda hidden, weight, x: eager_loss(*formulation(hidden, weight, x["ids"]), coef, x, total)


def materialised(coef: float, hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """All logits in memory."""
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logsumexp = logits.logsumexp(-1)
    logprobs = logits.gather(-1, ids[:, None]).squeeze(-1) - logsumexp
    return logprobs, logsumexp - (logits.softmax(-1) * logits).sum(-1) if coef else None


def of_trl(coef: float, trained: bool, function: Any, rows: int = ROWS) -> Call:
    """With its trainer's tile width."""
    outputs = ("entropy",) if coef else ()

    def formulation(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return function.apply(hidden, weight, None, ids, 1.0, 8192, None, 1.0, outputs)[:2]

    return both_of(with_eager_loss(formulation, coef, rows), trained)


def of_liger(trained: bool, module: Any) -> Call:
    made = module.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=True,
        use_ref_model=False,
        chunk_size=1,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="bnpo",
    )

    def loss(hidden: Tensor, weight: Tensor, x: dict[str, Any]) -> Tensor:
        ids, old, mask = (x[k].view(SEQUENCES, -1) for k in ("ids", "old_logprobs", "mask"))
        advantages = x["advantages"].view(SEQUENCES, -1)[:, 0]
        found = made(
            hidden.view(*ids.shape, -1), weight, ids, mask.to(torch.int64), advantages, old_per_token_logps=old
        )
        return found[0] if isinstance(found, tuple) else found

    return both_of(loss, trained)


def truth(coef: float, x: dict[str, Any]) -> Results:
    """Loss of all rows, gradient of the first; the weight's gradient is left to the parity tests."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    per_row = [k for k in wide if k != "weight"]
    total, d_hidden = torch.zeros((), dtype=torch.float64), None
    for i in range(0, ROWS, TRUTH_ROWS * 16):
        some = {k: wide[k][i : i + TRUTH_ROWS * 16] for k in per_row}
        hidden = leaf(some["hidden"])
        logprobs, entropy = materialised(coef, hidden, wide["weight"], some["ids"])
        loss = eager_loss(logprobs, entropy, coef, some)
        total += loss.detach()
        if d_hidden is None:
            (d_hidden,) = torch.autograd.grad(loss, hidden)
    assert d_hidden is not None
    return total, d_hidden[:TRUTH_ROWS], None


def cases() -> Iterator[Case]:
    for width, label, trained, coef in (
        (576, "fp32", False, 0.0),
        (576, "fp32", False, ENTROPY_COEF),
        (576, "fp32", True, 0.0),
        (576, "bf16", False, 0.0),
        (2048, "fp32", False, 0.0),
    ):
        dtype, bare = DTYPES[label], "bare products in fp32"
        found: dict[str, Call | str] = {
            OURS: both_of(partial(ours, coef), trained),
            bare: products(torch.float32, trained, again=False),
            "chunked, in two steps": both_of(partial(two_steps, coef), trained),
            "materialised": both_of(with_eager_loss(partial(materialised, coef), coef), trained),
            "TRL": peer(peers.trl_chunked_head, partial(of_trl, coef, trained)),
        }
        if not coef:
            found["Liger"] = peer(peers.liger, partial(of_liger, trained))
        kept = ROWS * width * 4
        yield Case(
            "linear_ppo_loss",
            f"H {width}, [{ROWS}, {VOCAB}] {label}, {'trained' if trained else 'frozen'} head"
            f"{', entropy bonus' if coef else ''}, forward + backward",
            partial(make, width, dtype),
            found,
            partial(truth, coef),
            bars={bare: 1 / 1.1},
            memory_bar=CHUNK_BYTES + 2 * kept + (VOCAB * width * 4 if trained else 0),
            seconds=30,
        )
