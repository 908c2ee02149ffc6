"""What the ops on hidden states and a language-model head share: checks, and logits that never exist whole.

Logits come in two cuts of the same budget. Whole rows, a few at a time, are what a softmax needs. Once its sums are known, the
logits can also be computed again one range of the vocabulary at a time for all rows: then the weight is read, converted and
its gradient written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check
from rlhf_fast.ops._matmul import matmul, native, pitch
from rlhf_fast.ops.token_logprobs import temperature_of

CHUNK_BYTES = 64 << 20
"""Default budget of everything that lives for one chunk on a CPU."""
DEVICE_CHUNK_BYTES = 512 << 20
"""The same on a GPU, where every chunk reads the weight from memory again: by an H100's data sheet a head of 8192 x 4096 x 131072 in
bf16 takes 18 ms of products, and 71 ms of traffic in chunks of 64 MiB, 18 in these (`rlhf-fast bench --traffic`)."""

_BROAD, _NARROW = 2048, 64
"""Classes of a range of the vocabulary: what rows leave room for, and the fewest that are worth a product."""


def arguments(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    chunk_bytes: int | None,
) -> Inputs:
    """Checked arguments of an op on hidden (..., H) and a head (V, H), without a reference."""
    _check.floating(op, "hidden", hidden)
    if hidden.dim() == 0:
        raise _check.error(ValueError, op, "hidden", "a scalar", "(..., H)")
    check_weight(op, "weight", weight, hidden, None, "(V, H) with V > 0 and the H of hidden")
    _check.integer(op, "token_ids", token_ids)
    _check.shape(op, "token_ids", token_ids, hidden.shape[:-1], "hidden without H")
    _check.device(op, "token_ids", token_ids, hidden, "hidden")
    check_bias(op, "bias", bias, weight, hidden)
    mask = _check.mask_like(op, mask, token_ids, "token_ids")
    value, per_token = temperature_of(op, temperature, token_ids, compute_dtype(hidden, weight))
    cap = 0.0 if softcap is None else _check.number(op, "softcap", softcap, 0.0, open_low=True)
    if chunk_bytes is None:
        budget = CHUNK_BYTES if hidden.is_cpu else DEVICE_CHUNK_BYTES
    else:
        budget = int(_check.number(op, "chunk_bytes", chunk_bytes, 1))
    return Inputs(hidden, weight, bias, token_ids, mask, per_token, None, None, None, value, cap, budget)


def check_weight(op: str, name: str, x: Tensor, hidden: Tensor, vocab: int | None, expected: str) -> None:
    """`x` is a head for `hidden`, of `vocab` classes when that is given."""
    _check.floating(op, name, x)
    _check.device(op, name, x, hidden, "hidden")
    right = x.dim() == 2 and x.shape[0] > 0 and x.shape[1] == hidden.shape[-1]
    if not right or (vocab is not None and x.shape[0] != vocab):
        raise _check.error(ValueError, op, name, f"shape {tuple(x.shape)}", expected)


def check_bias(op: str, name: str, x: Tensor | None, weight: Tensor, hidden: Tensor) -> None:
    """`x` is a bias of the head `weight`, or None."""
    if x is not None:
        _check.floating(op, name, x)
        _check.shape(op, name, x, weight.shape[:1], "the rows of weight")
        _check.device(op, name, x, hidden, "hidden")


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """dtype of the products and of the results."""
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


class Head(NamedTuple):
    """A language-model head and how it is taken part by part."""

    weight: Tensor
    bias: Tensor | None
    """In the compute dtype."""
    room: Tensor
    """(classes, H) for a part of the weight in the compute dtype; (classes, 0) when products take the weight as it is."""

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """(range of the vocabulary, its weight as products take it), the second valid until the next."""
        for v in range(0, len(self.weight), len(self.room)):
            part = self.weight[v : v + len(self.room)]
            yield slice(v, v + len(part)), self.room[: len(part)].copy_(part) if self.room.shape[1] else part

    def logits(self, x: Tensor, part: slice, w: Tensor, out: Tensor) -> None:
        """x (n, H) times the weight w of a range, plus its bias, into out (n, range)."""
        narrow = x.dtype is w.dtype is torch.bfloat16
        matmul(x, w.t(), out, bias=None if self.bias is None else self.bias[part], narrow=narrow)


class Inputs(NamedTuple):
    """The arguments about logits, in the order of the schemas."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    mask: Tensor | None
    temperature: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    temperature_value: float
    softcap: float
    chunk_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.hidden, self.weight)

    @property
    def numbers(self) -> tuple[float, float]:
        """As the kernels take them."""
        return self.temperature_value, self.softcap

    @property
    def narrow(self) -> bool:
        """Whether gradients towards hidden and weight end as bf16."""
        return self.hidden.dtype is self.weight.dtype is torch.bfloat16

    @property
    def exact(self) -> bool:
        """Whether products take states and weights as they are, with results in the compute dtype."""
        if not self.hidden.is_cuda:
            return native(self.dtype)
        factors = (self.hidden, self.weight, self.ref_hidden, self.ref_weight)
        return all(x is None or x.dtype is torch.bfloat16 for x in factors)

    def converts(self, x: Tensor) -> bool:
        """Whether x, hidden states or a weight, has to be brought to the compute dtype before a product."""
        return x.dtype is not self.dtype and not self.exact

    def legal(self) -> Tensor:
        """Of flat inputs, the real rows whose token id and temperature are in range."""
        found = (self.token_ids >= 0) & (self.token_ids < self.weight.shape[0])
        if self.temperature is not None:
            found &= (self.temperature > 0) & self.temperature.isfinite()
        return found if self.mask is None else found & self.mask

    def flat(self) -> Inputs:
        """One row per token."""
        per_row = [None if x is None else x.reshape(-1) for x in (self.token_ids, self.mask, self.temperature)]
        states = [None if x is None else x.reshape(-1, x.shape[-1]) for x in (self.hidden, self.ref_hidden)]
        return self._replace(
            hidden=states[0], ref_hidden=states[1], token_ids=per_row[0], mask=per_row[1], temperature=per_row[2]
        )

    def heads(self, classes: int) -> list[Head]:
        """The head of the policy, and of the reference if there is one, with room for so many classes."""

        def made(weight: Tensor, bias: Tensor | None) -> Head:
            width = weight.shape[1] if self.converts(weight) else 0
            bias = None if bias is None else bias.to(self.dtype).contiguous()
            return Head(weight, bias, torch.empty((classes, width), dtype=self.dtype, device=weight.device))

        found = [made(self.weight, self.bias)]
        if self.ref_hidden is not None:
            found.append(found[0] if self.ref_weight is None else made(self.ref_weight, self.ref_bias))
        return found


