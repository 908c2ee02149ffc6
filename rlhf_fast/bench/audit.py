"""Who asks what of a device, at sizes of a GPU: `rlhf-fast bench --traffic`.

From logits and on vectors of tokens, an op of ours is one launch, and two where LAUNCHES says so; tests/gpu counts the bytes and the
launches of the kernels themselves. From hidden states it is a composition, counted operator by operator as it runs on a GPU: matrix
products in chunks of rows, and one kernel per chunk that turns logits into results or into their gradient.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import rlhf_fast
from rlhf_fast._op import OPS, Backend, Op
from rlhf_fast.bench import inductor, peers, roofline
from rlhf_fast.bench.cases import advantages, gae, ppo_loss
from rlhf_fast.bench.cases import linear_token_logprobs as heads
from rlhf_fast.bench.cases import sample_tokens as draws
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
    formulations: dict[str, tokens.Formulation] = {
        "rlhf_fast": tokens.ours,
        "eager": tokens.log_softmax,
        "eager, logsumexp": tokens.logsumexp,
        COMPILED: tokens.upcast(tokens.log_softmax),
        f"{COMPILED}, logsumexp": tokens.upcast(tokens.logsumexp),
    }
    around: dict[str, Around] = {"rlhf_fast": direct}
    for name, load, make in (
        ("TRL, PyTorch path", peers.trl_utils, tokens.of_trl),
        ("verl, PyTorch path", peers.verl_functional, tokens.of_verl),
    ):
        module = peers.attempt(load)
        if not isinstance(module, str):
            formulations[name] = make(module)
    module = peers.attempt(peers.trl_kernels)
    if not isinstance(module, str):
        formulations["TRL, its Triton kernels"] = module.selective_log_softmax_and_entropy
        around["TRL, its Triton kernels"] = partial(whole_rows, module)

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
            if name.startswith(COMPILED):
                counts.append(inductor.count(name, label, formulation, (logits, ids), minimum, trained))
            else:
                stands = around.get(name, contextlib.nullcontext)
                counts.append(count(name, label, partial(run, formulation), minimum, stands))
    return counts


def from_a_step(rows: int = 64, vocab: int = 151936, dtype: torch.dtype = torch.float32) -> list[Count]:
    """A token, its log-prob and the entropy of logits (rows, vocab) as a step of a rollout makes them."""
    x = {
        "logits": torch.empty(rows, vocab, dtype=dtype, device="meta"),
        "uniform": torch.empty(rows, dtype=torch.float64, device="meta"),
    }
    shape = f"[{rows}, {vocab}] {str(dtype).removeprefix('torch.')}, token, log-prob and entropy"
    minimum = sum(t.nbytes for t in x.values()) + rows * (8 + 2 * 4)
    counts = []
    for name, call, around in (
        ("rlhf_fast", draws.ours, direct),
        ("eager, the same token", draws.by_inversion, contextlib.nullcontext),
        ("eager, multinomial", draws.by_multinomial, contextlib.nullcontext),
    ):
        counts.append(count(name, shape, partial(call, x), minimum, around))
    return counts


class Launched:
    """Stands for a Triton kernel of a peer: a launch counts the tensors it is given, those in `written` as results."""

    def __init__(self, traffic: Traffic, written: slice) -> None:
        self._traffic, self._written = traffic, written

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **_: Any) -> None:
        given = tensors(args)
        written = given[self._written]
        read = {id(x): x for x in given if not any(x is w for w in written)}
        self._traffic.kernel(list(read.values()), written)


@contextlib.contextmanager
def whole_rows(module: Any, traffic: Traffic) -> Iterator[None]:
    """TRL's log-prob and entropy as they run on a GPU: one kernel forward, one backward, in the order of their arguments."""
    kernels = patch.multiple(
        module, _forward_kernel=Launched(traffic, slice(3, 7)), _backward_kernel=Launched(traffic, slice(7, 8))
    )
    with kernels:
        yield


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
    """linear_token_logprobs as its chunks run on a GPU, where its products and its kernels of rows count as one each."""
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
    rows = _lm_head.Rows(torch.ops.rlhf_fast.token_logprobs, gradient)
    traffic.inside = {
        name: on_meta(partial(linear._forward_by, rows, False)),
        f"{name}_backward": on_meta(partial(linear._backward_by, gradient, False)),
    }
    with patch.multiple(_lm_head, _buffers=buffers, matmul=product, native=lambda dtype: dtype is torch.float32):
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


def from_tokens(rows: int = 512, length: int = 2048) -> list[Count]:
    """Advantages of rollouts (rows, length) in fp32, and the PPO loss of policy and value with its gradients."""
    return [*_advantages(rows, length), *_ppo_loss(rows, length)]


def _advantages(rows: int, length: int) -> Iterator[Count]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = {name: empty(rows, length) for name in advantages.TENSORS}
    x |= {"scores": empty(rows), "mask": empty(rows, length, dtype=torch.bool)}
    label = f"advantages [{rows}, {length}] float32"
    results = 4 * x["values"].nbytes  # advantages, returns, rewards, KL; others leave out some
    minimum = sum(x[name].nbytes for name in advantages.TENSORS) + results
    scans: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("rlhf_fast", advantages.ours),
        ("eager, step by step", advantages.of_tensors(partial(advantages.stages, gae.loop))),
        ("eager, chunked scan", advantages.of_tensors(advantages.chunked)),
    ]
    algos = peers.attempt(peers.verl)
    if not isinstance(algos, str):
        scans.append(("verl", advantages.of_verl(algos)))
    for name, call in scans:
        around = direct if name == "rlhf_fast" else contextlib.nullcontext
        yield count(name, label, partial(call, x), minimum, around)
    tensors_in_order = [x[name] for name in advantages.TENSORS]
    yield inductor.count(f"{COMPILED}, chunked scan", label, advantages.chunked, tensors_in_order, minimum)


