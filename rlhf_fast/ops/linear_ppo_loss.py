"""The PPO loss straight from hidden states and a language-model head, its gradients computed while the logits exist."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _check, _parallel
from rlhf_fast._native import contiguous
from rlhf_fast._op import Backend, Op, cpp, cuda, no_doubles, triton
from rlhf_fast._types import LossOutput, Stats
from rlhf_fast.ops._kept_gradients import reference_cell, scaling
from rlhf_fast.ops._lm_head import (
    Chunk,
    Gradients,
    Inputs,
    Rows,
    compute_dtype,
    cuda_rows,
    triton_rows,
    whole_rows,
)
from rlhf_fast.ops._lm_head import arguments as head_arguments
from rlhf_fast.ops.linear_token_logprobs import linear_token_logprobs
from rlhf_fast.ops.ppo_loss import PPO, _ppo_loss, loss_output
from rlhf_fast.ops.ppo_loss import arguments as loss_arguments
from rlhf_fast.ops.ppo_loss import forward as loss_forward
from rlhf_fast.ops.token_logprobs import backward_into
from rlhf_fast.ops.token_logprobs import forward as tokens_forward
from rlhf_fast.reference._reduce import token_weights
from rlhf_fast.reference.linear_ppo_loss import linear_ppo_loss as reference
from rlhf_fast.reference.ppo_loss import STATS

_OP = "linear_ppo_loss"


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    clip: float | tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.1,
    importance_weights: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: Tensor | float | None = None,
    dialect: str = "rlhf_fast",
    cu_seqlens: Tensor | None = None,
    process_group: object | None = None,
) -> LossOutput:
    """ppo_loss of the log-probs and entropies that linear_token_logprobs gives, in one pass over the head.

    Every reduction is a sum of token losses with weights that the mask tells, so the gradient towards a few rows of logits is
    known while these logits exist, and takes their place in memory: two matrix products with a frozen head, three with a trained
    one, with or without an entropy bonus; nothing is computed twice and the logits never exist whole. On the CPU masked rows are
    taken out before the product, rows whose gradient is 0 (clipped, or without advantage) before the products of the gradients; a
    GPU multiplies them as zeros, since the host would have to wait to learn which they are. The
    backward scales what the forward found. Products and their sums are fp32 (fp64 when hidden or weight is).

    Args:
        hidden: (..., H) float; hidden[t] is the state that predicts token_ids[t].
        weight: (V, H) float; may differ from hidden in dtype.
        token_ids: (...) integer, in [0, V) where the mask is True.
        old_logprobs, advantages, mask: as for ppo_loss, where token_ids stands for logprobs.
        bias: (V,) float or None.
        temperature, softcap: as for token_logprobs.
        chunk_bytes: budget in bytes of the logits and of what else lives for one chunk (at least one row is computed);
            None = 64 MiB on a CPU, 512 MiB elsewhere. Besides it, fp32 gradients of what requires grad are kept for the
            backward: (..., H), (V, H), (V,).
        clip, dual_clip, entropy_coef, ref_logprobs, kl_coef, kl_kind, values, old_values, returns, value_clip, value_coef,
            importance_weights, reduction, normalizer, dialect, cu_seqlens: as for ppo_loss.
        process_group: as for linear_token_logprobs: weight (V_r, H) and bias are this rank's rows of the head, everything else is
            whole on every rank, and so are the loss and the gradient towards hidden. A row's gradient needs what the other ranks
            find, so the two ops run one after the other: the backward computes the logits a second time.

    Returns:
        LossOutput(loss, stats): a scalar, fp32 (fp64 when an input is fp64), differentiable towards hidden, weight, bias and
        values, every other input being a constant; and the statistics of ppo_loss, the entropy always among them.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range, or a coefficient without its tensor; names the argument. A
            token id outside of [0, V) names row, id and V before anything is computed (on the CPU; elsewhere the loss is NaN).
    """
    if process_group is not None:
        _parallel.check_group(_OP, process_group)
    x = head_arguments(_OP, hidden, weight, token_ids, bias, mask, temperature, softcap, chunk_bytes)
    made = token_ids.new_empty(token_ids.shape, dtype=x.dtype)  # stands for the log-probs and entropies to come
    checked = loss_arguments(
        _OP, "token_ids", made, old_logprobs, advantages, mask, clip, dual_clip, made, entropy_coef, ref_logprobs, kl_coef,
        kl_kind, values, old_values, returns, value_clip, value_coef, importance_weights, reduction, normalizer, dialect,
        cu_seqlens,
    )  # fmt: skip
    if process_group is not None:
        found = linear_token_logprobs(
            hidden, weight, token_ids, bias=bias, temperature=temperature, softcap=softcap, mask=mask, chunk_bytes=chunk_bytes,
            process_group=process_group,
        )  # fmt: skip
        entropy, dtype = found.entropy if entropy_coef else found.entropy.detach(), checked[1].dtype
        return loss_output((found.logprobs.to(dtype), *checked[1:4], entropy.to(dtype), *checked[5:]))
    _, old_logprobs, advantages, mask, _, ref_logprobs, values, *rest = checked
    tensors, numbers = rest[:5], rest[5:]
    differentiate = torch.is_grad_enabled()
    wanted = [differentiate and t is not None and t.requires_grad for t in (hidden, weight, bias, values)]
    loss, stats, *_ = _linear_ppo_loss(
        hidden, weight, bias, token_ids, mask, x.temperature, old_logprobs, advantages, ref_logprobs, values, *tensors,
        *x.numbers, *numbers, x.chunk_bytes, wanted,
    )  # fmt: skip
    return LossOutput(loss, Stats(stats, STATS))


_TENSORS, _NUMBERS = 15, 13
"""Tensors of the schema, and the numbers of ppo_loss."""
_DIFFERENTIABLE = (0, 1, 2, 9)
"""hidden, weight, bias, values."""


def _forward(*args):  # type: ignore[no-untyped-def]
    return _forward_by(Rows(tokens_forward, backward_into), loss_forward, True, *args)


def _forward_cuda(*args):  # type: ignore[no-untyped-def]
    return _forward_on_gpu(cuda_rows(), *args)


def _forward_triton(*args):  # type: ignore[no-untyped-def]
    return _forward_on_gpu(triton_rows(), *args)


def _forward_on_gpu(kernels: Rows, *args):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return _forward_by(kernels, lambda *inputs: _ppo_loss.cell(inputs).fn(*inputs), False, *args)


def _forward_by(kernels: Rows, loss_of, picks: bool, *args):  # type: ignore[no-untyped-def]
    """picks: rows are checked, and taken out, by what is in them. On a GPU that would wait for it: there the kernels of rows have
    the mask, give NaN where the check would raise, and write the zeros of rows without a gradient."""
    hidden, weight, bias, token_ids, *per_token = args[:_TENSORS]
    mask, temperature, old, advantages, ref, *rest = map(contiguous, per_token)
    value, cap, *numbers, chunk_bytes, wanted = args[_TENSORS:]
    importance, normalizer, cu_seqlens = rest[3:]
    dtype, bonus, terms, (reduction, divisor) = old.dtype, numbers[4], numbers[:-2], numbers[-2:]
    x = Inputs(hidden, weight, bias, token_ids, mask, temperature, None, None, None, value, cap, chunk_bytes).flat()
    if picks:
        _check.token_rows(_OP, x.token_ids, x.temperature, x.mask, x.weight.shape[0])
    per_token = [None if t is None else t.reshape(-1) for t in (old, advantages, ref, importance)]
    weights = token_weights(mask, torch.float64, reduction, normalizer, divisor, cu_seqlens).reshape(-1).to(dtype)
    logprobs, entropy = (torch.zeros(mask.shape, dtype=dtype, device=mask.device) for _ in range(2))
    differentiate = any(wanted[:3])
    gradients = Gradients(x, wanted)
    narrow = differentiate and not picks and x.narrow and x.exact
    for c in whole_rows(x, mask.reshape(-1) if picks else None, narrow=narrow):
        found = kernels.forward(c.logits, c.token_ids, c.mask, c.temperature, None, *x.numbers, differentiate)
        some, some_entropy = (t.to(dtype) for t in found[:2])
        logprobs.view(-1)[c.rows], entropy.view(-1)[c.rows] = some, some_entropy
        if differentiate:
            old_rows, advantage, ref_rows, factor = (None if t is None else t[c.rows] for t in per_token)
            real = torch.ones_like(c.token_ids, dtype=torch.bool) if c.mask is None else c.mask
            _, _, slopes = loss_of(
                some, old_rows, advantage, real, some_entropy if bonus else None, ref_rows, None, None, None, factor,
                None, None, *terms, "token-sum", 0.0, *PPO, True,
            )  # fmt: skip
            slopes *= weights[c.rows]
            state = found[-1]
            if picks:
                c, state, slopes = _live(c, state, slopes)
            if len(state):
                grads = (slopes[0], slopes[1] if bonus else None, None, None)
                into = c.gradient()
                kernels.backward_into(
                    into, c.logits, c.token_ids, state, c.mask, c.temperature, None, grads, *x.numbers
                )
                gradients.add(c, into)
    loss, stats, of_tokens = loss_of(
        logprobs, old, advantages, mask, entropy, ref, *rest, *terms, reduction, divisor, *PPO, wanted[3]
    )  # fmt: skip
    d_hidden, d_weight, d_bias = gradients.found()
    d_hidden = None if d_hidden is None else d_hidden.view(hidden.shape)
    return loss, stats, d_hidden, d_weight, d_bias, of_tokens[-1].clone() if wanted[3] else None


def _live(c: Chunk, state: Tensor, slopes: Tensor) -> tuple[Chunk, Tensor, Tensor]:
    """The rows (n,) of the chunk where one of the slopes (k, n) is not 0, moved together in its own memory."""
    alive = (slopes != 0).any(0)
    n, count = len(alive), int(alive.sum())
    if count == n:
        return c, state, slopes
    order = torch.arange(n)
    holes, last = (~alive[:count]).nonzero().squeeze(1), alive[count:].nonzero().squeeze(1) + count
    order[holes] = last
    for to, at in zip(holes.tolist(), last.tolist(), strict=True):  # one by one: a copy of them all has no budget
        c.logits[to] = c.logits[at]
    order = order[:count]
    rows = order + c.rows.start if isinstance(c.rows, slice) else c.rows[order]
    temperature = None if c.temperature is None else c.temperature[order]
    c = c._replace(
        rows=rows,
        hidden=c.hidden[order],
        logits=c.logits[:count],
        token_ids=c.token_ids[order],
        temperature=temperature,
    )
    return c, state[order], slopes[:, order]


def _dtypes(inputs) -> list[torch.dtype]:  # type: ignore[no-untyped-def]
    """Of the gradients: they are kept wide, since one that is not yet scaled may be too small for fp16."""
    return [compute_dtype(inputs[0], inputs[1])] * 3 + [inputs[6].dtype]


def _fake(*args):  # type: ignore[no-untyped-def]
    hidden, old, wanted = args[0], args[6], args[-1]
    each = zip(_DIFFERENTIABLE, wanted, _dtypes(args), strict=True)
    grads = (hidden.new_empty(args[i].shape, dtype=dtype) if want else old.new_empty(0) for i, want, dtype in each)
    return old.new_empty(()), old.new_empty(len(STATS)), *grads


_linear_ppo_loss = Op(
    _OP,
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor mask, Tensor? temperature, Tensor old_logprobs, "
    "Tensor advantages, Tensor? ref_logprobs, Tensor? values, Tensor? old_values, Tensor? returns, "
    "Tensor? importance_weights, Tensor? normalizer, Tensor? cu_seqlens, float temperature_value, float softcap, "
    "float clip_low, float clip_high, float dual_clip, float ratio_clamp, float entropy_coef, float kl_coef, str kl_kind, "
    "float kl_clamp_in, float kl_clamp_out, float value_clip, float value_coef, str reduction, float divisor, "
    "int chunk_bytes, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_cell(reference, _DIFFERENTIABLE, 2, _dtypes),
    fake=_fake,
    backends=[
        Backend("cuda", "cuda", _forward_cuda, cuda("token_logprobs").missing, no_doubles),
        Backend("triton", "cuda", _forward_triton, triton("token_logprobs").missing, no_doubles),
        cpp(_forward),
    ],
    strided=True,
    **scaling(_DIFFERENTIABLE),
)
