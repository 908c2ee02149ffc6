"""Log-probability of a token, entropy, log-sum-exp and exact KL of its distribution, in one read of the logits; and the gradient
of all four in one read and one write.

One program computes one row, whatever the number of rows. It walks the vocabulary four tiles at a time with one exponential per
logit (online softmax, Milakov & Gimelshein 2018, arXiv 1805.02867); the maximum is the only thing its threads tell each other in
the loop. What is left after the last four is walked tile by tile under a mask, so that the loop itself needs none and rows of an
odd vocabulary cost a load per logit, but no more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rlhf_fast.kernels.common.configs import config
from rlhf_fast.kernels.common.gradient import write_row
from rlhf_fast.kernels.common.launch import EXACT, LINE, arch_of, on_device, vector_of
from rlhf_fast.kernels.common.softmax import (
    LARGEST,
    LN_2,
    LOG2_E,
    add_pair,
    add_terms,
    base_of,
    capped,
    finite_or_nan,
    gradient_terms,
    log_of,
    point_of,
    raised,
    raised_pair,
    scale_of,
    shift_of,
    slope_of,
    target_gradient,
    widened,
)
from torch import Tensor

from rlhf_fast._native import contiguous
from rlhf_fast.ops.token_logprobs import _ids, _layout, state_shape

_FLOAT_MAX = torch.finfo(torch.float32).max
_PLACES = ["inner", "outer_stride", "inner_stride", "ref_outer_stride", "ref_inner_stride", "scale_value", "softcap"]
"""Arguments whose value is no reason to compile again; `aligned` tells what there is to know about the strides."""


@triton.jit
def _row_of(base, row, inner, outer_stride, inner_stride, VECTOR: tl.constexpr):
    """Where a row of two levels of strides begins, a multiple of VECTOR elements behind `base`."""
    return base + tl.multiple_of((row // inner) * outer_stride + (row % inner) * inner_stride, VECTOR)


@triton.jit
def _read(row, mask, token_ids, temperature, vocab, scale_value, MASK: tl.constexpr, TEMPERATURE: tl.constexpr):
    """(whether the row counts, whether its token and temperature are in range, token, 1 / temperature)."""
    real = row >= 0
    if MASK:
        real = tl.load(mask + row) != 0
    token = tl.load(token_ids + row, mask=real)
    legal = (token >= 0) & (token < vocab)
    scale = scale_value
    if TEMPERATURE:
        given = tl.load(temperature + row, mask=real)
        legal = legal & (given > 0.0) & (given < float("inf"))
        scale = scale_of(given)
    return real, legal, token, scale


@triton.jit
def _tile(row, columns, softcap, CAP: tl.constexpr):
    return capped(widened(tl.load(row + columns)), softcap, CAP)


@triton.jit
def _last_tile(row, columns, vocab, softcap, CAP: tl.constexpr):
    """-inf past the end, also under a cap."""
    inside = columns < vocab
    y = capped(widened(tl.load(row + columns, mask=inside)), softcap, CAP)
    return tl.where(inside, y, float("-inf"))


@triton.jit
def _raise(to, full_scale2, top, scale2, offset, rest, sums, weighted):
    if to > top:
        to_scale2, offset, to_rest = point_of(to, full_scale2)
        sums, weighted = raised(sums, weighted, top, rest, to, to_scale2, to_rest)
        top, scale2, rest = to, to_scale2, to_rest
    return top, scale2, offset, rest, sums, weighted


@triton.jit
def _raise_pair(to, ref_to, scale2, top, ref_top, sums, weighted, ref_sums, gap):
    if (to > top) | (ref_to > ref_top):
        shift, ref_shift = shift_of(top, to), shift_of(ref_top, ref_to)
        sums, weighted, ref_sums, gap = raised_pair(sums, weighted, ref_sums, gap, shift, ref_shift, scale2)
        top, ref_top = tl.maximum(top, to), tl.maximum(ref_top, ref_to)
    return top, ref_top, sums, weighted, ref_sums, gap


@triton.jit(do_not_specialize=_PLACES)
def token_logprobs_kernel(
    logits,  # rows of `vocab`
    ref_logits,
    token_ids,  # (rows,), as the following
    mask,  # uint8
    temperature,
    logprobs,
    entropy,
    logsumexp,
    kl,
    state,  # (rows, 3 or 6)
    inner,
    outer_stride,
    inner_stride,
    ref_outer_stride,
    ref_inner_stride,
    vocab,
    scale_value,
    softcap,
    MASK: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    CAP: tl.constexpr,
    REF: tl.constexpr,
    STATE: tl.constexpr,
    VECTOR: tl.constexpr,
    REF_VECTOR: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    real, legal, token, scale = _read(row, mask, token_ids, temperature, vocab, scale_value, MASK, TEMPERATURE)
    width: tl.constexpr = 6 if REF else 3
    if not (real & legal):
        nothing = tl.where(real, float("nan"), 0.0)
        tl.store(logprobs + row, nothing)
        tl.store(entropy + row, nothing)
        tl.store(logsumexp + row, nothing)
        if REF:
            tl.store(kl + row, nothing)
        if STATE:
            for k in tl.static_range(width):
                tl.store(state + row * width + k, nothing)
        return

    z = _row_of(logits, row, inner, outer_stride, inner_stride, VECTOR)
    at_target = capped(tl.load(z + token).to(tl.float32), softcap, CAP)
    scale2 = tl.minimum(scale * LOG2_E, LARGEST)
    lanes = tl.arange(0, LANES)
    top = float("-inf")
    sums = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    whole = vocab // (4 * LANES) * (4 * LANES)
    if REF:
        r = _row_of(ref_logits, row, inner, ref_outer_stride, ref_inner_stride, REF_VECTOR)
        ref_top = float("-inf")
        ref_sums = tl.zeros([LANES], tl.float32)
        gap = tl.zeros([LANES], tl.float32)
        for start in range(0, whole, 2 * LANES):
            y0 = _tile(z, start + lanes, softcap, CAP)
            y1 = _tile(z, start + LANES + lanes, softcap, CAP)
            r0 = _tile(r, start + lanes, softcap, CAP)
            r1 = _tile(r, start + LANES + lanes, softcap, CAP)
            to, ref_to = tl.max(tl.maximum(y0, y1), 0), tl.max(tl.maximum(r0, r1), 0)
            top, ref_top, sums, weighted, ref_sums, gap = _raise_pair(
                to, ref_to, scale2, top, ref_top, sums, weighted, ref_sums, gap
            )
            base, ref_base = base_of(top), base_of(ref_top)
            sums, weighted, ref_sums, gap = add_pair(y0, r0, base, ref_base, scale2, sums, weighted, ref_sums, gap)
            sums, weighted, ref_sums, gap = add_pair(y1, r1, base, ref_base, scale2, sums, weighted, ref_sums, gap)
        for start in range(whole, vocab, LANES):
            y0 = _last_tile(z, start + lanes, vocab, softcap, CAP)
            r0 = _last_tile(r, start + lanes, vocab, softcap, CAP)
            top, ref_top, sums, weighted, ref_sums, gap = _raise_pair(
                tl.max(y0, 0), tl.max(r0, 0), scale2, top, ref_top, sums, weighted, ref_sums, gap
            )
            base, ref_base = base_of(top), base_of(ref_top)
            sums, weighted, ref_sums, gap = add_pair(y0, r0, base, ref_base, scale2, sums, weighted, ref_sums, gap)
        p_sum = tl.sum(sums, 0)
        log_sum = finite_or_nan(log_of(p_sum), top)
        mean = log_sum - scale * tl.div_rn(tl.sum(weighted, 0), p_sum)
        q_sum = tl.sum(ref_sums, 0)
        distance = scale * tl.div_rn(tl.sum(gap, 0), p_sum) + log_of(tl.div_rn(q_sum, p_sum))
        distance = tl.where(distance < 0.0, 0.0, distance)  # rounding, where the distributions agree
        distance = finite_or_nan(finite_or_nan(distance, top), ref_top)
        tl.store(kl + row, distance)
        if STATE:
            tl.store(state + row * width + 3, ref_top)
            tl.store(state + row * width + 4, finite_or_nan(q_sum, ref_top))
            tl.store(state + row * width + 5, distance)
    else:
        place, offset, rest = scale2, 0.0, 0.0
        for start in range(0, whole, 4 * LANES):
            y0 = _tile(z, start + lanes, softcap, CAP)
            y1 = _tile(z, start + LANES + lanes, softcap, CAP)
            y2 = _tile(z, start + 2 * LANES + lanes, softcap, CAP)
            y3 = _tile(z, start + 3 * LANES + lanes, softcap, CAP)
            to = tl.max(tl.maximum(tl.maximum(y0, y1), tl.maximum(y2, y3)), 0)
            top, place, offset, rest, sums, weighted = _raise(to, scale2, top, place, offset, rest, sums, weighted)
            sums, weighted = add_terms(y0, place, offset, sums, weighted)
            sums, weighted = add_terms(y1, place, offset, sums, weighted)
            sums, weighted = add_terms(y2, place, offset, sums, weighted)
            sums, weighted = add_terms(y3, place, offset, sums, weighted)
        for start in range(whole, vocab, LANES):
            y0 = _last_tile(z, start + lanes, vocab, softcap, CAP)
            top, place, offset, rest, sums, weighted = _raise(
                tl.max(y0, 0), scale2, top, place, offset, rest, sums, weighted
            )
            sums, weighted = add_terms(y0, place, offset, sums, weighted)
        every, of_top = tl.sum(sums, 0), tl.exp2(rest)
        p_sum = tl.div_rn(every, of_top)
        log_sum = finite_or_nan(log_of(p_sum), top)
        # sum e (d - rest), whose largest term is taken out as it came in: a certain row has an entropy of 0
        below = (tl.sum(weighted, 0) - of_top * rest) - rest * (every - of_top)
        mean = log_sum - LN_2 * tl.div_rn(below, every)
        mean = tl.where(mean < 0.0, 0.0, mean)

    tl.store(logprobs + row, (at_target - top) * scale - log_sum)
    tl.store(entropy + row, mean)
    tl.store(logsumexp + row, top * scale + log_sum)
    if STATE:
        tl.store(state + row * width, top)
        tl.store(state + row * width + 1, finite_or_nan(p_sum, top))
        tl.store(state + row * width + 2, mean)


def forward(  # type: ignore[no-untyped-def]
    logits, token_ids, mask, temperature, ref_logits, temperature_value, softcap, keep_state
):
    """The cell of token_logprobs: (logprobs, entropy, logsumexp, kl or None, state or None)."""
    rows, vocab = token_ids.numel(), logits.shape[-1]
    logits, ref_logits, layout, vectors = aligned(logits, ref_logits)
    token_ids, mask, temperature = _ids(token_ids), _bytes(mask), contiguous(temperature)
    logprobs, entropy, logsumexp = (torch.empty_like(token_ids, dtype=torch.float32) for _ in range(3))
    kl = None if ref_logits is None else torch.empty_like(logprobs)
    state = logprobs.new_empty(state_shape(rows, ref_logits)) if keep_state else None
    if rows:
        lanes, num_warps = config("token_logprobs", arch_of(logits), logits.dtype, vocab)
        with on_device(logits):
            token_logprobs_kernel[(rows,)](
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
                *layout,
                vocab,
                _scale(temperature_value),
                softcap,
                **_flags(mask, temperature, softcap),
                REF=ref_logits is not None,
                STATE=keep_state,
                **vectors,
                LANES=lanes,
                num_warps=num_warps,
                **EXACT,
            )
    return logprobs, entropy, logsumexp, kl, state


@triton.jit
def _number(of, at, real):
    """One that is looked at where the row is `real`."""
    return tl.load(of + at, mask=real)


@triton.jit
def _upstream(grad, row, real, GIVEN: tl.constexpr):
    if GIVEN:
        return _number(grad, row, real)
    else:
        return 0.0


@triton.jit(do_not_specialize=[*_PLACES, "grad_stride"])
def token_logprobs_backward_kernel(
    logits,  # rows of `vocab`, as grad, which may be the same memory
    ref_logits,
    token_ids,  # (rows,), as the following
    mask,  # uint8
    temperature,
    grad_logprobs,
    grad_entropy,
    grad_logsumexp,
    grad_kl,
    state,  # (rows, STATE)
    grad,
    inner,
    outer_stride,
    inner_stride,
    ref_outer_stride,
    ref_inner_stride,
    grad_stride,
    vocab,
    scale_value,
    softcap,
    MASK: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    CAP: tl.constexpr,
    LOGPROBS: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    KL: tl.constexpr,
    STATE: tl.constexpr,
    VECTOR: tl.constexpr,
    REF_VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    real, legal, token, scale = _read(row, mask, token_ids, temperature, vocab, scale_value, MASK, TEMPERATURE)
    real = real & legal
    g_logprob = _upstream(grad_logprobs, row, real, LOGPROBS)
    g_entropy = _upstream(grad_entropy, row, real, ENTROPY)
    g_logsumexp = _upstream(grad_logsumexp, row, real, LOGSUMEXP)
    g_kl = _upstream(grad_kl, row, real, KL)
    real = real & ((g_logprob != 0.0) | (g_entropy != 0.0) | (g_logsumexp != 0.0) | (g_kl != 0.0))

    state += row * STATE
    top = _number(state, 0, real)
    p_sum = _number(state, 1, real)
    p_mean = _number(state, 2, real)
    log_p_sum = log_of(p_sum)
    ref_top, log_ratio, q_mean = 0.0, 0.0, 0.0
    if KL:
        ref_top = _number(state, 3, real)
        log_ratio = log_of(p_sum / _number(state, 4, real))
        q_mean = _number(state, 5, real)
    constant, by_z, by_gap = gradient_terms(
        g_logprob, g_entropy, g_logsumexp, g_kl, p_sum, log_p_sum, p_mean, log_ratio, q_mean, scale
    )
    dtype: tl.constexpr = grad.dtype.element_ty
    out = grad + tl.multiple_of(row * grad_stride, GRAD_VECTOR)
    if (not real) or (constant != constant):  # NaN or +inf in the row, or a NaN from upstream
        nothing = tl.where(real, float("nan"), 0.0).to(dtype)
        for start in range(0, vocab, 4 * LANES):
            columns = start + tl.arange(0, 4 * LANES)
            tl.store(out + columns, nothing, mask=columns < vocab)
        return

    z = _row_of(logits, row, inner, outer_stride, inner_stride, VECTOR)
    r = z
    x = tl.load(z + token).to(tl.float32)
    v = 0.0
    if KL:
        r = _row_of(ref_logits, row, inner, ref_outer_stride, ref_inner_stride, REF_VECTOR)
        v = capped(tl.load(r + token).to(tl.float32), softcap, CAP) - ref_top
    u = capped(x, softcap, CAP) - top
    at_target = target_gradient(
        g_logprob, g_entropy, g_logsumexp, g_kl, log_p_sum, p_mean, log_ratio, q_mean, u, v, scale
    ) * slope_of(x, softcap, CAP)
    scale2 = tl.minimum(scale * LOG2_E, LARGEST)
    tl.debug_barrier()  # every thread has its logit of the target before the gradient may overwrite it
    place, offset, rest = point_of(top, scale2)
    norm = 1.0 / tl.exp2(rest)  # e of u over e of d, as in the sum
    slope = by_z * LN_2
    shifted = (constant - slope * rest) * norm
    if KL and g_kl != 0.0:
        write_row(
            z, r, out, vocab, softcap, scale2, top, ref_top, constant, by_z * scale, by_gap * scale, CAP, True, True, LANES
        )  # fmt: skip
    elif ENTROPY and g_entropy != 0.0:
        write_row(
            z, r, out, vocab, softcap, place, offset, 0.0, shifted, slope * norm, 0.0, CAP, True, False, LANES
        )  # fmt: skip
    else:
        write_row(z, r, out, vocab, softcap, place, offset, 0.0, constant * norm, 0.0, 0.0, CAP, False, False, LANES)
    tl.debug_barrier()  # the tile that holds the target is written
    tl.store(out + token, at_target.to(dtype))


def backward_into(  # type: ignore[no-untyped-def]
    grad, logits, token_ids, state, mask, temperature, ref_logits, grads, temperature_value, softcap
):
    """The gradient into `grad`, (..., V) contiguous or (N, V) with rows any distance apart, which may be the logits themselves or
    have another dtype. grads: four of (...) or None."""
    rows, vocab = token_ids.numel(), logits.shape[-1]
    if grads[3] is None:
        ref_logits = None
    logits, ref_logits, layout = _layout(logits, ref_logits)
    token_ids, mask, temperature = _ids(token_ids), _bytes(mask), contiguous(temperature)
    grads = [g if g is None else g.to(torch.float32).contiguous() for g in grads]
    stride = grad.stride(0) if grad.dim() == 2 else vocab
    if rows:
        lanes, num_warps = config("token_logprobs_backward", arch_of(logits), logits.dtype, vocab)
        with on_device(logits):
            token_logprobs_backward_kernel[(rows,)](
                logits,
                ref_logits,
                token_ids,
                mask,
                temperature,
                *grads,
                state,
                grad,
                *layout,
                stride,
                vocab,
                _scale(temperature_value),
                softcap,
                **_flags(mask, temperature, softcap),
                LOGPROBS=grads[0] is not None,
                ENTROPY=grads[1] is not None,
                LOGSUMEXP=grads[2] is not None,
                KL=ref_logits is not None,
                STATE=state.shape[-1],
                **_vectors(logits, ref_logits, layout),
                GRAD_VECTOR=vector_of(grad, stride),
                LANES=lanes,
                num_warps=num_warps,
                **EXACT,
            )
    return grad


def backward(  # type: ignore[no-untyped-def]
    logits, token_ids, state, mask, temperature, ref_logits, g_logprobs, g_entropy, g_logsumexp, g_kl, temperature_value,
    softcap,
):  # fmt: skip
    """The cell of token_logprobs_backward."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    grads = (g_logprobs, g_entropy, g_logsumexp, g_kl)
    return backward_into(
        grad, logits, token_ids, state, mask, temperature, ref_logits, grads, temperature_value, softcap
    )