class Rows(NamedTuple):
    """What a backend computes on rows of logits: the cells of token_logprobs, without autograd."""

    forward: Callable[..., Any]
    backward_into: Callable[..., Any]


@functools.cache
def cuda_rows() -> Rows:
    from rlhf_fast.cuda import token_logprobs

    return Rows(token_logprobs.forward, token_logprobs.backward_into)


@functools.cache
def triton_rows() -> Rows:
    from rlhf_fast.kernels import token_logprobs

    return Rows(token_logprobs.forward, token_logprobs.backward_into)


class Chunk(NamedTuple):
    """Logits (n, range) of a few rows over a range of the vocabulary, in buffers that the next chunk overwrites."""

    head: Head
    rows: Tensor | slice
    part: slice
    hidden: Tensor
    """(n, H) as products take them."""
    logits: Tensor
    """As ref_logits and each of spare: rows `pitch` apart."""
    ref_logits: Tensor | None
    spare: Tensor
    """(buffers - 1, n, range), uninitialised."""
    token_ids: Tensor
    temperature: Tensor | None
    mask: Tensor | None
    """(n,) where rows were not picked by theirs."""
    narrow: Tensor | None
    """(n, range) bf16, uninitialised, or None."""

    def gradient(self, last: bool = True) -> Tensor:
        """(n, range) for the gradient of the logits: the bf16 buffer if there is one, else their own memory when they are of no
        more use (`last`), else a spare buffer."""
        if self.narrow is not None:
            return self.narrow
        return self.logits if last else self.spare[0]


