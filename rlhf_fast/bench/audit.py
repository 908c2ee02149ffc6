"""Who asks what of a device, at sizes of a GPU: `rlhf-fast bench --traffic`.

From logits, an op of ours is one operator, which is what its kernel does. From hidden states it is a composition, counted operator
by operator as it runs on the CPU: matrix products in chunks of rows, and one kernel per chunk that turns logits into results or
into their gradient.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast.bench import inductor, peers
from rlhf_fast.bench.cases import linear_token_logprobs as heads
from rlhf_fast.bench.cases import token_logprobs as tokens
from rlhf_fast.bench.cases.common import backward, leaf
from rlhf_fast.bench.traffic import Count, Traffic, count, table, tensors
from rlhf_fast.ops import _lm_head

Around = Callable[[Traffic], contextlib.AbstractContextManager[Any]]
COMPILED = "torch.compile"
LARGE_CHUNK = 2**30


def from_logits(rows: int = 8192, vocab: int = 151936, dtype: torch.dtype = torch.bfloat16) -> list[Count]:
    """Log-prob and entropy of logits (rows, vocab), forward alone and with backward."""
    logits = torch.empty(rows, vocab, dtype=dtype, device="meta")
    ids = torch.empty(rows, dtype=torch.int64, device="meta")
    upstream = torch.empty(rows, device="meta")
    size, small = logits.numel() * dtype.itemsize, rows * (8 + 2 * 4)
    shape = f"[{rows}, {vocab}] {str(dtype).removeprefix('torch.')}"
    formulations: dict[str, tokens.Formulation | str] = {
        "rlhf_fast": tokens.ours,
        "eager": tokens.log_softmax,
        "eager, logsumexp": tokens.logsumexp,
        COMPILED: tokens.upcast(tokens.log_softmax),
        f"{COMPILED}, logsumexp": tokens.upcast(tokens.logsumexp),
    }
    for name, load, make in (
        # On a GPU TRL has a fused kernel of its own; what is counted is its path in PyTorch, as on every other device.
        ("TRL, PyTorch path", peers.trl_utils, tokens.of_trl),
        ("verl, PyTorch path", peers.verl_functional, tokens.of_verl),
    ):
        module = peers.attempt(load)
        formulations[name] = module if isinstance(module, str) else make(module)

    def both(formulation: tokens.Formulation) -> Tensor | None:
        x = leaf(logits)
        backward(formulation(x, ids), (upstream, upstream))
        return x.grad

    def forward(formulation: tokens.Formulation) -> Any:
        with torch.no_grad():
            return formulation(logits, ids)

    counts = []
    for label, run, trained, minimum in (
        (f"{shape}, forward", forward, (), size + small),
        (f"{shape}, forward + backward", both, (0,), 3 * size + 2 * small),
    ):
        for name, formulation in formulations.items():
            if isinstance(formulation, str):
                continue
            if name.startswith(COMPILED):
                counts.append(inductor.count(name, label, formulation, (logits, ids), minimum, trained))
            else:
                counts.append(count(name, label, partial(run, formulation), minimum))
    return counts


def from_hidden(
    rows: int = 8192, width: int = 4096, vocab: int = 151936, dtype: torch.dtype = torch.bfloat16
) -> list[Count]:
    """Log-probs of hidden states (rows, width) and a head (vocab, width), forward and backward, the head frozen or trained."""
    hidden = torch.empty(rows, width, dtype=dtype, device="meta")
    weight = torch.empty(vocab, width, dtype=dtype, device="meta")
    ids = torch.empty(rows, dtype=torch.int64, device="meta")
    x = {"hidden": hidden, "weight": weight, "ids": ids, "upstream": torch.empty(rows, device="meta")}
    shape = f"[{rows}, {width}] x [{vocab}, {width}] {str(dtype).removeprefix('torch.')}"
    counts = []
    for trained in (False, True):
        label = f"{shape}, {'trained' if trained else 'frozen'} head"
        results = [hidden, *([weight] if trained else [])]
        minimum = sum(t.nbytes for t in (*x.values(), *results, x["upstream"]))
        for name, call, around in _heads(trained):
            counts.append(count(name, label, partial(call, x), minimum, around))
        name, places = f"{COMPILED}, materialised", (0, 1) if trained else (0,)
        counts.append(inductor.count(name, label, heads.materialised, (hidden, weight, ids), minimum, places))
    return counts


def _heads(trained: bool) -> Iterator[tuple[str, heads.Call, Around]]:
    """(name, call, what stands around it) of every formulation that runs here."""

    def large(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return rlhf_fast.linear_token_logprobs(hidden, weight, ids, chunk_bytes=LARGE_CHUNK).logprobs

    yield "rlhf_fast", heads.both_of(heads.ours, trained), composition
    yield "rlhf_fast, chunk_bytes 1 GiB", heads.both_of(large, trained), composition
    yield "materialised", heads.both_of(heads.materialised, trained), contextlib.nullcontext
    function = peers.attempt(peers.trl_chunked_head)
    if not isinstance(function, str):
        call = heads.both_of(heads.of_trl(function), trained)
        yield "TRL, PyTorch path", call, no_autocast
        yield "TRL, its Triton kernels", call, partial(fused_tiles, importlib.import_module(function.__module__))
    module = peers.attempt(peers.liger)
    if not isinstance(module, str):
        yield "Liger (loss)", heads.of_liger(module, trained, compiled=False), contextlib.nullcontext


@contextlib.contextmanager
def composition(traffic: Traffic) -> Iterator[None]:
    """linear_token_logprobs as its chunks run, where its products and its kernels of rows are operators or count as one each."""
    linear = importlib.import_module("rlhf_fast.ops.linear_token_logprobs")
    buffers = SimpleNamespace(empty=lambda shape, dtype: torch.empty(shape, dtype=dtype))

    def gradient(grad: Tensor, logits: Tensor, token_ids: Tensor, state: Tensor, *rest: Any) -> Tensor:
        traffic.kernel((logits, token_ids, state, *tensors(rest)), (grad,))
        return grad

    def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, **_: Any) -> None:
        traffic.kernel((a, b, *([out] if add else [])), (out,), 2 * a.shape[0] * a.shape[1] * b.shape[1])

    def on_meta(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with torch.device("meta"):
                return function(*args)

        return run

    name = "rlhf_fast::linear_token_logprobs"
    traffic.inside = {name: on_meta(linear._forward), f"{name}_backward": on_meta(linear._backward_chunked)}
    rows = patch.multiple(linear, tokens_forward=torch.ops.rlhf_fast.token_logprobs, backward_into=gradient)
    head = patch.multiple(_lm_head, _buffers=buffers, matmul=product, native=lambda dtype: dtype is torch.float32)
    with rows, head:
        yield


def no_autocast(_: Traffic) -> contextlib.AbstractContextManager[Any]:
    """TRL asks for it, which torch refuses to answer for meta tensors."""
    return patch.object(torch, "is_autocast_enabled", lambda *_: False)


@contextlib.contextmanager
def fused_tiles(module: Any, traffic: Traffic) -> Iterator[None]:
    """TRL's chunked head as it runs on a GPU: a kernel folds or differentiates a tile of logits in one pass, and products of
    bf16 add to an fp32 sum in one."""

    def forward(tile: Tensor, stride: int, targets: Tensor, *rest: Any, **_: Any) -> None:
        statistics = tensors(rest)
        traffic.kernel((tile, targets, *statistics), statistics)

    def gradient(tile: Tensor, stride: int, targets: Tensor, *rest: Any, **_: Any) -> None:
        traffic.kernel((tile, targets, *tensors(rest)), (tile,))

    def product(total: Tensor, a: Tensor, b: Tensor) -> None:
        traffic.kernel((total, a, b), (total,), 2 * a.shape[0] * a.shape[1] * b.shape[1])

    tiles = patch.multiple(module, _forward_tile=forward, _backward_tile=gradient, _addmm_fp32=product)
    with no_autocast(traffic), tiles:
        yield


def tables() -> str:
    """Both, as Markdown."""
    logits = table("log-prob + entropy, from logits", from_logits())
    return f"{logits}\n{table('log-prob, from hidden states, forward + backward', from_hidden())}"
