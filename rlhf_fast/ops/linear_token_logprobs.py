"""Token statistics straight from hidden states and a language-model head: the logits never exist whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_fast import _check, _parallel
from rlhf_fast._op import Backend, Op, cpp, cuda, last_use, no_doubles, reference_backward, triton
from rlhf_fast._types import TokenStats
from rlhf_fast.ops._lm_head import (
    Gradients,
    Inputs,
    Rows,
    arguments,
    check_bias,
    check_weight,
    cuda_rows,
    triton_rows,
    vocabulary_ranges,
    whole_rows,
)
from rlhf_fast.ops.token_logprobs import backward_into, state_shape
from rlhf_fast.ops.token_logprobs import forward as tokens_forward
from rlhf_fast.reference.linear_token_logprobs import linear_token_logprobs as reference

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
    directions: Sequence[str] = ("logprobs",),
    process_group: object | None = None,
) -> TokenStats:
    """token_logprobs of logits = hidden weight^T + bias, a few rows of logits at a time.

    Masked rows are taken out before the product (on a GPU, where the host would have to wait for the mask, they are multiplied
    as zeros). The product and its gradients are computed and accumulated in fp32 (fp64 when hidden or weight is), whatever
    autocast says: products of bf16 states and weights are exact and give fp32 logits. Where both are bf16 and the processor
    multiplies bf16, the gradients of the logits are rounded to it, as PyTorch would, and so they are on a GPU. With a frozen
    weight and bias the forward also keeps the derivative towards hidden of the outputs named in `directions`, for logprobs
    u = (W[token] - sum_v p_v W_v) / temperature: the backward of these outputs is then a scaling of rows. Gradients of
    other outputs, and those of a trained weight or bias, compute the logits again, and only for rows whose upstream
    gradient is not 0. With an entropy bonus ("logprobs", "entropy") thus takes three products instead of four; for the
    PPO loss itself linear_ppo_loss takes two.

    Args:
        hidden: (..., H) float.
        weight: (V, H) float; may differ from hidden in dtype.
        token_ids: (...) integer, in [0, V) where the mask is True.
        bias: (V,) float or None.
        temperature, softcap, mask: as for token_logprobs.
        ref_hidden: (..., R) hidden states of the reference, or None: no kl. A constant: it gets no gradient.
        ref_weight: (V, R) head of the reference, a constant; None = `weight` and `bias` themselves.
        ref_bias: (V,) bias of ref_weight, a constant.
        chunk_bytes: budget in bytes of the logits and of what else lives for one chunk (at least one row is computed);
            None = 64 MiB on a CPU, 512 MiB elsewhere. A second direction takes a second buffer from it. The CPU's product has
            2 MiB of its own.
        directions: of "logprobs", "entropy", "logsumexp", "kl": whose derivative a forward with a frozen head keeps, in
            (..., H) fp32 each. Without effect on the results, and with a process_group.
        process_group: as for token_logprobs: weight (V_r, H), bias, ref_weight and ref_bias are this rank's rows of the head,
            hidden and ref_hidden are whole on every rank. The gradient towards hidden is summed over the ranks by one all-reduce
            (in fp32 at least, in the order of its algorithm) and is that of the whole; those towards weight and bias are of this rank's rows. Do not sum them again.
            The product of a reference is computed twice.

    Returns:
        TokenStats, each (...) fp32 (fp64 when hidden or weight is), differentiable towards hidden, weight and
        bias. A row has the same bits in any batch and chunk and for any number of threads where the C++ product serves
        (fp32, bf16 and fp16 on x86-64 with AVX2); elsewhere, and on a GPU, they are those of PyTorch's product, which may depend
        on the batch.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument. A token id outside of
            [0, V) names row, id and V before anything is computed (on the CPU; elsewhere such a row is NaN). A process_group
            that is not one, or that this process does not belong to.
    """
    x = arguments(_OP, hidden, weight, token_ids, bias, mask, temperature, softcap, chunk_bytes)
    if ref_hidden is not None:
        _check.floating(_OP, "ref_hidden", ref_hidden)
        _check.shape(_OP, "ref_hidden", ref_hidden, (*token_ids.shape, ref_hidden.shape[-1]), "hidden up to R")
        _check.device(_OP, "ref_hidden", ref_hidden, hidden, "hidden")
        head = weight if ref_weight is None else ref_weight
        vocab = weight.shape[0]
        check_weight(_OP, "ref_weight", head, ref_hidden, vocab, "(V, R) with the V of weight and the R of ref_hidden")
        ref_hidden = ref_hidden.detach()
    elif ref_weight is not None:
        raise _check.error(ValueError, _OP, "ref_weight", "a tensor", "None without ref_hidden")
    if ref_weight is None and ref_bias is not None:
        raise _check.error(ValueError, _OP, "ref_bias", "a tensor", "None without ref_weight")
    check_bias(_OP, "ref_bias", ref_bias, weight, hidden)
    x = x._replace(
        ref_hidden=ref_hidden,
        ref_weight=None if ref_weight is None else ref_weight.detach(),
        ref_bias=None if ref_bias is None else ref_bias.detach(),
    )

    if isinstance(directions, str):
        raise _check.error(TypeError, _OP, "directions", repr(directions), "a sequence of names")
    for name in directions:
        _check.choice(_OP, "directions", name, TokenStats._fields)
    if ref_hidden is None and "kl" in directions:
        raise _check.error(ValueError, _OP, "directions", "'kl'", "another name without ref_hidden")

    trained = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
    differentiate = torch.is_grad_enabled() and any(trained)
    if process_group is not None:
        _parallel.check_group(_OP, process_group)
        part = _slice(x._replace(hidden=_parallel.replicated(hidden, process_group)), differentiate)
        return _parallel.token_stats(_OP, part, x.token_ids, x.mask, x.temperature, process_group)
    frozen = differentiate and trained == [True, False, False]
    kept = [frozen and name in directions for name in TokenStats._fields]
    logprobs, entropy, logsumexp, kl, _, _ = _linear(*x, differentiate, kept)
    return TokenStats(logprobs, entropy, logsumexp, None if ref_hidden is None else kl)


def _slice(x: Inputs, differentiate: bool) -> _parallel.Slice:
    """Keeps no direction: one output's derivative needs two of the slice's, whose products cost what computing the logits again does."""
    kept = [False] * 4

    def excluded(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else _parallel.excluded(bias, x.softcap)

    def statistics(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        *found, kl, _, _ = _linear(*x._replace(token_ids=ids, mask=mask), differentiate, kept)
        return *found, None if x.ref_hidden is None else kl  # type: ignore[return-value]

    def ref_logsumexp(ids: Tensor, mask: Tensor | None) -> Tensor:
        alone = x._replace(
            hidden=ref_hidden, weight=ref_weight, bias=ref_bias, token_ids=ids, mask=mask,
            ref_hidden=None, ref_weight=None, ref_bias=None,
        )  # fmt: skip
        return _linear(*alone, False, kept)[2].to(x.dtype)

    of_policy = _parallel.Slice(x.weight.shape[0], statistics, lambda: excluded(x.bias))
    if x.ref_hidden is None:
        return of_policy
    ref_weight, ref_bias = (x.weight, x.bias) if x.ref_weight is None else (x.ref_weight, x.ref_bias)
    ref_hidden = x.ref_hidden.double() if x.dtype is torch.float64 else x.ref_hidden
    ref_weight, ref_bias = ref_weight.detach(), None if ref_bias is None else ref_bias.detach()
    return of_policy._replace(ref_logsumexp=ref_logsumexp, ref_excluded=lambda: excluded(ref_bias))


def _outputs(x: Inputs, keep_state: bool, kept: Sequence[bool], new: Callable[..., Tensor]) -> list[Tensor]:
    """The six results, made by `new` (Tensor.new_zeros or Tensor.new_empty)."""
    rows = x.token_ids.numel()
    shapes: list[tuple[int, ...]] = [tuple(x.token_ids.shape)] * 3
    shapes.append((0,) if x.ref_hidden is None else shapes[0])
    shapes.append(state_shape(rows, x.ref_hidden) if keep_state else (0,))
    shapes.append((sum(kept), rows, x.hidden.shape[-1]))
    return [new(x.hidden, shape, dtype=x.dtype) for shape in shapes]


def _forward(*args):  # type: ignore[no-untyped-def]
    return _forward_by(Rows(tokens_forward, backward_into), True, *args)


def _forward_cuda(*args):  # type: ignore[no-untyped-def]
    return _forward_by(cuda_rows(), False, *args)


def _forward_triton(*args):  # type: ignore[no-untyped-def]
    return _forward_by(triton_rows(), False, *args)


def _forward_by(kernels: Rows, picks: bool, *args):  # type: ignore[no-untyped-def]
    """picks: rows are checked, and taken out, by what is in them. On a GPU that would wait for it: there the kernels of rows have
    the mask, and give NaN where the check would raise."""
    x, (keep_state, kept) = Inputs(*args[:12]), args[12:]
    outputs = _outputs(x, keep_state, kept, Tensor.new_zeros)
    stats, (state, directions) = [out.view(-1) for out in outputs[:4]], outputs[4:]
    x = x.flat()
    if picks:
        _check.token_rows(_OP, x.token_ids, x.temperature, x.mask, x.weight.shape[0])
    each = [(i, Gradients(x, (False,) * 3, out)) for i, out in zip(_places(kept), directions, strict=True)]
    narrow = bool(each) and not picks and x.narrow and x.exact
    buffers = 1 if narrow else min(2, max(1, len(each)))
    for c in whole_rows(x, x.mask if picks else None, buffers, narrow):
        *found, row_state = kernels.forward(
            c.logits, c.token_ids, c.mask, c.temperature, c.ref_logits, *x.numbers, keep_state
        )
        for out, values in zip(stats, found, strict=True):
            if out.numel():
                out[c.rows] = values
        if keep_state:
            state[c.rows] = row_state
        for i, gradients in each:
            into = c.gradient(last=i == each[-1][0])  # only the last may overwrite the logits
            grads = [torch.ones_like(found[0]) if k == i else None for k in range(4)]
            kernels.backward_into(
                into, c.logits, c.token_ids, row_state, c.mask, c.temperature, c.ref_logits, grads, *x.numbers
            )
            gradients.add(c, into)
    for _, gradients in each:
        gradients.found()
    return tuple(outputs)


def _places(kept: Sequence[bool]) -> list[int]:
    """The numbers of the outputs whose derivative is kept."""
    return [i for i, keep in enumerate(kept) if keep]


def _reference_forward(*args):  # type: ignore[no-untyped-def]
    x, (keep_state, kept) = Inputs(*args[:12]), args[12:]
    logprobs, entropy, logsumexp, kl = reference(*x[:11])
    *_, empty_kl, state, directions = _outputs(x, keep_state, kept, Tensor.new_zeros)
    if not torch.is_grad_enabled():  # otherwise autograd goes through the reference itself
        wide = x._replace(hidden=x.hidden.to(x.dtype), weight=x.weight.to(x.dtype))[:11]
        for out, i in zip(directions, _places(kept), strict=True):
            grads = [torch.ones_like(logprobs) if k == i else None for k in range(4)]
            out.copy_(reference_backward(reference, wide, (0,), grads)[0].reshape(out.shape))
    return logprobs, entropy, logsumexp, empty_kl if kl is None else kl, state, directions


def _fake(*args):  # type: ignore[no-untyped-def]
    return tuple(_outputs(Inputs(*args[:12]), *args[12:], Tensor.new_empty))


_SHARED = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? mask, Tensor? temperature, "
    "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, float temperature_value, float softcap, int chunk_bytes"
)
_UPSTREAM = "Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_logsumexp, Tensor? grad_kl"


def _backward_chunked(*args):  # type: ignore[no-untyped-def]
    return _backward_by(backward_into, True, *args)


def _backward_cuda(*args):  # type: ignore[no-untyped-def]
    return _backward_by(cuda_rows().backward_into, False, *args)


def _backward_triton(*args):  # type: ignore[no-untyped-def]
    return _backward_by(triton_rows().backward_into, False, *args)


def _backward_by(row_gradient: Callable[..., Tensor], picks: bool, *args):  # type: ignore[no-untyped-def]
    """picks: as for the forward."""
    x, state, grads, wanted = Inputs(*args[:12]), args[12], args[13:17], args[17]
    if grads[3] is None:
        x = x._replace(ref_hidden=None, ref_weight=None)
    shape, x = x.hidden.shape, x.flat()
    grads = [None if g is None else g.reshape(-1).to(x.dtype) for g in grads]
    live = None
    if picks:
        live = torch.stack([g != 0 for g in grads if g is not None]).any(0)
        if x.mask is not None:
            live &= x.mask
    else:  # an id out of range is outside of every range of the vocabulary: no kernel of rows would see that it is illegal
        x = x._replace(mask=x.legal())
    gradients = Gradients(x, wanted)
    for c, w in vocabulary_ranges(x, live, narrow=not picks and x.narrow and x.exact):
        # The gradient of a token's logit is that of its logsumexp and, in the range that holds it, one more: state is of all.
        ids = c.token_ids - c.part.start
        inside = (ids >= 0) & (ids < len(w))
        g, g_entropy, g_logsumexp, g_kl = (None if g is None else g[c.rows] for g in grads)
        if g is not None:
            outside = g.masked_fill(inside, 0.0)
            g_logsumexp = -outside if g_logsumexp is None else g_logsumexp - outside
            g = g.masked_fill(~inside, 0.0)
        upstream = (g, g_entropy, g_logsumexp, g_kl)
        ids = ids.masked_fill(~inside, 0)
        into = c.gradient()
        row_gradient(into, c.logits, ids, state[c.rows], c.mask, c.temperature, c.ref_logits, upstream, *x.numbers)
        gradients.add_range(c, c.part, into, w)
    d_hidden, d_weight, d_bias = gradients.found()
    bias_dtype = x.weight.dtype if x.bias is None else x.bias.dtype
    return (
        x.hidden.new_zeros(0) if d_hidden is None else d_hidden.to(x.hidden.dtype).view(shape),
        x.weight.new_zeros(0) if d_weight is None else d_weight.to(x.weight.dtype),
        x.weight.new_zeros(0, dtype=bias_dtype) if d_bias is None else d_bias.to(bias_dtype),
    )


def _backward_reference(*args):  # type: ignore[no-untyped-def]
    x, grads, wanted = Inputs(*args[:12]), args[13:17], args[17]
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


def _cells(*functions: Callable[..., tuple]) -> list[Backend]:  # type: ignore[type-arg]
    """Of the functions on rows of CUDA, of Triton and of C++."""
    on_cuda, on_triton, on_cpu = functions
    return [
        Backend("cuda", "cuda", on_cuda, cuda("token_logprobs").missing, no_doubles),
        Backend("triton", "cuda", on_triton, triton("token_logprobs").missing, no_doubles),
        cpp(on_cpu),
    ]


_linear_backward = Op(
    f"{_OP}_backward",
    f"({_SHARED}, Tensor state, {_UPSTREAM}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_fake_backward,
    backends=_cells(_backward_cuda, _backward_triton, _backward_chunked),
    strided=True,
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    state, directions = output[4:]
    ctx.save_for_backward(*inputs[:9], state, directions)
    ctx.numbers = inputs[9:12]
    ctx.kept = _places(inputs[13])
    ctx.mark_non_differentiable(state, directions)
    ctx.set_materialize_grads(False)


def _backward(ctx, *grads):  # type: ignore[no-untyped-def]
    *tensors, state, directions = ctx.saved_tensors
    x = Inputs(*tensors, *ctx.numbers)
    grads = [*grads[:3], None if x.ref_hidden is None else grads[3]]
    given = _places([g is not None for g in grads])
    none = (None,) * 11
    if not given:
        return None, None, None, *none
    if set(given) <= set(ctx.kept):
        total = None
        for i in given:
            kept, g = directions[ctx.kept.index(i)], grads[i] if x.mask is None else grads[i].masked_fill(~x.mask, 0.0)
            g = g.reshape(-1, 1)
            if total is None:
                total = kept.mul_(g) if last_use(ctx, g) else kept * g
            else:
                total.addcmul_(kept, g)
        return total.to(x.hidden.dtype).reshape(x.hidden.shape), None, None, *none
    wanted = list(ctx.needs_input_grad[:3])
    found = _linear_backward(*x, state, *grads, wanted)
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), *none


_linear = Op(
    _OP,
    f"({_SHARED}, bool keep_state, bool[4] kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_forward,
    fake=_fake,
    backends=_cells(_forward_cuda, _forward_triton, _forward),
    setup_context=_setup,
    backward=_backward,
    differentiable=(0, 1, 2),
    strided=True,
)
