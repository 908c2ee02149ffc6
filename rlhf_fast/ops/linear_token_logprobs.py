"""Token statistics straight from hidden states and a language-model head: the logits never exist whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check, _native
from rlhf_fast._op import Backend, Op, reference_backward
from rlhf_fast._types import TokenStats
from rlhf_fast.ops.token_logprobs import backward_into, state_shape, temperature_of
from rlhf_fast.ops.token_logprobs import forward as tokens_forward
from rlhf_fast.reference.linear_token_logprobs import linear_token_logprobs as reference
from rlhf_fast.reference.linear_token_logprobs import logprob_direction
from rlhf_fast.reference.token_logprobs import refused_id, refused_temperature

CHUNK_BYTES = 64 << 20
"""Default budget of the logits buffers."""

_OP = "linear_token_logprobs"


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> TokenStats:
    """token_logprobs of logits = hidden weight^T + bias, a few rows of logits at a time.

    Masked rows are taken out before the product. The product and its gradients are computed and accumulated
    in fp32 (fp64 when hidden or weight is), so bf16 weights give fp32 logits. With a frozen weight and bias the
    forward also keeps u = d logprob / d hidden = (W[token] - sum_v p_v W_v) / temperature, (..., H): the backward
    of logprobs is then a scaling of its rows. Gradients of entropy, logsumexp and kl, and those of a trained
    weight or bias, recompute the logits, and only for rows whose upstream gradient is not 0.

    Args:
        hidden: (..., H) float.
        weight: (V, H) float; may differ from hidden in dtype.
        token_ids: (...) integer, in [0, V) where the mask is True.
        bias: (V,) float or None.
        temperature, softcap, mask: as for token_logprobs.
        ref_hidden: (..., R) hidden states of the reference, or None: no kl. A constant: it gets no gradient.
        ref_weight: (V, R) head of the reference, a constant; None = `weight` and `bias` themselves.
        ref_bias: (V,) bias of ref_weight, a constant.
        chunk_bytes: budget of the logits buffers in bytes (at least one row is computed); None = 64 MiB.

    Returns:
        TokenStats, each (...) fp32 (fp64 when hidden or weight is), differentiable towards hidden, weight and
        bias. The bits of a row are those of this machine's matrix product, which may depend on the batch.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument. A token id outside of
            [0, V) names row, id and V before anything is computed.
    """
    _check.floating(_OP, "hidden", hidden)
    if hidden.dim() == 0:
        raise _check.error(ValueError, _OP, "hidden", "a scalar", "(..., H)")
    _matrix("weight", weight, hidden, None, "(V, H) with V > 0 and the H of hidden")
    vocab = weight.shape[0]
    _check.integer(_OP, "token_ids", token_ids)
    _check.shape(_OP, "token_ids", token_ids, hidden.shape[:-1], "hidden without H")
    _check.device(_OP, "token_ids", token_ids, hidden, "hidden")
    _vector("bias", bias, vocab, hidden)
    mask = _check.mask_like(_OP, mask, token_ids, "token_ids")
    value, per_token = temperature_of(_OP, temperature, token_ids, _compute_dtype(hidden, weight))
    cap = 0.0 if softcap is None else _check.number(_OP, "softcap", softcap, 0.0, open_low=True)
    budget = CHUNK_BYTES if chunk_bytes is None else int(_check.number(_OP, "chunk_bytes", chunk_bytes, 1))
    if ref_hidden is not None:
        _check.floating(_OP, "ref_hidden", ref_hidden)
        _check.shape(_OP, "ref_hidden", ref_hidden, (*token_ids.shape, ref_hidden.shape[-1]), "hidden up to R")
        _check.device(_OP, "ref_hidden", ref_hidden, hidden, "hidden")
        head = weight if ref_weight is None else ref_weight
        _matrix("ref_weight", head, ref_hidden, vocab, "(V, R) with the V of weight and the R of ref_hidden")
        ref_hidden = ref_hidden.detach()
    elif ref_weight is not None:
        raise _check.error(ValueError, _OP, "ref_weight", "a tensor", "None without ref_hidden")
    if ref_weight is None and ref_bias is not None:
        raise _check.error(ValueError, _OP, "ref_bias", "a tensor", "None without ref_weight")
    _vector("ref_bias", ref_bias, vocab, hidden)

    trained = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    differentiate = torch.is_grad_enabled() and any(trained)
    logprobs, entropy, logsumexp, kl, _, _ = _linear(
        hidden,
        weight,
        bias,
        token_ids,
        mask,
        per_token,
        ref_hidden,
        None if ref_weight is None else ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        value,
        cap,
        budget,
        differentiate,
        differentiate and trained == [True, False, False],
    )
    return TokenStats(logprobs, entropy, logsumexp, None if ref_hidden is None else kl)


def _matrix(argument: str, x: Tensor, hidden: Tensor, vocab: int | None, expected: str) -> None:
    _check.floating(_OP, argument, x)
    _check.device(_OP, argument, x, hidden, "hidden")
    right = x.dim() == 2 and x.shape[0] > 0 and x.shape[1] == hidden.shape[-1]
    if not right or (vocab is not None and x.shape[0] != vocab):
        raise _check.error(ValueError, _OP, argument, f"shape {tuple(x.shape)}", expected)


def _vector(argument: str, x: Tensor | None, vocab: int, hidden: Tensor) -> None:
    if x is not None:
        _check.floating(_OP, argument, x)
        _check.shape(_OP, argument, x, (vocab,), "the rows of weight")
        _check.device(_OP, argument, x, hidden, "hidden")


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


class _Head(NamedTuple):
    """A language-model head, and the dtype its products are computed in."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    tile: Tensor | None
    """(rows, H) room for a part of the weight in the compute dtype; None when the weight has it already."""

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(vocabulary range, weight of it in the compute dtype), the second valid until the next."""
        V = self.weight.shape[0]
        if self.tile is None:
            yield slice(0, V), self.weight
            return
        for v in range(0, V, len(self.tile)):
            part = self.weight[v : v + len(self.tile)]
            yield slice(v, v + len(part)), self.tile[: len(part)].copy_(part)

    def logits(self, x: Tensor, buffer: Tensor) -> Tensor:
        """x (n, H) times the head, into the first n rows of buffer (rows, V)."""
        x, out = x.to(self.dtype), buffer[: x.shape[0]]
        for part, w in self.tiles():
            torch.mm(x, w.t(), out=out[:, part])
        if self.bias is not None:
            out += self.bias
        return out

    def back(self, grad: Tensor) -> Tensor:
        """grad (n, V) times weight: (n, H)."""
        out = grad.new_zeros(grad.shape[0], self.weight.shape[1])
        for part, w in self.tiles():
            out.addmm_(grad[:, part], w)
        return out


class _Inputs(NamedTuple):
    """The arguments that forward and backward share, in the order of their schemas."""

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
        return _compute_dtype(self.hidden, self.weight)

    def flat(self) -> _Inputs:
        """One row per token."""
        per_row = [None if x is None else x.reshape(-1) for x in (self.token_ids, self.mask, self.temperature)]
        states = [None if x is None else x.reshape(-1, x.shape[-1]) for x in (self.hidden, self.ref_hidden)]
        return self._replace(
            hidden=states[0], ref_hidden=states[1], token_ids=per_row[0], mask=per_row[1], temperature=per_row[2]
        )

    def heads(self) -> tuple[_Head, _Head | None]:
        """The head of the policy, and of the reference if there is one."""

        def made(weight: Tensor, bias: Tensor | None) -> _Head:
            V, H = weight.shape
            rows = min(V, max(1, self.chunk_bytes // 4 // (max(1, H) * self.dtype.itemsize)))
            same = weight.dtype is self.dtype
            return _Head(weight, bias, self.dtype, None if same else torch.empty((rows, H), dtype=self.dtype))

        head = made(self.weight, self.bias)
        if self.ref_hidden is None:
            return head, None
        return head, head if self.ref_weight is None else made(self.ref_weight, self.ref_bias)


class _Chunk(NamedTuple):
    """Logits of a few rows, in buffers that the next chunk overwrites."""

    rows: Tensor | slice
    logits: Tensor
    ref_logits: Tensor | None
    token_ids: Tensor
    temperature: Tensor | None


def _chunks(x: _Inputs, heads: tuple[_Head, _Head | None], live: Tensor | None) -> Iterator[_Chunk]:
    """The rows of flat inputs where `live` (N,) is True (None: all of them), as many at a time as the budget allows."""
    head, ref_head = heads
    vocab = x.weight.shape[0]
    index = None if live is None else live.nonzero().squeeze(1)
    count = x.hidden.shape[0] if index is None else index.shape[0]
    row_bytes = vocab * x.dtype.itemsize * (1 if ref_head is None else 2)
    size = min(count, max(1, x.chunk_bytes // row_bytes))
    buffer = _buffers.empty((size, vocab), x.dtype)  # the same memory call after call
    ref_buffer = None if ref_head is None else _buffers.empty((size, vocab), x.dtype)
    for begin in range(0, count, max(1, size)):
        rows = slice(begin, min(begin + size, count)) if index is None else index[begin : begin + size]
        ref_logits = None
        if ref_head is not None and x.ref_hidden is not None and ref_buffer is not None:
            ref_logits = ref_head.logits(x.ref_hidden[rows], ref_buffer)
        temperature = None if x.temperature is None else x.temperature[rows]
        yield _Chunk(rows, head.logits(x.hidden[rows], buffer), ref_logits, x.token_ids[rows], temperature)


def _check_rows(x: _Inputs) -> None:
    """Raises for the first token id or temperature of flat inputs that is out of range, before any product."""
    vocab = x.weight.shape[0]
    bad = (x.token_ids < 0) | (x.token_ids >= vocab)
    if x.temperature is not None:
        bad |= ~((x.temperature > 0) & x.temperature.isfinite())
    if x.mask is not None:
        bad &= x.mask
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        token_id = int(x.token_ids[row])
        if not 0 <= token_id < vocab:
            raise ValueError(refused_id(_OP, row, token_id, vocab))
        raise ValueError(refused_temperature(_OP, row, float("nan" if x.temperature is None else x.temperature[row])))


def _outputs(x: _Inputs, keep_state: bool, keep_direction: bool, new: Callable[..., Tensor]) -> list[Tensor]:
    """The six results, made by `new` (Tensor.new_zeros or Tensor.new_empty)."""
    rows = x.token_ids.numel()
    shapes: list[tuple[int, ...]] = [tuple(x.token_ids.shape)] * 3
    shapes.append((0,) if x.ref_hidden is None else shapes[0])
    shapes.append(state_shape(rows, x.ref_hidden) if keep_state else (0,))
    shapes.append((rows, x.hidden.shape[-1]) if keep_direction else (0,))
    return [new(x.hidden, shape, dtype=x.dtype) for shape in shapes]


def _forward(*args):  # type: ignore[no-untyped-def]
    x, (keep_state, keep_direction) = _Inputs(*args[:12]), args[12:]
    outputs = _outputs(x, keep_state, keep_direction, Tensor.new_zeros)
    stats, (state, direction) = [out.view(-1) for out in outputs[:4]], outputs[4:]
    x = x.flat()
    _check_rows(x)
    numbers = (x.temperature_value, x.softcap)
    heads = x.heads()
    head = heads[0]
    for rows, logits, ref_logits, ids, temperature in _chunks(x, heads, x.mask):
        *found, row_state = tokens_forward(logits, ids, None, temperature, ref_logits, *numbers, keep_state)
        for out, values in zip(stats, found, strict=True):
            if out.numel():
                out[rows] = values
        if keep_state:
            state[rows] = row_state
        if keep_direction:
            grads = (torch.ones_like(found[0]), None, None, None)
            backward_into(logits, logits, ids, row_state, None, temperature, None, grads, *numbers)
            direction[rows] = head.back(logits)
    return tuple(outputs)


def _reference_forward(*args):  # type: ignore[no-untyped-def]
    x, (keep_state, keep_direction) = _Inputs(*args[:12]), args[12:]
    logprobs, entropy, logsumexp, kl = reference(*x[:11])
    *_, empty_kl, state, direction = _outputs(x, keep_state, keep_direction, Tensor.new_zeros)
    if keep_direction and not torch.is_grad_enabled():  # otherwise autograd goes through the reference itself
        direction = logprob_direction(*x[:6], x.temperature_value, x.softcap)
    return logprobs, entropy, logsumexp, empty_kl if kl is None else kl, state, direction


def _fake(*args):  # type: ignore[no-untyped-def]
    return tuple(_outputs(_Inputs(*args[:12]), *args[12:], Tensor.new_empty))


_SHARED = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor? temperature, "
    "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, float temperature_value, float softcap, int chunk_bytes"
)
_UPSTREAM = "Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_logsumexp, Tensor? grad_kl"


def _backward_chunked(*args):  # type: ignore[no-untyped-def]
    x, state, grads, wanted = _Inputs(*args[:12]), args[12], args[13:17], args[17]
    if grads[3] is None:
        x = x._replace(ref_hidden=None)
    shape, x = x.hidden.shape, x.flat()
    grads = [None if g is None else g.reshape(-1).to(x.dtype) for g in grads]
    live = torch.stack([g != 0 for g in grads if g is not None]).any(0)
    if x.mask is not None:
        live &= x.mask
    heads = x.heads()
    head = heads[0]
    d_hidden = x.hidden.new_zeros(x.hidden.shape if wanted[0] else 0)
    d_weight = torch.zeros(x.weight.shape if wanted[1] else 0, dtype=x.dtype)
    d_bias = torch.zeros(x.weight.shape[0] if wanted[2] else 0, dtype=x.dtype)
    for rows, logits, ref_logits, ids, temperature in _chunks(x, heads, live):
        upstream = [None if g is None else g[rows] for g in grads]
        numbers = (x.temperature_value, x.softcap)
        backward_into(logits, logits, ids, state[rows], None, temperature, ref_logits, upstream, *numbers)
        if wanted[0]:
            d_hidden[rows] = head.back(logits).to(d_hidden.dtype)
        if wanted[1]:
            d_weight.addmm_(logits.t(), x.hidden[rows].to(x.dtype))
        if wanted[2]:
            d_bias += logits.sum(0)
    bias_dtype = x.weight.dtype if x.bias is None else x.bias.dtype
    return d_hidden.view(shape) if wanted[0] else d_hidden, d_weight.to(x.weight.dtype), d_bias.to(bias_dtype)


def _backward_reference(*args):  # type: ignore[no-untyped-def]
    x, grads, wanted = _Inputs(*args[:12]), args[13:17], args[17]
    where = [i for i in range(3) if wanted[i]]
    found = iter(reference_backward(reference, x[:11], where, grads))
    return tuple(next(found) if want else x.weight.new_zeros(0) for want in wanted)


def _fake_backward(hidden, weight, bias, *rest):  # type: ignore[no-untyped-def]
    wanted = rest[-1]
    return (
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if wanted[2] else 0),
    )


_linear_backward = Op(
    f"{_OP}_backward",
    f"({_SHARED}, Tensor state, {_UPSTREAM}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_fake_backward,
    backends=[Backend("cpp", "cpu", _backward_chunked, _native.missing)],
    strided=True,
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    state, direction = output[4:]
    ctx.save_for_backward(*inputs[:9], state, direction)
    ctx.numbers = inputs[9:12]
    ctx.keep_direction = inputs[13]
    ctx.mark_non_differentiable(state, direction)
    ctx.set_materialize_grads(False)


def _backward(ctx, g_logprobs, g_entropy, g_logsumexp, g_kl, _state, _direction):  # type: ignore[no-untyped-def]
    *tensors, state, direction = ctx.saved_tensors
    x = _Inputs(*tensors, *ctx.numbers)
    if x.ref_hidden is None:
        g_kl = None
    none = (None,) * 11
    grads = (g_logprobs, g_entropy, g_logsumexp, g_kl)
    if all(g is None for g in grads):
        return (None,) * 14
    if ctx.keep_direction and all(g is None for g in grads[1:]):
        g = g_logprobs if x.mask is None else g_logprobs.masked_fill(~x.mask, 0.0)
        return (direction * g.reshape(-1, 1)).to(x.hidden.dtype).reshape(x.hidden.shape), None, None, *none
    wanted = list(ctx.needs_input_grad[:3])
    found = _linear_backward(*x, state, *grads, wanted)
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), *none


_linear = Op(
    _OP,
    f"({_SHARED}, bool keep_state, bool keep_direction) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_forward,
    fake=_fake,
    backends=[Backend("cpp", "cpu", _forward, _native.missing)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0, 1, 2),
    strided=True,
)
