"""The PPO loss with every gradient and every statistic in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check
from rlhf_fast._native import kernel
from rlhf_fast._op import Op, cpp, cuda, no_doubles, triton
from rlhf_fast._types import LossOutput, Stats
from rlhf_fast.dialects import dialect as dialect_of
from rlhf_fast.ops.kl_estimate import ALL_KINDS, KINDS
from rlhf_fast.reference._gradients import with_gradients
from rlhf_fast.reference._reduce import REDUCTIONS
from rlhf_fast.reference.ppo_loss import LEVELS, STATS, SURROGATES
from rlhf_fast.reference.ppo_loss import ppo_loss as reference

OP = "ppo_loss"


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float | tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
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
) -> LossOutput:
    """loss = policy + value_coef value - entropy_coef entropy + kl_coef kl (Schulman et al. 2017, arXiv 1707.06347, eq. 7, 9).

    policy: max(-A rho, -A clip(rho, 1 - low, 1 + high)) times the importance weight, rho = exp(logprobs - old_logprobs) with
    the log-ratio clamped to +-20 (counted; the gradient beyond is 0); with dual_clip c, min(that, -c A) where A < 0 (Ye et
    al. 2020, 1912.09729, eq. 5). value: max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2) / 2. kl: `kl_estimate`.
    Gradients come from the same pass; backward only scales them.

    Args:
        logprobs: (B, T) of the sampled tokens under the policy, in nats; (...) for token reductions; (N,) with cu_seqlens.
        old_logprobs: like logprobs, of the policy that sampled.
        advantages: like logprobs, or one per sequence: logprobs.shape[:-1] ((S,) with cu_seqlens).
        mask: like logprobs, True = real token. Masked tokens are never read; gradient 0.
        clip: (low, high), or one number for both; low in (0, 1], high > 0.
        dual_clip: c > 1, or None (the dialect's: "verl" always uses 3, "roll_dual_clip_loss" 1 + 2 clip).
        entropy: like logprobs, per token; entropy_coef >= 0.
        ref_logprobs: like logprobs; adds the KL term with kl_coef >= 0 and kl_kind, bounded as the dialect says.
        values, returns: like logprobs; both add the value loss with value_coef >= 0. values are the current predictions.
        old_values: like logprobs; needed for value clipping. value_clip: > 0, or None for none.
        importance_weights: like logprobs, factor of the policy term (rollout correction).
        reduction: "token-mean"; "token-sum"; "seq-mean-token-mean"; "seq-mean-token-sum". Sequences without a real token
            do not count.
        normalizer: > 0, replaces the denominator (tokens for token-*, sequences for seq-*): micro-batches that share the
            normalizer of the whole batch add up to its loss and gradient. A float or a 0-d tensor.
        dialect: row of rlhf_fast.dialects.DIALECTS; sets the clamp of the log-ratio, the bounds of the KL term and a dual
            clip that is always on.
        cu_seqlens: (S+1,) boundaries of packed sequences.

    Returns:
        LossOutput(loss, stats): a scalar, fp32 (fp64 when an input is fp64), differentiable towards logprobs, entropy and
        values, every other input being a constant; and the statistics named in rlhf_fast.reference.ppo_loss.STATS.
        Without a real token the loss, its gradients and the statistics are 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range, or a coefficient without its tensor; names the argument.
    """
    inputs = arguments(
        OP, "logprobs", logprobs, old_logprobs, advantages, mask, clip, dual_clip, entropy, entropy_coef, ref_logprobs,
        kl_coef, kl_kind, values, old_values, returns, value_clip, value_coef, importance_weights, reduction, normalizer,
        dialect, cu_seqlens,
    )  # fmt: skip
    return loss_output(inputs)


PPO = ("token", "clip")
"""(level, surrogate) of the loss that gave the op its name."""


def loss_output(inputs, level: str = PPO[0], surrogate: str = PPO[1]) -> LossOutput:  # type: ignore[no-untyped-def]
    """The loss of checked `arguments`, with a level and a surrogate that the kernels know."""
    gradients = torch.is_grad_enabled() and _wants(inputs[0], inputs[4], inputs[6])
    loss, stats, *_ = _ppo_loss(*inputs, level, surrogate, gradients)
    return LossOutput(loss, Stats(stats, STATS))


def arguments(
    op, name, logprobs, old_logprobs, advantages, mask, clip, dual_clip, entropy, entropy_coef, ref_logprobs, kl_coef,
    kl_kind, values, old_values, returns, value_clip, value_coef, importance_weights, reduction, normalizer, dialect,
    cu_seqlens,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Checked arguments of `ppo_loss` as its schema has them, without the last three; `name` is what `op` calls the log-probs."""
    rules = dialect_of(op, dialect)
    if type(logprobs) is not Tensor or logprobs.dtype not in _check.FLOATS:
        _check.floating(op, name, logprobs)
    if mask is None:
        raise _check.error(TypeError, op, "mask", None, "a torch.Tensor")
    mask = _check.mask_like(op, mask, logprobs, name)  # type: ignore[assignment]
    if cu_seqlens is not None:
        if logprobs.dim() != 1:
            raise _check.error(ValueError, op, name, f"shape {tuple(logprobs.shape)}", "(N,) with cu_seqlens")
        cu_seqlens = _check.cu_seqlens(op, cu_seqlens, logprobs.shape[0], logprobs)
    if cu_seqlens is not None or not isinstance(advantages, Tensor) or advantages.dim() != logprobs.dim():
        advantages = token_advantages(advantages, logprobs, cu_seqlens)
    checked: dict[str, object] = {"old_logprobs": old_logprobs, "advantages": advantages}
    if entropy is not None:
        checked["entropy"] = entropy
    elif entropy_coef:
        raise _check.error(ValueError, op, "entropy", None, f"a tensor with entropy_coef={entropy_coef}")
    if ref_logprobs is not None:
        checked["ref_logprobs"] = ref_logprobs
    elif kl_coef:
        raise _check.error(ValueError, op, "ref_logprobs", None, f"a tensor with kl_coef={kl_coef}")
    if values is not None or returns is not None:
        checked["values"], checked["returns"] = values, returns
        if old_values is not None:
            checked["old_values"] = old_values
    elif old_values is not None:
        raise _check.error(ValueError, op, "values", None, "a tensor with old_values")
    if importance_weights is not None:
        checked["importance_weights"] = importance_weights
    ready = _check.alike(op, logprobs, name, checked)
    low, high = clip if clip == (0.2, 0.2) else clip_range(op, clip)
    dual = (
        rules.dual_bound(op, low, high)
        if dual_clip is None
        else _check.number(op, "dual_clip", dual_clip, 1.0, open_low=True)
    )
    entropy_coef = _check.number(op, "entropy_coef", entropy_coef, 0.0)
    kl_coef = _check.number(op, "kl_coef", kl_coef, 0.0)
    _check.choice(op, "kl_kind", kl_kind, ALL_KINDS)
    value_coef = _check.number(op, "value_coef", value_coef, 0.0) * rules.value_scale
    if value_clip is None:
        old_values = None
    else:
        value_clip = _check.number(op, "value_clip", value_clip, 0.0, open_low=True)
    _check.choice(op, "reduction", reduction, REDUCTIONS)
    if logprobs.dim() == 0 or (cu_seqlens is None and logprobs.dim() == 1 and reduction.startswith("seq")):
        raise _check.error(
            ValueError, op, name, f"shape {tuple(logprobs.shape)}", f"(B, T) or cu_seqlens for {reduction}"
        )
    divisor = 0.0
    if normalizer is not None and not isinstance(normalizer, Tensor):
        divisor, normalizer = _check.number(op, "normalizer", normalizer, 0.0, open_low=True), None
    tensors = (
        logprobs,
        old_logprobs,
        advantages,
        entropy,
        ref_logprobs,
        values,
        old_values,
        returns,
        importance_weights,
    )
    if not ready:
        tensors = _check.common_wide(*tensors)  # type: ignore[assignment]
    logprobs, old_logprobs, advantages, *rest = tensors
    if normalizer is not None:
        normalizer = scalar(op, normalizer, logprobs)
    return (
        logprobs, old_logprobs, advantages, mask, *rest, normalizer, cu_seqlens, low, high,
        math.inf if dual is None else dual, math.inf if rules.ratio_clamp is None else rules.ratio_clamp,
        entropy_coef, kl_coef, kl_kind, *rules.kl_bounds(kl_kind), 0.0 if value_clip is None else value_clip, value_coef,
        reduction, divisor,
    )  # fmt: skip


def _wants(logprobs: Tensor, entropy: Tensor | None, values: Tensor | None) -> bool:
    """Whether any of the differentiable inputs asks for a gradient."""
    return (
        logprobs.requires_grad
        or (entropy is not None and entropy.requires_grad)
        or (values is not None and values.requires_grad)
    )


def token_advantages(advantages: Tensor, logprobs: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Token advantages; one advantage per sequence is repeated over its tokens."""
    if isinstance(advantages, Tensor) and advantages.shape != logprobs.shape:
        if cu_seqlens is not None and advantages.shape == (cu_seqlens.shape[0] - 1,):
            advantages = advantages.repeat_interleave(cu_seqlens[1:] - cu_seqlens[:-1], output_size=logprobs.shape[0])
        elif cu_seqlens is None and logprobs.dim() and advantages.shape == logprobs.shape[:-1]:
            advantages = advantages.unsqueeze(-1).expand(logprobs.shape)
    return advantages


def clip_range(op: str, clip: float | tuple[float, float]) -> tuple[float, float]:
    """Checked (low, high) of a ratio clip."""
    pair = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    if len(pair) != 2:
        raise _check.error(ValueError, op, "clip", repr(clip), "a number or a pair (low, high)")
    low = _check.number(op, "clip", pair[0], 0.0, 1.0, open_low=True)
    return low, _check.number(op, "clip", pair[1], 0.0, open_low=True)


def scalar(op: str, normalizer: Tensor, like: Tensor) -> Tensor:
    """Checked 0-d normalizer in the dtype of `like`."""
    if normalizer.dim() != 0:
        raise _check.error(ValueError, op, "normalizer", f"shape {tuple(normalizer.shape)}", "a number or a 0-d tensor")
    _check.device(op, "normalizer", normalizer, like, "logprobs")
    return normalizer.detach().to(like.dtype)


def _rows(logprobs: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(rows, length) of padded input, (sequences, 0) of packed input."""
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1, 0
    length = logprobs.shape[-1]
    return (logprobs.numel() // length if length else 0), length


def forward(
    logprobs, old_logprobs, advantages, mask, entropy, ref_logprobs, values, old_values, returns, importance_weights,
    normalizer, cu_seqlens, low, high, dual, clamp, bonus, kl_coef, kl_kind, kl_in, kl_out, value_clip, value_coef,
    reduction, divisor, level, surrogate, gradients,
):  # type: ignore[no-untyped-def]  # fmt: skip
    dtype = logprobs.dtype
    scalar_like, stats_like = _TEMPLATES[dtype]
    loss, stats = torch.empty_like(scalar_like), torch.empty_like(stats_like)
    grads = d_logprobs = d_entropy = d_values = None
    if gradients:
        given = [x is not None for x in (logprobs, entropy, values)]
        grads = _buffers.empty((sum(given), *logprobs.shape), dtype)
        each = iter(grads.unbind())
        d_logprobs, d_entropy, d_values = (next(each) if wanted else None for wanted in given)
    rows, length = _rows(logprobs, cu_seqlens)
    ratios = torch.empty(rows, 3, dtype=torch.float64) if level != "token" else None
    by_length = reduction == "seq-mean-token-mean" or ratios is not None
    lengths = torch.empty(rows, dtype=torch.int64) if by_length else None
    kernel(OP)(
        logprobs, old_logprobs, advantages, mask, entropy, ref_logprobs, values, old_values, returns, importance_weights,
        normalizer, cu_seqlens, loss, stats, d_logprobs, d_entropy, d_values, lengths, ratios, rows, length,
        logprobs.numel(), LEVELS.index(level), SURROGATES.index(surrogate), low, high, dual, clamp, bonus, kl_coef, ALL_KINDS.index(kl_kind) % len(KINDS), kl_kind[-1] == "+", kl_in, kl_out,
        value_clip, value_coef, REDUCTIONS.index(reduction), divisor, dtype is torch.float64, torch.get_num_threads(),
    )  # fmt: skip
    return loss, stats, grads


# empty_like of these costs half of new_empty.
_TEMPLATES = {d: [torch.empty(n, dtype=d) for n in ((), len(STATS))] for d in (torch.float32, torch.float64)}
_GRADIENTS = (0, 4, 6)
"""Inputs that get a gradient: logprobs, entropy, values."""


def _given(inputs):  # type: ignore[no-untyped-def]
    """Those of them that are there; the order of the stacked gradients."""
    return [i for i in _GRADIENTS if inputs[i] is not None]


def _declined(*args):  # type: ignore[no-untyped-def]
    """`declines` of the CUDA kernel."""
    *_, level, surrogate, _ = args
    if level != "token" or surrogate not in ("clip", "cispo"):
        return f"{surrogate} at the level of the {level} is left to the next backend"
    return no_doubles(*args)


def _fake(*args):  # type: ignore[no-untyped-def]
    logprobs, gradients = args[0], args[-1]
    grads = logprobs.new_empty((len(_given(args)), *logprobs.shape) if gradients else 0)
    return logprobs.new_empty(()), logprobs.new_empty(len(STATS)), grads


_ppo_loss = Op(
    "ppo_loss",
    "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? entropy, Tensor? ref_logprobs, "
    "Tensor? values, Tensor? old_values, Tensor? returns, Tensor? importance_weights, Tensor? normalizer, "
    "Tensor? cu_seqlens, float clip_low, float clip_high, float dual_clip, float ratio_clamp, float entropy_coef, "
    "float kl_coef, str kl_kind, float kl_clamp_in, float kl_clamp_out, float value_clip, float value_coef, "
    "str reduction, float divisor, str level, str surrogate, bool gradients) -> (Tensor, Tensor, Tensor)",
    reference=with_gradients(reference, _GRADIENTS),
    fake=_fake,
    backends=[cuda("ppo_loss", "forward", _declined), triton("ppo_loss", declines=no_doubles), cpp(forward)],
    differentiable=_GRADIENTS,
    gradients_in_forward=True,
)
