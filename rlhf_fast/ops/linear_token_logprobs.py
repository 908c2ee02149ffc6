"""Log-probs of tokens straight from hidden states: the logits of a chunk of rows at a time, in one reused buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._op import Op, cpp, reference_backward
from rlhf_fast._types import TokenStats
from rlhf_fast.ops.token_logprobs import _forward as token_forward
from rlhf_fast.ops.token_logprobs import backward_into, temperature_of, wide
from rlhf_fast.reference.linear_token_logprobs import linear_token_logprobs as reference
from rlhf_fast.reference.token_logprobs import refused_id

OP = "linear_token_logprobs"
CHUNK_BYTES = 64 * 2**20


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
    chunk_bytes: int | None = None,
) -> TokenStats:
    """`token_logprobs(hidden @ weight.T + bias, token_ids)` without the matrix of logits, forward or backward.

    Rows go through the head in chunks; masked rows are left out before the product. With a frozen head (weight and bias need
    no gradient, the case of LoRA) d logprob / d hidden = (W[token] - sum_v p_v W_v) / temperature is a row that the forward
    saves, and the backward only scales it: two products in all instead of three. A gradient into entropy, logsumexp or kl, or
    into the head, recomputes the chunk. Only gradients that someone needs are computed; those of the head are summed in fp32.

    Args:
        hidden: (..., H) states that predict token_ids, fp32, bf16, fp16 or fp64.
        weight: (V, H) of the head, in the dtype of hidden.
        token_ids: (...) integer, in [0, V) where the mask is True.
        bias: (V,) or None.
        temperature, softcap, mask: as in token_logprobs.
        ref_hidden: (..., H) states of a reference policy: adds the exact KL to it. A constant.
        ref_weight: (V, H) head of the reference; None = weight. The bias is shared.
        chunk_bytes: most bytes of one chunk of logits (a reference takes a second one); None = 64 MiB.

    Returns:
        TokenStats, each (...) fp32 (fp64 for fp64), differentiable towards hidden, weight and bias.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    _check.floating(OP, "hidden", hidden)
    _check.floating(OP, "weight", weight)
    _check.integer(OP, "token_ids", token_ids)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[0] == 0:
        got = f"shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise _check.error(ValueError, OP, "weight", got, "hidden (..., H) and weight (V, H) with V > 0")
    H, rows = hidden.shape[-1], hidden.shape[:-1]
    _check.shape(OP, "weight", weight, (weight.shape[0], H), "(V, H) with the H of hidden")
    _check.shape(OP, "token_ids", token_ids, rows, "hidden without H")
    for name, x in (("weight", weight), ("bias", bias), ("ref_hidden", ref_hidden), ("ref_weight", ref_weight)):
        if x is not None and x.dtype is not hidden.dtype:
            raise _check.error(TypeError, OP, name, x.dtype, f"{hidden.dtype} (the dtype of hidden)")
        if x is not None:
            _check.device(OP, name, x, hidden, "hidden")
    _check.device(OP, "token_ids", token_ids, hidden, "hidden")
    if bias is not None:
        _check.shape(OP, "bias", bias, (weight.shape[0],), "one number per row of weight")
    if ref_hidden is not None:
        _check.shape(OP, "ref_hidden", ref_hidden, hidden.shape, "hidden")
    elif ref_weight is not None:
        raise _check.error(ValueError, OP, "ref_hidden", None, "a tensor with ref_weight")
    if ref_weight is not None:
        _check.shape(OP, "ref_weight", ref_weight, weight.shape, "weight")
    mask = _check.mask_like(OP, mask, token_ids, "token_ids")
    value, per_token = temperature_of(OP, temperature, token_ids, hidden.dtype)
    cap = 0.0 if softcap is None else _check.number(OP, "softcap", softcap, 0.0, open_low=True)
    budget = CHUNK_BYTES if chunk_bytes is None else int(_check.number(OP, "chunk_bytes", chunk_bytes, 1))
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or head_trains)
    direction = keep and hidden.requires_grad and not head_trains
    ref = (None if x is None else x.detach() for x in (ref_hidden, ref_weight))
    logprobs, entropy, logsumexp, kl, _, _ = _linear(
        hidden, weight, token_ids, bias, mask, per_token, *ref, value, cap, budget, keep, direction
    )
    return TokenStats(logprobs, entropy, logsumexp, None if ref_hidden is None else kl)


