"""token_logprobs against what trainers run: log-prob and entropy of logits, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast import _buffers
from rlhf_fast.bench import peers
from rlhf_fast.bench.cases.common import DTYPES, TRUTH_ROWS, backward, compiled, leaf, no_grad, peer
from rlhf_fast.bench.engine import OURS, Call, Case, Results
from rlhf_fast.bench.machine import Machine
from rlhf_fast.ops.token_logprobs import backward_into, forward

SHAPES = [(2048, 50304), (2048, 151936)]

BARS = {
    "TRL": 20.0,
    "torch.compile": 5.0,
    "torch.compile, logsumexp": 5.0,
    "eager": 2.0,
    "eager, logsumexp": 2.0,
    "limit": 0.85,
}
"""Of forward and backward with entropy."""

Pair = tuple[Tensor, Tensor]
Formulation = Callable[[Tensor, Tensor], Pair]


def log_softmax(logits: Tensor, ids: Tensor) -> Pair:
    """The textbook formulation."""
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def logsumexp(logits: Tensor, ids: Tensor) -> Pair:
    """Without a tensor of log-probs."""
    lse = torch.logsumexp(logits, -1)
    logprobs = logits.gather(-1, ids[:, None]).squeeze(-1) - lse
    return logprobs, lse - (torch.softmax(logits, -1) * logits).sum(-1)


def upcast(formulation: Formulation) -> Formulation:
    """In fp32 whatever the dtype, fused into the reads by the compiler."""
    return lambda logits, ids: formulation(logits.float(), ids)


def ours(logits: Tensor, ids: Tensor) -> Pair:
    out = rlhf_fast.token_logprobs(logits, ids)
    return out.logprobs, out.entropy


def of_trl(utils: Any) -> Formulation:
    return lambda logits, ids: (utils.selective_log_softmax(logits, ids), utils.entropy_from_logits(logits))


def of_verl(functional: Any) -> Formulation:
    return lambda logits, ids: (functional.logprobs_from_logits(logits, ids), functional.entropy_from_logits(logits))


def of_openrlhf(utils: Any) -> Formulation:
    return lambda logits, ids: (utils.log_probs_from_logits(logits, ids), utils.compute_entropy(logits))


def forward_of(formulation: Formulation) -> Call:
    return no_grad(lambda x: formulation(x["logits"], x["ids"]))


def both_of(formulation: Formulation) -> Call:
    def run(x: dict[str, Any]) -> Results:
        logits = leaf(x["logits"])
        outputs = formulation(logits, x["ids"])
        backward(outputs, (x["g_logprobs"], x["g_entropy"]))
        return *(o.detach() for o in outputs), logits.grad

    return run


def alone_of(logprobs_of: Callable[[Tensor, Tensor], Tensor]) -> Call:
    """Forward and backward of the log-probs alone."""

    def run(x: dict[str, Any]) -> Results:
        logits = leaf(x["logits"])
        logprobs = logprobs_of(logits, x["ids"])
        backward((logprobs,), (x["g_logprobs"],))
        return logprobs.detach(), logits.grad

    return run


def gathered(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, ids[:, None]).squeeze(-1)


def through(of: Callable[[Formulation], Call], make: Callable[[Any], Formulation], module: Any) -> Call:
    return of(make(module))


def contenders(of: Callable[[Formulation], Call]) -> dict[str, Call | str]:
    found: dict[str, Call | str] = {
        OURS: of(ours),
        "eager": of(log_softmax),
        "eager, logsumexp": of(logsumexp),
        "torch.compile": of(compiled(upcast(log_softmax))),
        "torch.compile, logsumexp": of(compiled(upcast(logsumexp))),
    }
    for name, load, make in (
        ("TRL", peers.trl_utils, of_trl),
        ("verl", peers.verl_functional, of_verl),
        ("OpenRLHF", lambda: peers.openrlhf("models.utils"), of_openrlhf),
    ):
        found[name] = peer(load, partial(through, of, make))
    return found


def truth(call: Call) -> Call:
    """`call` on the first rows in fp64."""
    return lambda x: call(
        {k: v[:TRUTH_ROWS].double() if v.is_floating_point() else v[:TRUTH_ROWS] for k, v in x.items()}
    )


def gradient(x: dict[str, Any]) -> Results:
    """Our backward alone, of what a forward kept, into memory that is there already."""
    grads = (x["g_logprobs"], x["g_entropy"], x["g_logsumexp"], None)
    return (backward_into(x["into"], x["logits"], x["ids"], x["state"], None, None, None, grads, 1.0, 0.0),)


def gradient_of_log_softmax(x: dict[str, Any]) -> Results:
    """The same by autograd."""
    logits = leaf(x["logits"])
    outputs = (*log_softmax(logits, x["ids"]), torch.logsumexp(logits, -1))
    backward(outputs, (x["g_logprobs"], x["g_entropy"], x["g_logsumexp"]))
    return (logits.grad,)


def make_backward(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of the backward alone."""
    inputs = make(rows, vocab, dtype)
    into = _buffers.empty((rows, vocab), dtype).zero_()
    state = forward(inputs["logits"], inputs["ids"], None, None, None, 1.0, 0.0, True)[-1]
    return {**inputs, "g_logsumexp": inputs["g_entropy"].flip(0), "state": state, "into": into}


def make(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": (3 * torch.randn(rows, vocab, generator=generator)).to(dtype),
        "ids": torch.randint(0, vocab, (rows,), generator=generator),
        "g_logprobs": torch.randn(rows, generator=generator),
        "g_entropy": torch.randn(rows, generator=generator),
    }


def cases() -> Iterator[Case]:
    """Forward alone, forward with backward of log-prob and entropy, and backward alone."""
    for rows, vocab in SHAPES:
        for label, dtype in DTYPES.items():
            inputs = partial(make, rows, vocab, dtype)
            size, n = rows * vocab * dtype.itemsize, rows * vocab

            def read(m: Machine, size: int = size, n: int = n) -> float:
                return m.seconds(read=size, exps=n)

            def read_read_write(m: Machine, size: int = size, n: int = n) -> float:
                return m.seconds(read=size, exps=n) + m.seconds(read=size, written=size, exps=n)

            def read_write(m: Machine, size: int = size, n: int = n) -> float:
                return m.seconds(read=size, written=size, exps=n)

            shape = f"[{rows}, {vocab}] {label}"
            yield Case(
                "token_logprobs",
                f"{shape}, forward with entropy",
                inputs,
                contenders(forward_of),
                truth(forward_of(log_softmax)),
                read,
                bars={"limit": 0.85},
            )
            yield Case(
                "token_logprobs",
                f"{shape}, forward + backward with entropy",
                inputs,
                contenders(both_of),
                truth(both_of(log_softmax)),
                read_read_write,
                bars=BARS,
                seconds=30,
            )
            yield Case(
                "token_logprobs",
                f"{shape}, backward with all gradients, into preallocated memory",
                partial(make_backward, rows, vocab, dtype),
                {OURS: gradient},
                truth(gradient_of_log_softmax),
                read_write,
                bars={"limit": 0.85},
            )
            if vocab == SHAPES[0][1]:
                yield Case(
                    "token_logprobs",
                    f"{shape}, forward + backward of the log-prob alone",
                    inputs,
                    {
                        OURS: alone_of(lambda logits, ids: rlhf_fast.token_logprobs(logits, ids).logprobs),
                        "eager": alone_of(gathered),
                    },
                    truth(alone_of(gathered)),
                    read_read_write,
                    bars={"eager": 5.0},
                )
