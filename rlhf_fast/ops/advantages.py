"""Scores, values and log-probs to advantages in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check
from rlhf_fast._native import kernel
from rlhf_fast._op import Op, cpp, cuda, no_doubles, reference_backward, triton
from rlhf_fast._types import Advantages
from rlhf_fast.dialects import dialect as dialect_of
from rlhf_fast.ops.gae import GAPS, gae
from rlhf_fast.ops.kl_estimate import ALL_KINDS, KINDS
from rlhf_fast.reference.advantages import WHITEN_EPS, score_slots, with_slot_after
from rlhf_fast.reference.advantages import advantages as reference
from rlhf_fast.reference.whiten import by_deviation, standardise


def advantages(
    scores: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    dialect: str = "rlhf_fast",
    bootstrap: Tensor | None = None,
    truncated: Tensor | None = None,
    gap: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Advantages:
    """The whole path of PPO in one pass: per-token KL -> reward shaping -> GAE -> returns -> whitening.

    rewards_t = -kl_coef kl_t + score at the sequence's slot (Ziegler et al. 2019, arXiv 1909.08593, eq. 2); GAE as in `gae`;
    returns before whitening; advantages whitened over the real tokens of the call and 0 elsewhere.

    Args:
        scores: (B,) one score per sequence, placed by the dialect's rule (a sequence without a real token drops it); or
            (B, T) token rewards; with cu_seqlens (S,) or (N,), and (S,) when S = N.
        values: (B, T) value of the state before each token; (N,) packed when cu_seqlens is given.
        mask: like values, True = real token. Masked slots give 0 and are never read, but for their values with gap "read".
        logprobs, ref_logprobs: like values, in nats; both or neither.
        kl_coef: >= 0, price of one nat; needs the log-probs.
        kl_kind: estimator of `kl_estimate`, bounded as the dialect says.
        gamma, lam: in [0, 1].
        whiten: False returns the raw advantages.
        dialect: row of rlhf_fast.dialects.DIALECTS. "trl" counts the slot after the last real token as real for rewards, values
            and returns, because its score and its last value live there. "areal" is whitened by plain PyTorch in fp64, after the
            pass.
        bootstrap: (B,) value of the state after the last real token (truncated responses); None = 0.
        truncated: (B,) bool, True = cut before its end: the bootstrap value counts there only, and a dialect with drop_truncated
            takes a sequence score of 0. None = bootstrap counts everywhere and no score is dropped.
        gap: "carry", "decay" or "read" as in `gae`; None = the dialect's. "read" scans twice.
        cu_seqlens: (S+1,) boundaries of S packed sequences.

    Returns:
        Advantages(advantages, returns, rewards, kl), each like values, fp32 (fp64 when an input is fp64); differentiable
        towards scores, values, both log-probs and bootstrap.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, range or dialect; names the argument.
    """
    op = "advantages"
    rules = dialect_of(op, dialect)
    if type(values) is not Tensor or values.dtype not in _check.FLOATS:
        _check.floating(op, "values", values)
    shape = values.shape
    if mask is None:
        raise _check.error(TypeError, op, "mask", None, "a torch.Tensor")
    mask = _check.mask_like(op, mask, values, "values")  # type: ignore[assignment]
    if cu_seqlens is not None:
        if len(shape) != 1:
            raise _check.error(ValueError, op, "values", f"shape {tuple(shape)}", "(N,) with cu_seqlens")
        cu_seqlens = _check.cu_seqlens(op, cu_seqlens, shape[0], values)
        rows = cu_seqlens.shape[0] - 1
    elif len(shape) != 2:
        raise _check.error(ValueError, op, "values", f"shape {tuple(shape)}", "(B, T)")
    else:
        rows = shape[0]
    per_token = _scores(scores, values, rows)
    if (logprobs is None) != (ref_logprobs is None):
        missing, given = ("logprobs", "ref_logprobs") if logprobs is None else ("ref_logprobs", "logprobs")
        raise _check.error(ValueError, op, missing, None, f"a tensor, since {given} is given")
    if logprobs is None and kl_coef:
        raise _check.error(ValueError, op, "kl_coef", kl_coef, "0 without logprobs and ref_logprobs")
    given = {} if logprobs is None else {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
    ready = _check.alike(op, values, "values", given)
    if bootstrap is not None:
        _check.floating(op, "bootstrap", bootstrap)
        _check.shape(op, "bootstrap", bootstrap, (rows,), "one value per sequence")
        _check.device(op, "bootstrap", bootstrap, values, "values")
    kl_coef = _check.number(op, "kl_coef", kl_coef, 0.0)
    gamma = _check.number(op, "gamma", gamma, 0.0, 1.0)
    lam = _check.number(op, "lam", lam, 0.0, 1.0)
    _check.choice(op, "kl_kind", kl_kind, ALL_KINDS)
    if gap is None:
        gap = rules.gap
    else:
        _check.choice(op, "gap", gap, GAPS)
    if truncated is not None:
        scores, bootstrap = _cut(truncated, scores, bootstrap, rows, rules.drop_truncated and not per_token)
    if not (ready and bootstrap is None and scores.dtype is torch.float32 and scores.is_contiguous()):
        scores, values, logprobs, ref_logprobs, bootstrap = _check.common_wide(  # type: ignore[assignment]
            scores, values, logprobs, ref_logprobs, bootstrap
        )
    after_last, by_steps = (
        rules.score_slot == "after_last",
        gap == "read" or (whiten and rules.deviation_eps is not None),
    )
    found = Advantages(
        *_advantages(
            scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, per_token, kl_coef, kl_kind,
            *rules.kl_bounds(kl_kind), math.inf if rules.score_clip is None else rules.score_clip, after_last, gamma, lam,
            gap == "decay", bool(whiten) and not by_steps, rules.unbiased, rules.floor_variance,
        )
    )  # fmt: skip
    if not by_steps:
        return found
    raw, returns, rewards, kl = found
    if gap == "read":
        valued = with_slot_after(mask, cu_seqlens) if after_last else mask
        raw, returns = gae(
            rewards, values, valued, gamma=gamma, lam=lam, bootstrap=bootstrap, cu_seqlens=cu_seqlens, gap=gap
        )
    if not whiten:
        return Advantages(raw.where(mask, 0.0), returns, rewards, kl)
    if rules.deviation_eps is not None:
        return Advantages(by_deviation(raw, mask, rules.unbiased, rules.deviation_eps), returns, rewards, kl)
    white = standardise(raw.double(), mask, rules.unbiased, WHITEN_EPS, rules.floor_variance)
    return Advantages(white.where(mask, 0.0).to(raw.dtype), returns, rewards, kl)


def _cut(
    truncated: Tensor, scores: Tensor, bootstrap: Tensor | None, rows: int, drop: bool
) -> tuple[Tensor, Tensor | None]:
    """(scores, bootstrap) with the checked `truncated`."""
    _check.boolean("advantages", "truncated", truncated)
    _check.shape("advantages", "truncated", truncated, (rows,), "one per sequence")
    _check.device("advantages", "truncated", truncated, scores, "scores")
    truncated = truncated != 0
    return (
        scores.masked_fill(truncated, 0.0) if drop else scores,
        None if bootstrap is None else bootstrap.where(truncated, 0.0),
    )


def _scores(scores: Tensor, values: Tensor, rows: int) -> bool:
    """Whether the checked scores are token rewards (the shape of values) rather than one per sequence."""
    if type(scores) is not Tensor or scores.dtype not in _check.FLOATS:
        _check.floating("advantages", "scores", scores)
    if scores.device != values.device:
        _check.device("advantages", "scores", scores, values, "values")
    if scores.shape == (rows,):
        return False
    if scores.shape == values.shape:
        return True
    expected = f"({rows},), one per sequence, or {tuple(values.shape)}, one per token"
    raise _check.error(ValueError, "advantages", "scores", f"shape {tuple(scores.shape)}", expected)


def _forward(
    scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, token_scores, kl_coef, kl_kind, clamp_in,
    clamp_out, score_clip, after_last, gamma, lam, decay_gaps, whiten, unbiased, floor_variance,
):  # type: ignore[no-untyped-def]  # fmt: skip
    outputs = [_buffers.empty_like(values) for _ in range(4)]
    rows, length = values.shape if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)
    kernel("advantages")(
        scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, *outputs,
        rows, length, values.numel(), token_scores, kl_coef, ALL_KINDS.index(kl_kind) % len(KINDS), clamp_in, clamp_out,
        score_clip, after_last, gamma, lam, decay_gaps, whiten, unbiased, floor_variance, WHITEN_EPS,
        values.dtype is torch.float64, torch.get_num_threads(),
    )  # fmt: skip
    return tuple(outputs)


def _backward_cpp(
    grad_advantages, grad_returns, grad_rewards, grad_kl, scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens,
    token_scores, kl_coef, kl_kind, clamp_in, clamp_out, score_clip, after_last, gamma, lam, decay_gaps, whiten, unbiased,
    floor_variance,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """The adjoint, step by step with the kernels of the single ops: whiten, gae, placement, KL."""
    f64, threads = values.dtype is torch.float64, torch.get_num_threads()
    valued = with_slot_after(mask, cu_seqlens) if after_last else mask
    rows, length = values.shape if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)
    grad = grad_advantages.contiguous().where(mask, 0.0)
    if whiten:
        raw, *_ = _forward(
            scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, token_scores, kl_coef, kl_kind, clamp_in,
            clamp_out, score_clip, after_last, gamma, lam, decay_gaps, False, unbiased, floor_variance,
        )  # fmt: skip
        upstream, grad = grad, torch.empty_like(raw)
        kernel("whiten_backward")(
            upstream, raw, mask, grad, raw.numel(), True, unbiased, floor_variance, WHITEN_EPS, f64, threads
        )
    shaped, into_values = torch.empty_like(grad), torch.empty_like(grad)
    into_bootstrap = grad.new_empty(rows)
    grad_returns = grad_returns.contiguous()
    kernel("gae_backward")(
        grad, grad_returns, valued, cu_seqlens, shaped, into_values, into_bootstrap,
        rows, length, gamma, lam, decay_gaps, f64, threads,
    )  # fmt: skip
    shaped += grad_rewards  # rewards are an output too
    if token_scores:
        into_scores = shaped.where(valued, 0.0)
    else:
        slot, exists = score_slots(mask, cu_seqlens, after_last)
        moves = exists & (scores.abs() <= score_clip)
        into_scores = torch.zeros_like(scores)
        into_scores[moves] = shaped.reshape(-1)[slot[moves]]
    empty = values.new_empty(0)
    into_logprobs = into_ref = empty
    if logprobs is not None:
        upstream = (grad_kl - kl_coef * shaped).contiguous()
        into_logprobs = torch.empty_like(logprobs)
        kernel("kl_estimate_backward")(
            upstream, logprobs, ref_logprobs, mask, into_logprobs, upstream.numel(),
            ALL_KINDS.index(kl_kind) % len(KINDS), kl_kind[-1] == "+", clamp_in, clamp_out, f64, threads,
        )  # fmt: skip
        into_ref = -into_logprobs
    return into_scores, into_values, into_logprobs, into_ref, empty if bootstrap is None else into_bootstrap


def _backward_reference(
    grad_advantages,
    grad_returns,
    grad_rewards,
    grad_kl,
    scores,
    values,
    mask,
    logprobs,
    ref_logprobs,
    bootstrap,
    cu_seqlens,
    *rest,
):  # type: ignore[no-untyped-def]
    inputs = (scores, values, mask, logprobs, ref_logprobs, bootstrap, cu_seqlens, *rest)
    wanted = [i for i in (0, 1, 3, 4, 5) if inputs[i] is not None]
    grads = (grad_advantages, grad_returns, grad_rewards, grad_kl)
    found = dict(zip(wanted, reference_backward(reference, inputs, wanted, grads), strict=True))
    return tuple(found.get(i, values.new_empty(0)) for i in (0, 1, 3, 4, 5))


_REST = (
    "bool token_scores, float kl_coef, str kl_kind, float clamp_in, float clamp_out, float score_clip, bool after_last, "
    "float gamma, float lam, bool decay_gaps, bool whiten, bool unbiased, bool floor_variance"
)


def _like(x: Tensor | None, values: Tensor) -> Tensor:
    return values.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


_advantages_backward = Op(
    "advantages_backward",
    "(Tensor grad_advantages, Tensor grad_returns, Tensor grad_rewards, Tensor grad_kl, Tensor scores, Tensor values, "
    "Tensor mask, Tensor? logprobs, Tensor? ref_logprobs, Tensor? bootstrap, Tensor? cu_seqlens, "
    f"{_REST}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=lambda _a, _r, _w, _k, scores, values, mask, logprobs, ref_logprobs, bootstrap, *_: tuple(
        _like(x, values) for x in (scores, values, logprobs, ref_logprobs, bootstrap)
    ),
    backends=[
        cuda("advantages", "backward", no_doubles),
        triton("advantages", "backward", no_doubles),
        cpp(_backward_cpp),
    ],
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]


def _backward(ctx, *grads):  # type: ignore[no-untyped-def]
    scores, values, *others = _advantages_backward(*grads, *ctx.saved_tensors, *ctx.rest)
    _, _, _, logprobs, ref_logprobs, bootstrap, _ = ctx.saved_tensors
    optional = [None if x is None else g for x, g in zip((logprobs, ref_logprobs, bootstrap), others, strict=True)]
    return scores, values, None, *optional, None, *[None] * len(ctx.rest)


_advantages = Op(
    "advantages",
    "(Tensor scores, Tensor values, Tensor mask, Tensor? logprobs, Tensor? ref_logprobs, Tensor? bootstrap, "
    f"Tensor? cu_seqlens, {_REST}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=lambda scores, values, *_: tuple(_like(values, values) for _ in range(4)),
    backends=[cuda("advantages", "forward", no_doubles), triton("advantages", "forward", no_doubles), cpp(_forward)],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0, 1, 3, 4, 5),
)