class _Rows:
    """The real rows of a call, compacted, and the buffers their logits go through."""

    def __init__(self, hidden, token_ids, mask, temperature, ref_hidden, weight, chunk_bytes) -> None:  # type: ignore[no-untyped-def]
        self.index = None if mask is None or bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1)
        self.hidden = self.pick(hidden.reshape(-1, hidden.shape[-1]))
        self.ids = self.pick(token_ids.reshape(-1))
        self.temperature = None if temperature is None else self.pick(temperature.reshape(-1))
        self.ref = None if ref_hidden is None else self.pick(ref_hidden.reshape(-1, hidden.shape[-1]))
        self.n, vocab = self.hidden.shape[0], weight.shape[0]
        self.rows = max(1, min(self.n, chunk_bytes // (vocab * hidden.element_size())))
        self.buffer = hidden.new_empty(self.rows, vocab)
        self.ref_buffer = None if ref_hidden is None else hidden.new_empty(self.rows, vocab)

    def pick(self, x: Tensor) -> Tensor:
        return x if self.index is None else x[self.index]

    def chunks(self, weight: Tensor, bias: Tensor | None, ref_weight: Tensor | None) -> Iterator[Any]:
        """(rows, logits, reference logits, ids, temperature) of each chunk; the logits live until the next one."""
        for start in range(0, self.n, self.rows):
            at = slice(start, min(start + self.rows, self.n))
            logits = _product(self.hidden[at], weight, bias, self.buffer)
            ref = None
            if self.ref is not None:
                ref = _product(self.ref[at], weight if ref_weight is None else ref_weight, bias, self.ref_buffer)
            yield at, logits, ref, self.ids[at], None if self.temperature is None else self.temperature[at]

    def spread(self, x: Tensor, shape: Any) -> Tensor:
        """Values of the real rows at their places in `shape`, 0 elsewhere."""
        if self.index is None:
            return x.view(shape)
        full = x.new_zeros(shape)
        full.view(-1, *x.shape[1:])[self.index] = x
        return full


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    out = buffer[: x.shape[0]]
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def _check_ids(token_ids: Tensor, mask: Tensor | None, vocab: int) -> None:
    """ValueError with row, id and V, before the first product."""
    ok = (token_ids >= 0) & (token_ids < vocab)
    bad = (~ok if mask is None else ~ok & mask).reshape(-1).nonzero()
    if bad.numel():
        row = int(bad[0])
        raise ValueError(refused_id(OP, row, int(token_ids.reshape(-1)[row]), vocab))


def _forward(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    token_ids,
    bias,
    mask,
    temperature,
    ref_hidden,
    ref_weight,
    value,
    softcap,
    chunk_bytes,
    keep,
    direction,
):
    _check_ids(token_ids, mask, weight.shape[0])
    rows = _Rows(hidden, token_ids, mask, temperature, ref_hidden, weight, chunk_bytes)
    dtype, width = wide(hidden.dtype), 3 if ref_hidden is None else 6
    stats = hidden.new_empty(4, rows.n, dtype=dtype)
    state = hidden.new_empty(rows.n if keep else 0, width, dtype=dtype)
    way = torch.empty_like(rows.hidden) if direction else hidden.new_empty(0, hidden.shape[-1])
    for at, logits, ref, ids, temperatures in rows.chunks(weight, bias, ref_weight):
        *found, kept = token_forward(logits, ids, None, temperatures, ref, value, softcap, keep)
        for column, x in zip(stats, found, strict=True):
            if x.numel():
                column[at] = x
        if keep:
            state[at] = kept
        if direction:
            one = (torch.ones_like(stats[0, at]), None, None, None)
            slope = backward_into(logits, logits, ids, kept, None, temperatures, None, one, value, softcap)
            torch.mm(slope, weight, out=way[at])
    logprobs, entropy, logsumexp, kl = (rows.spread(x, token_ids.shape) for x in stats)
    return logprobs, entropy, logsumexp, kl if ref_hidden is not None else kl.new_zeros(0), state, way


def _backward_cpp(  # type: ignore[no-untyped-def]
    hidden, weight, token_ids, state, bias, mask, temperature, ref_hidden, ref_weight,
    g_logprobs, g_entropy, g_logsumexp, g_kl, value, softcap, chunk_bytes, needs
):  # fmt: skip
    need_hidden, need_weight, need_bias = needs
    ref_hidden = None if g_kl is None else ref_hidden
    rows = _Rows(hidden, token_ids, mask, temperature, ref_hidden, weight, chunk_bytes)
    grads = [None if g is None else rows.pick(g.reshape(-1)) for g in (g_logprobs, g_entropy, g_logsumexp, g_kl)]
    sums = wide(hidden.dtype)
    grad_hidden = torch.empty_like(rows.hidden) if need_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=sums) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[0], dtype=sums) if need_bias else weight.new_empty(0)
    for at, logits, ref, ids, temperatures in rows.chunks(weight, bias, ref_weight):
        upstream = [None if g is None else g[at] for g in grads]
        slope = backward_into(logits, logits, ids, state[at], None, temperatures, ref, upstream, value, softcap)
        if need_hidden:
            torch.mm(slope, weight, out=grad_hidden[at])
        if need_weight and sums is weight.dtype:
            grad_weight.addmm_(slope.T, rows.hidden[at])
        elif need_weight:
            grad_weight += slope.T @ rows.hidden[at]
        if need_bias:
            grad_bias += slope.sum(0, dtype=sums)
    if need_hidden:
        grad_hidden = rows.spread(grad_hidden, hidden.shape)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _reference_forward(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    token_ids,
    bias,
    mask,
    temperature,
    ref_hidden,
    ref_weight,
    value,
    softcap,
    chunk_bytes,
    keep,
    direction,
):
    inputs = (hidden, weight, token_ids, bias, mask, temperature, ref_hidden, ref_weight, value, softcap)
    *stats, kl = reference(*inputs)
    nothing = stats[0].new_zeros(0)
    return *stats, nothing if kl is None else kl, nothing.view(0, 3), nothing.view(0, 1)