def aligned(
    logits: Tensor, ref_logits: Tensor | None = None
) -> tuple[Tensor, Tensor | None, list[int], dict[str, int]]:
    """(logits, ref_logits, their layout, their `_vectors`), copied where their addresses would change the width of a load.

    A vocabulary has one width of load, and so one order of sums, wherever its rows are.
    """
    vocab = logits.shape[-1]
    logits, ref_logits, layout = _layout(logits, ref_logits)
    if vocab % (LINE // logits.element_size()):
        return logits, ref_logits, layout, {"VECTOR": 1, "REF_VECTOR": 1}
    vectors = _vectors(logits, ref_logits, layout)
    if vectors["VECTOR"] == 1 or (ref_logits is not None and vectors["REF_VECTOR"] == 1):
        logits, ref_logits, layout = _layout(_moved(logits), None if ref_logits is None else _moved(ref_logits))
        vectors = _vectors(logits, ref_logits, layout)
    return logits, ref_logits, layout, vectors


def _moved(x: Tensor) -> Tensor:
    """A copy in memory of its own, which begins at an address for wide loads."""
    return x.clone(memory_format=torch.contiguous_format)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _scale(temperature: float) -> float:
    return min(1.0 / temperature, _FLOAT_MAX)


def _flags(mask: Tensor | None, temperature: Tensor | None, softcap: float) -> dict[str, bool]:
    return {"MASK": mask is not None, "TEMPERATURE": temperature is not None, "CAP": softcap > 0}


def _vectors(logits: Tensor, ref_logits: Tensor | None, layout: list[int]) -> dict[str, int]:
    """What all rows' distances from the first are multiples of, in elements."""
    _, outer, inner, ref_outer, ref_inner = layout
    return {
        "VECTOR": vector_of(logits, outer, inner),
        "REF_VECTOR": 1 if ref_logits is None else vector_of(ref_logits, ref_outer, ref_inner),
    }
