"""Log-probability, entropy, log-sum-exp and exact KL of tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check, _parallel
from rlhf_fast._native import DTYPES, contiguous, kernel
from rlhf_fast._op import Op, cpp, cuda, no_doubles, reference_backward, triton
from rlhf_fast._types import TokenStats
from rlhf_fast.reference.token_logprobs import refused_id, refused_temperature
from rlhf_fast.reference.token_logprobs import token_logprobs as reference


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    ref_logits: Tensor | None = None,
    process_group: object | None = None,
) -> TokenStats:
    """Log-probability, entropy and log-sum-exp of each token, and the exact KL to a reference, in one read of the logits.

    With z = softcap tanh(logits / softcap) / temperature and log p = z - logsumexp(z), in nats:
    logprobs = log p[token], entropy = -sum p log p, kl = sum p (log p - log q) (Kullback & Leibler 1951), q the reference's
    distribution under the same cap and temperature. The sums are kept relative to the running maximum (online softmax, Milakov
    & Gimelshein 2018, arXiv 1805.02867), accumulate in fp32 or wider whatever autocast says, and depend on V alone: a row
    has the same bits in any batch and for any thread count.

    Args:
        logits: (..., V) fp32, bf16, fp16 or fp64. Any leading strides: logits[:, :-1] of (B, T, V) is not copied. A
            vocabulary that is not contiguous, or leading dimensions that do not fold into two, are.
        token_ids: (...) integer, in [0, V) where the mask is True.
        temperature: number > 0, or tensor (...) of them; a constant: it gets no gradient.
        softcap: number > 0, applied before the temperature; None = none. An infinite logit becomes +-softcap.
        mask: (...) True = real token; None = all real. Masked rows are never read, give 0 and a gradient of 0.
        ref_logits: (..., V) logits of the reference; a constant: it gets no gradient. Another float dtype than that
            of `logits` promotes both.
        process_group: torch.distributed.ProcessGroup over whose ranks the vocabulary is cut, in the order of the ranks: logits and
            ref_logits are this one's (..., V_r) with V_r > 0, which may differ from rank to rank; everything else is the same on
            every rank, and the ids count from the first class of the first rank. Every rank gets the statistics of the whole and,
            from the same loss, the first derivative towards its own slice (rlhf_fast/_parallel.py). Two all-gathers: of V_r, and of 3
            numbers per token (5 with a reference); none in the backward. The reference's slice is read twice. A slice that
            excludes every class of a row is told from NaN by reading it once more, on a GPU always, unless there is a softcap.

    Returns:
        TokenStats, each (...) fp32 (fp64 for fp64 logits), all differentiable towards logits; kl is None without ref_logits.
        A row that holds NaN or +inf, or nothing but -inf, gives NaN in that row alone. Classes at -inf have probability 0
        and gradient 0. KL is inf where the reference excludes a class that the policy does not.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument. A token id outside of [0, V) names row,
            id and V before anything is computed (on the CPU; elsewhere such a row is NaN). A process_group that is not one, or
            that this process does not belong to.
    """
    if type(logits) is not Tensor or logits.dtype not in _check.FLOATS:
        _check.floating("token_logprobs", "logits", logits)
    if type(token_ids) is not Tensor or token_ids.dtype not in _check.INTS:
        _check.integer("token_logprobs", "token_ids", token_ids)
    rows = logits.shape[:-1]
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise _check.error(
            ValueError, "token_logprobs", "logits", f"shape {tuple(logits.shape)}", "(..., V) with V > 0"
        )
    if token_ids.shape != rows:
        _check.shape("token_logprobs", "token_ids", token_ids, rows, "logits without V")
    if token_ids.device != logits.device:
        _check.device("token_logprobs", "token_ids", token_ids, logits, "logits")
    mask = _check.mask_like("token_logprobs", mask, token_ids, "token_ids")
    value, per_token = temperature_of("token_logprobs", temperature, token_ids, logits.dtype)
    cap = 0.0 if softcap is None else _check.number("token_logprobs", "softcap", softcap, 0.0, open_low=True)
    if ref_logits is not None:
        _check.like("token_logprobs", "ref_logits", ref_logits, logits, "logits")
        if ref_logits.dtype is not logits.dtype:
            dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
            logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    keep_state = logits.requires_grad and torch.is_grad_enabled()
    if process_group is not None:
        _parallel.check_group("token_logprobs", process_group)
        part = _slice(logits, per_token, ref_logits, value, cap, keep_state)
        return _parallel.token_stats("token_logprobs", part, token_ids, mask, per_token, process_group)
    logprobs, entropy, logsumexp, kl, _ = _token_logprobs(
        logits, token_ids, mask, per_token, ref_logits, value, cap, keep_state
    )
    return TokenStats(logprobs, entropy, logsumexp, None if ref_logits is None else kl)


def _slice(
    logits: Tensor,
    temperature: Tensor | None,
    ref_logits: Tensor | None,
    temperature_value: float,
    softcap: float,
    keep_state: bool,
) -> _parallel.Slice:
    numbers = (temperature_value, softcap)

    def statistics(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        *found, kl, _ = _token_logprobs(logits, ids, mask, temperature, ref_logits, *numbers, keep_state)
        return *found, None if ref_logits is None else kl  # type: ignore[return-value]

    def ref_logsumexp(ids: Tensor, mask: Tensor | None) -> Tensor:
        return _token_logprobs(ref_logits.detach(), ids, mask, temperature, None, *numbers, False)[2]  # type: ignore[union-attr]

    of_policy = _parallel.Slice(logits.shape[-1], statistics, lambda: _parallel.excluded(logits, softcap))
    if ref_logits is None:
        return of_policy
    return of_policy._replace(ref_logsumexp=ref_logsumexp, ref_excluded=lambda: _parallel.excluded(ref_logits, softcap))


def temperature_of(
    op: str, temperature: float | Tensor, token_ids: Tensor, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """Checked (number, None), or (1.0, tensor like token_ids in the width of the results).

    The numbers in a tensor on the CPU are checked where they are read.
    """
    if not isinstance(temperature, Tensor):
        return _check.number(op, "temperature", temperature, 0.0, open_low=True), None
    _check.like(op, "temperature", temperature, token_ids, "token_ids")
    return 1.0, temperature.detach().to(wide(dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """dtype of the results for logits of `dtype`."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _layout(logits: Tensor, ref_logits: Tensor | None) -> tuple[Tensor, Tensor | None, list[int]]:
    """The tensors with rows that two levels of strides address, and (inner, outer and inner stride of each)."""
    V = logits.shape[-1]
    if logits.is_contiguous() and (ref_logits is None or ref_logits.is_contiguous()):
        return logits, ref_logits, [max(1, logits.numel() // V), 0, V, 0, V]
    tensors = [x if x is None or V == 1 or x.stride(-1) == 1 else x.contiguous() for x in (logits, ref_logits)]
    sizes: list[int] = []
    strides: list[list[int]] = []  # one list per remaining dimension, one entry per tensor
    for d, size in enumerate(logits.shape[:-1]):
        step = [0 if x is None else x.stride(d) for x in tensors]
        if size == 1:
            continue
        if sizes and all(outer == inner * size for outer, inner in zip(strides[-1], step, strict=True)):
            sizes[-1] *= size
            strides[-1] = step
        else:
            sizes.append(size)
            strides.append(step)
    if len(sizes) > 2:
        return _layout(logits.contiguous(), contiguous(ref_logits))
    while len(sizes) < 2:
        sizes.insert(0, 1)
        strides.insert(0, [0, 0])
    (outer, ref_outer), (inner, ref_inner) = strides
    return tensors[0], tensors[1], [max(1, sizes[1]), outer, inner, ref_outer, ref_inner]  # type: ignore[return-value]


def _ids(token_ids: Tensor) -> Tensor:
    """int32 or int64, contiguous."""
    if token_ids.dtype is not torch.int64 and token_ids.dtype is not torch.int32:
        token_ids = token_ids.to(torch.int32)
    return token_ids.contiguous()


def _refuse(row: int, token_ids: Tensor, temperature: Tensor | None, vocab: int) -> None:
    token_id = int(token_ids.flatten()[row])
    if not 0 <= token_id < vocab:
        raise ValueError(refused_id("token_logprobs", row, token_id, vocab))
    value = float("nan") if temperature is None else float(temperature.flatten()[row])
    raise ValueError(refused_temperature("token_logprobs", row, value))


def forward(logits, token_ids, mask, temperature, ref_logits, temperature_value, softcap, keep_state):  # type: ignore[no-untyped-def]
    rows, vocab = token_ids.numel(), logits.shape[-1]
    logits, ref_logits, layout = _layout(logits, ref_logits)
    token_ids, mask, temperature = _ids(token_ids), contiguous(mask), contiguous(temperature)
    dtype = wide(logits.dtype)
    logprobs = torch.empty_like(token_ids, dtype=dtype)  # empty_like: half the time of torch.empty with a shape
    entropy, logsumexp = torch.empty_like(logprobs), torch.empty_like(logprobs)
    kl = None if ref_logits is None else torch.empty_like(logprobs)
    state = torch.empty(state_shape(rows, ref_logits), dtype=dtype) if keep_state else None
    refused = kernel("token_logprobs")(
        logits,
        ref_logits,
        token_ids,
        mask,
        temperature,
        logprobs,
        entropy,
        logsumexp,
        kl,
        state,
        rows,
        vocab,
        *layout,
        temperature_value,
        softcap,
        DTYPES[logits.dtype],
        token_ids.dtype is torch.int32,
        torch.get_num_threads(),
    )
    if refused >= 0:
        _refuse(refused, token_ids, temperature, vocab)
    return logprobs, entropy, logsumexp, kl, state


def state_shape(rows: int, ref_logits: Tensor | None) -> tuple[int, int]:
    """Per row: max, log sum, entropy; with a reference also its max, its log sum and KL."""
    return (rows, 3 if ref_logits is None else 6)


def _reference_forward(logits, token_ids, mask, temperature, ref_logits, temperature_value, softcap, keep_state):  # type: ignore[no-untyped-def]
    logprobs, entropy, logsumexp, kl = reference(
        logits, token_ids, mask, temperature, ref_logits, temperature_value, softcap
    )
    state = logprobs.new_zeros(state_shape(token_ids.numel(), ref_logits) if keep_state else 0)
    return logprobs, entropy, logsumexp, logprobs.new_zeros(0) if kl is None else kl, state


def _fake_forward(logits, token_ids, mask, temperature, ref_logits, temperature_value, softcap, keep_state):  # type: ignore[no-untyped-def]
    dtype = wide(logits.dtype)
    logprobs, entropy, logsumexp = (logits.new_empty(token_ids.shape, dtype=dtype) for _ in range(3))
    kl = logits.new_empty(token_ids.shape if ref_logits is not None else 0, dtype=dtype)
    state = logits.new_empty(state_shape(token_ids.numel(), ref_logits) if keep_state else 0, dtype=dtype)
    return logprobs, entropy, logsumexp, kl, state


def backward_into(grad, logits, token_ids, state, mask, temperature, ref_logits, grads, temperature_value, softcap):  # type: ignore[no-untyped-def]
    """The C++ backward into `grad`, (..., V) contiguous or (N, V) with rows any distance apart, which may be the logits
    themselves. grads: four of (...) or None."""
    rows, vocab = token_ids.numel(), logits.shape[-1]
    if grads[3] is None:
        ref_logits = None
    logits, ref_logits, layout = _layout(logits, ref_logits)
    token_ids, mask, temperature = _ids(token_ids), contiguous(mask), contiguous(temperature)
    grads = [g if g is None else g.to(state.dtype).contiguous() for g in grads]
    refused = kernel("token_logprobs_backward")(
        logits,
        ref_logits,
        token_ids,
        mask,
        temperature,
        state,
        *grads,
        grad,
        rows,
        vocab,
        *layout,
        state.shape[-1],
        grad.stride(0) if grad.dim() == 2 else vocab,
        temperature_value,
        softcap,
        DTYPES[logits.dtype],
        token_ids.dtype is torch.int32,
        torch.get_num_threads(),
    )
    if refused >= 0:
        _refuse(refused, token_ids, temperature, vocab)
    return grad


def _backward_cpp(
    logits,
    token_ids,
    state,
    mask,
    temperature,
    ref_logits,
    g_logprobs,
    g_entropy,
    g_logsumexp,
    g_kl,
    temperature_value,
    softcap,
):  # type: ignore[no-untyped-def]
    grads = (g_logprobs, g_entropy, g_logsumexp, g_kl)
    grad = _buffers.empty(logits.shape, logits.dtype)
    return backward_into(
        grad, logits, token_ids, state, mask, temperature, ref_logits, grads, temperature_value, softcap
    )


def _backward_reference(
    logits,
    token_ids,
    state,
    mask,
    temperature,
    ref_logits,
    g_logprobs,
    g_entropy,
    g_logsumexp,
    g_kl,
    temperature_value,
    softcap,
):  # type: ignore[no-untyped-def]
    inputs = (logits, token_ids, mask, temperature, ref_logits, temperature_value, softcap)
    grads = (g_logprobs, g_entropy, g_logsumexp, None if ref_logits is None else g_kl)
    return reference_backward(reference, inputs, (0,), grads)[0]


_token_logprobs_backward = Op(
    "token_logprobs_backward",
    "(Tensor logits, Tensor token_ids, Tensor state, Tensor? mask, Tensor? temperature, Tensor? ref_logits, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_logsumexp, Tensor? grad_kl, "
    "float temperature_value, float softcap) -> Tensor",
    reference=_backward_reference,
    fake=lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    backends=[
        cuda("token_logprobs", "backward", no_doubles),
        triton("token_logprobs", "backward", no_doubles),
        cpp(_backward_cpp),
    ],
    strided=True,
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, token_ids, mask, temperature, ref_logits, temperature_value, softcap, _ = inputs
    state = output[-1]
    ctx.save_for_backward(logits, token_ids, state, mask, temperature, ref_logits)
    ctx.numbers = (temperature_value, softcap)
    ctx.has_ref = ref_logits is not None
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_entropy, grad_logsumexp, grad_kl, _grad_state):  # type: ignore[no-untyped-def]
    grads = (grad_logprobs, grad_entropy, grad_logsumexp, grad_kl if ctx.has_ref else None)
    grad = _token_logprobs_backward(*ctx.saved_tensors, *grads, *ctx.numbers)
    return grad, None, None, None, None, None, None, None


_token_logprobs = Op(
    "token_logprobs",
    "(Tensor logits, Tensor token_ids, Tensor? mask, Tensor? temperature, Tensor? ref_logits, "
    "float temperature_value, float softcap, bool keep_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_forward,
    fake=_fake_forward,
    backends=[cuda("token_logprobs", declines=no_doubles), triton("token_logprobs", declines=no_doubles), cpp(forward)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0,),
    strided=True,
)