def _backward_reference(  # type: ignore[no-untyped-def]
    hidden, weight, token_ids, state, bias, mask, temperature, ref_hidden, ref_weight,
    g_logprobs, g_entropy, g_logsumexp, g_kl, value, softcap, chunk_bytes, needs
):  # fmt: skip
    inputs = (hidden, weight, token_ids, bias, mask, temperature, ref_hidden, ref_weight, value, softcap)
    places = [i for i, need in zip((0, 1, 3), needs, strict=True) if need]
    grads = (g_logprobs, g_entropy, g_logsumexp, None if ref_hidden is None else g_kl)
    found = dict(zip(places, reference_backward(reference, inputs, places, grads), strict=True))
    return tuple(found.get(i, hidden.new_empty(0)) for i in (0, 1, 3))


def _fake_forward(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    token_ids,
    bias,
    mask,
    temperature,
    ref_hidden,
    ref_weight,
    value,
    softcap,
    chunk_bytes,
    keep,
    direction,
):
    dtype = wide(hidden.dtype)
    real = token_ids.numel()
    if mask is not None and (keep or direction):
        real = torch.library.get_ctx().new_dynamic_size()
    stats = [hidden.new_empty(token_ids.shape, dtype=dtype) for _ in range(3)]
    kl = hidden.new_empty(token_ids.shape if ref_hidden is not None else 0, dtype=dtype)
    state = hidden.new_empty(real if keep else 0, 3 if ref_hidden is None else 6, dtype=dtype)
    return *stats, kl, state, hidden.new_empty(real if direction else 0, hidden.shape[-1])


def _fake_backward(  # type: ignore[no-untyped-def]
    hidden, weight, token_ids, state, bias, mask, temperature, ref_hidden, ref_weight,
    g_logprobs, g_entropy, g_logsumexp, g_kl, value, softcap, chunk_bytes, needs
):  # fmt: skip
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


_linear_backward = Op(
    "linear_token_logprobs_backward",
    "(Tensor hidden, Tensor weight, Tensor token_ids, Tensor state, Tensor? bias, Tensor? mask, Tensor? temperature, "
    "Tensor? ref_hidden, Tensor? ref_weight, Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_logsumexp, "
    "Tensor? grad_kl, float temperature_value, float softcap, int chunk_bytes, bool[] needs) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_fake_backward,
    backends=[cpp(_backward_cpp)],
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, token_ids, bias, mask, temperature, ref_hidden, ref_weight, *numbers, _, direction = inputs
    state, way = output[4], output[5]
    ctx.direction = direction and way.shape[0] > 0
    ctx.has_ref = ref_hidden is not None
    ctx.numbers = numbers
    ctx.bias = bias is not None
    ctx.save_for_backward(hidden, weight, token_ids, state, bias, mask, temperature, ref_hidden, ref_weight, way)
    ctx.mark_non_differentiable(state, way)
    ctx.set_materialize_grads(False)


def _backward(ctx, g_logprobs, g_entropy, g_logsumexp, g_kl, *_):  # type: ignore[no-untyped-def]
    *saved, way = ctx.saved_tensors
    hidden, mask = saved[0], saved[5]
    others = (g_entropy, g_logsumexp, g_kl if ctx.has_ref else None)
    nothing = [None] * 13
    if g_logprobs is None and all(g is None for g in others):
        return tuple(nothing)
    if ctx.direction and all(g is None for g in others):
        real = None if mask is None else mask.reshape(-1)
        scale = g_logprobs.reshape(-1) if real is None else g_logprobs.reshape(-1)[real]
        rows = (way * scale[:, None]).to(hidden.dtype)
        if real is None:
            return rows.view(hidden.shape), *nothing[1:]
        grad = rows.new_zeros(real.shape[0], hidden.shape[-1])
        return grad.index_put((real.nonzero().squeeze(1),), rows).view(hidden.shape), *nothing[1:]
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias and ctx.needs_input_grad[3]]
    grads = _linear_backward(*saved, g_logprobs, *others, *ctx.numbers, needs)
    grad_hidden, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, *nothing[4:]


_linear = Op(
    OP,
    "(Tensor hidden, Tensor weight, Tensor token_ids, Tensor? bias, Tensor? mask, Tensor? temperature, Tensor? ref_hidden, "
    "Tensor? ref_weight, float temperature_value, float softcap, int chunk_bytes, bool keep_state, bool direction) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_forward,
    fake=_fake_forward,
    backends=[cpp(_forward)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0, 1, 3),
)