class _Cut:
    """What both cuts need: rows, hidden states and widths, in elements of the compute dtype."""

    def __init__(self, x: Inputs, live: Tensor | None) -> None:
        self.x = x
        self.hidden = [h for h in (x.hidden, x.ref_hidden) if h is not None]
        self.vocab = x.weight.shape[0]
        self.budget = x.chunk_bytes // x.dtype.itemsize
        index = None if live is None else live.nonzero().squeeze(1)
        self.count = len(x.hidden) if index is None else len(index)
        self.index = None if self.count == len(x.hidden) else index
        self.mask = x.mask if live is None else None
        self.states = 3 * sum(h.shape[1] for h in self.hidden)
        """Per row: its hidden states in the compute dtype, the same in another order, and a product of their width."""
        weights = [w for w in (x.weight, x.ref_weight) if w is not None]
        self.converted = sum(w.shape[1] for w in weights if x.converts(w))
        """Per class: its weights in the compute dtype."""

    def block(self, elements: int, bound: bool) -> Tensor:
        """Flat memory; of the same size whenever the budget binds, so that it is the same memory from call to call."""
        return empty((max(elements, self.budget) if bound else elements,), self.x.dtype, self.x.hidden.device)

    def narrow(self, wanted: bool, elements: int) -> Tensor | None:
        """Flat memory for a gradient in bf16, or None."""
        return empty((elements,), torch.bfloat16, self.x.hidden.device) if wanted else None

    @staticmethod
    def room(block: Tensor, buffers: int, rows: int, classes: int) -> Tensor:
        """(buffers, rows, classes) of the block."""
        return block[: buffers * rows * pitch(classes)].view(buffers, rows, -1)[..., :classes]

    def rows(self, size: int) -> Iterator[tuple[Tensor | slice, list[Tensor]]]:
        """(rows, hidden states (n, H) of policy and reference as products take them), `size` rows at a time."""
        for begin in range(0, self.count, max(1, size)):
            rows = slice(begin, begin + size) if self.index is None else self.index[begin : begin + size]
            states = [h[rows].to(self.x.dtype) if self.x.converts(h) else h[rows] for h in self.hidden]
            if self.mask is not None:  # a gradient of 0 times a NaN in a masked row would spread
                states = [h.masked_fill(~self.mask[rows, None], 0.0) for h in states]
            yield rows, states

    def chunk(
        self, head: Head, rows: Tensor | slice, part: slice, hidden: Tensor, room: Tensor, narrow: Tensor | None
    ) -> Chunk:
        x, used = self.x, len(self.hidden)
        temperature, mask = (None if t is None else t[rows] for t in (x.temperature, self.mask))
        ref = room[1] if used == 2 else None
        if narrow is not None:
            narrow = self.room(narrow, 1, *room.shape[1:])[0]
        ids = x.token_ids[rows]
        return Chunk(head, rows, part, hidden, room[0], ref, room[used:], ids, temperature, mask, narrow)