def _ppo_loss(rows: int, length: int) -> Iterator[Count]:
    names = ("logprobs", "values", "old_logprobs", "advantages", "mask", "old_values", "returns")
    x = {n: torch.empty(rows, length, dtype=torch.bool if n == "mask" else torch.float32, device="meta") for n in names}
    label = f"ppo_loss [{rows}, {length}] float32, forward + backward"
    minimum = sum(t.nbytes for t in x.values()) + x["logprobs"].nbytes + x["values"].nbytes
    losses: list[tuple[str, Callable[[dict[str, Any]], Any], Around]] = [
        ("rlhf_fast", ppo_loss.with_gradients(ppo_loss.ours), direct),
        ("eager, with statistics", ppo_loss.with_gradients(ppo_loss.ours), in_pytorch),
        ("eager, loss alone", ppo_loss.with_gradients(ppo_loss.fed(ppo_loss.bare)), contextlib.nullcontext),
    ]
    call = peers.attempt(lambda: ppo_loss.of_verl(peers.verl()))
    if not isinstance(call, str):
        losses.append(("verl", call, contextlib.nullcontext))
    for name, run, around in losses:
        yield count(name, label, partial(run, x), minimum, around)
    yield inductor.count(f"{COMPILED}, loss alone", label, ppo_loss.bare, [x[n] for n in names], minimum, (0, 1))


def _whitened(traffic: Traffic, args: Sequence[Any], out: Sequence[Tensor]) -> None:
    """No advantage is known before all are: a second launch reads them and the mask, and writes them again."""
    whiten, mask = args[17], args[2]
    if whiten:
        traffic.kernel((out[0], mask), (out[0],))


def _adapted(traffic: Traffic, args: Sequence[Any], out: Sequence[Tensor]) -> None:
    """After the product with the weight: the rows of the segments are read and shrunk, and the product's expanded onto in place."""
    (x, weight, _, _, other, _, _, bounds, ranks), (y, low) = args, out
    touched = [slice(a, b) for a, b, rank in zip(bounds[::2], bounds[1::2], ranks, strict=True) if b > a and rank]
    if touched:
        rows = [part.reshape(-1, part.shape[-1]) for part in (x if other is None else other, y)]
        read, written = ([part[segment] for segment in touched] for part in rows)
        traffic.kernel(read if other is None else (), (), 2 * low.numel() * x.shape[-1])
        traffic.kernel((*written, low), written, 2 * low.numel() * weight.shape[0])


def _drawn(traffic: Traffic, args: Sequence[Any], out: Sequence[Tensor]) -> None:
    """The first launch leaves three numbers of every part of a row; a second one adds them up and reads one part of each row again."""
    logits, vocab = args[0], args[0].shape[-1]
    part = 1024 if vocab <= 4096 else 4096
    sums = out[1].new_empty(out[1].numel(), 3, -(-vocab // part))
    traffic.kernel((sums, logits[..., :part]), (sums,))


LAUNCHES: dict[str, Callable[[Traffic, Sequence[Any], Sequence[Tensor]], None]] = {
    "advantages": _whitened,
    "lora_linear": _adapted,
    "sample_tokens": _drawn,
}
"""What follows the first launch of an op of ours, given its arguments and results."""


@contextlib.contextmanager
def direct(traffic: Traffic) -> Iterator[None]:
    """Ops of ours as a call on plain tensors runs them, past the dispatcher."""

    def usable(op: Op, device: str) -> tuple[Backend, ...]:
        def kernel(*args: Any) -> Any:
            out = op._fake(*args)
            traffic.kernel(tensors(args), tensors(out))
            if op.name in LAUNCHES:
                LAUNCHES[op.name](traffic, args, out)
            return out

        return (Backend("counted", device, kernel),)

    with patch.object(Op, "_usable", usable), patch("rlhf_fast._op.plain", lambda x: True):
        yield


@contextlib.contextmanager
def in_pytorch(traffic: Traffic) -> Iterator[None]:
    """Ops of ours count as the operators of their references."""
    traffic.inside = {f"rlhf_fast::{name}": op.reference for name, op in OPS.items()}
    yield


SHAPES = ((8192, 151936), (4096, 128256))
"""(tokens, vocabulary) of Qwen 2.5 and of Llama 3."""


def sections() -> list[tuple[str, list[Count]]]:
    """(title, counts) of everything."""
    return [
        ("log-prob + entropy, from logits", [c for rows, vocab in SHAPES for c in from_logits(rows, vocab)]),
        ("a token of a rollout", from_a_step()),
        ("scans and losses on tokens", from_tokens()),
        ("log-prob, from hidden states, forward + backward", from_hidden()),
    ]


def tables(found: Sequence[tuple[str, Sequence[Count]]]) -> str:
    """Markdown: what was counted, then what follows from it."""
    counted = "\n".join(table(title, counts) for title, counts in found)
    return f"{counted}\n{roofline.table([c for _, counts in found for c in counts])}"


def summary(found: Sequence[tuple[str, Sequence[Count]]]) -> str:
    """Markdown for a README: without the later shapes of the logits, and the least times of ours and of compiled programs alone."""
    left_out = tuple(f"[{rows}, {vocab}]" for rows, vocab in SHAPES[1:])
    short = [(title, [c for c in counts if not c.shape.startswith(left_out)]) for title, counts in found]
    counted = "\n".join(table(title, counts) for title, counts in short)
    kept = [c for _, counts in short for c in counts if c.name.startswith(("rlhf_fast", COMPILED))]
    return f"{counted}\n{roofline.table(kept)}"