def whole_rows(x: Inputs, live: Tensor | None, buffers: int = 1, narrow: bool = False) -> Iterator[Chunk]:
    """Logits of the rows of flat inputs where `live` (N,) is True (None: all of them, with their mask), over the whole vocabulary.

    buffers: of the size of the logits, besides that of the reference; narrow: and one of bf16.
    """
    cut = _Cut(x, live)
    V = cut.vocab
    classes = V if not cut.converted else even_part(V, cut.budget // 16 // cut.converted)
    buffers += len(cut.hidden) - 1
    row = buffers * pitch(V) + narrow * pitch(V) // 2
    size = even_part(cut.count, (cut.budget - classes * cut.converted) // (row + cut.states))
    block = cut.block(buffers * size * pitch(V), size < cut.count)
    gradient = cut.narrow(narrow, size * pitch(V))
    heads = x.heads(classes)
    for rows, states in cut.rows(size):
        n = len(states[0])
        room = cut.room(block, buffers, n, V)
        for out, state, head in zip(room, states, heads, strict=False):
            for part, w in head.parts():
                head.logits(state, part, w, out[:, part])
        yield cut.chunk(heads[0], rows, slice(0, V), states[0], room, gradient)


def vocabulary_ranges(x: Inputs, live: Tensor | None, narrow: bool = False) -> Iterator[tuple[Chunk, Tensor]]:
    """(logits of as many of the live rows as possible over a range of the vocabulary, its weight as products take it)."""
    cut = _Cut(x, live)
    used = len(cut.hidden)
    wide = used + narrow / 2
    size = even_part(cut.count, int(cut.budget // (wide * min(cut.vocab, _BROAD) + cut.states)))
    most = int((cut.budget - size * cut.states) // (max(1, size) * wide + cut.converted))
    classes = even_part(cut.vocab, max(_NARROW, most))
    block = cut.block(used * size * pitch(classes), size < cut.count or classes < cut.vocab)
    gradient = cut.narrow(narrow, size * pitch(classes))
    heads = x.heads(classes)
    for rows, states in cut.rows(size):
        n = len(states[0])
        for parts in zip(*(head.parts() for head in heads), strict=True):
            part, weight = parts[0]
            room = cut.room(block, used, n, len(weight))
            for out, state, head, (_, w) in zip(room, states, heads, parts, strict=True):
                head.logits(state, part, w, out)
            yield cut.chunk(heads[0], rows, part, states[0], room, gradient), weight


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised: recycled memory on the CPU, that of torch's own allocator on a GPU."""
    return torch.empty(shape, dtype=dtype, device=device) if device.type == "cuda" else _buffers.empty(shape, dtype)


def even_part(count: int, most: int) -> int:
    """Size of the fewest parts of `count` with at most `most` (or one) each, all of about the same size."""
    parts = -(-count // max(1, most))
    return -(-count // max(1, parts))


class Gradients:
    """Gradients towards hidden (N, H), weight (V, H) and bias (V,) of flat inputs, those that are wanted, summed chunk by chunk
    in the compute dtype. `hidden`: zeros to hold the first."""

    def __init__(self, x: Inputs, wanted: Sequence[bool], hidden: Tensor | None = None) -> None:
        V, dtype, device = x.weight.shape[0], x.dtype, x.hidden.device
        self.hidden = torch.zeros(x.hidden.shape, dtype=dtype, device=device) if wanted[0] else hidden
        self.narrow = x.narrow
        self.weight = empty(x.weight.shape, dtype, device) if wanted[1] else None
        self.bias = torch.zeros(V, dtype=dtype, device=device) if wanted[2] else None
        self.written = 0
        """Classes whose weight gradient holds a value."""
        self._scattered: tuple[Tensor, Tensor] | None = None
        """(rows, their gradient towards hidden so far) where the rows are not a slice."""

    def add(self, chunk: Chunk, d_logits: Tensor) -> None:
        """The gradient (n, V) of the logits of whole rows."""
        if self.hidden is None:
            self.add_range(chunk, chunk.part, d_logits, None)
        else:
            for part, w in chunk.head.parts():
                self.add_range(chunk, part, d_logits[:, part], w)

    def add_range(self, chunk: Chunk, part: slice, d_logits: Tensor, w: Tensor | None) -> None:
        """The gradient (n, range) of logits over a range; w, the weight of the range, is for the gradient towards hidden."""
        if self.hidden is not None and w is not None:
            matmul(d_logits, w, self._of(chunk.rows, self.hidden), add=True, narrow=self.narrow)
        if self.weight is not None:
            seen = part.stop <= self.written
            matmul(d_logits.t(), chunk.hidden, self.weight[part], add=seen, narrow=self.narrow)
            self.written = max(self.written, part.stop)
        if self.bias is not None:
            self.bias[part] += d_logits.sum(0, dtype=self.bias.dtype)

    def found(self) -> list[Tensor | None]:
        """The three, None where not wanted."""
        self._scatter()
        if self.weight is not None and not self.written:
            self.weight.zero_()
        return [self.hidden, self.weight, self.bias]

    def _of(self, rows: Tensor | slice, hidden: Tensor) -> Tensor:
        """(n, H) to add to; rows that are not a slice have theirs until others come."""
        if isinstance(rows, slice):
            return hidden[rows]
        if self._scattered is None or self._scattered[0] is not rows:
            self._scatter()
            self._scattered = rows, hidden.new_zeros(len(rows), hidden.shape[1])
        return self._scattered[1]

    def _scatter(self) -> None:
        if self.hidden is not None and self._scattered is not None:
            rows, found = self._scattered
            self.hidden[rows] = found
        self._scattered = None
