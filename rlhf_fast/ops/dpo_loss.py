"""Direct preference losses from the log-probs of tokens, with every gradient in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check
from rlhf_fast._native import kernel
from rlhf_fast._op import Op, cpp, no_doubles, triton
from rlhf_fast._types import PreferenceOutput
from rlhf_fast.ops._kept_gradients import reference_cell, scaling
from rlhf_fast.ops.ppo_loss import scalar
from rlhf_fast.reference.dpo_loss import CURVES
from rlhf_fast.reference.dpo_loss import dpo_loss as reference

OP = "dpo_loss"


class Answers(NamedTuple):
    """Checked log-probs of the tokens of one answer of every pair."""

    logprobs: Tensor
    """(B, T), or (N,) with cu_seqlens."""
    ref_logprobs: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None

    @property
    def pairs(self) -> int:
        return _pairs(self.logprobs, self.cu_seqlens)


class Curve(NamedTuple):
    """The loss of a pair: a curve of reference CURVES at scale x gap - offset."""

    scale: float
    offset: float = 0.0
    name: str = "logistic"
    win: float = 1.0
    lose: float = 0.0


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor | None = None,
    ref_rejected_logprobs: Tensor | None = None,
    *,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    average: bool = False,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
) -> PreferenceOutput:
    """Mean over pairs of -(1 - e) log s(x) - e log s(-x), x = beta (gap of the chosen answer - gap of the rejected one).

    Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; e: Mitchell 2023 (ericmitchell.ai/cdpo.pdf) eq. 3. The gap of an answer is the
    sum over its real tokens of logprobs - ref_logprobs, in fp64. Sums, loss and gradients come from one pass over the tokens;
    backward only scales them. `preference_loss` has the other kinds, and runs the ones of this shape here.

    Args:
        chosen_logprobs, rejected_logprobs: (B, T) and (B, T') of the tokens under the policy, in nats; (N,) and (N',) with
            the cu_seqlens of that side.
        ref_chosen_logprobs, ref_rejected_logprobs: like them, under the reference, constants. None for both: the log-probs
            themselves are compared.
        chosen_mask, rejected_mask: like them, True = token of the answer; None = all. Masked tokens are never read; gradient 0.
        beta: > 0.
        label_smoothing: e in [0, 0.5), probability that the label is flipped.
        average: compare means over the real tokens (arXiv 2411.15124) instead of sums.
        mask: (B,) False = pair to leave out (never read, no gradient).
        weights: (B,) constant factors of the pairs' losses.
        normalizer: > 0, replaces the number of pairs: with that of the whole batch, micro-batches add up to it.
        chosen_cu_seqlens, rejected_cu_seqlens: (B+1,) boundaries of packed answers.

    Returns:
        PreferenceOutput(loss, chosen_rewards, rejected_rewards): a scalar, fp32 (fp64 when an input is fp64), differentiable
        towards chosen_logprobs and rejected_logprobs, 0 without pairs; and (B,) beta x gap, 0 where masked.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    beta = _check.number(OP, "beta", beta, 0.0, open_low=True)
    e = _check.number(OP, "label_smoothing", label_smoothing, 0.0, 0.5)
    if e == 0.5:
        raise _check.error(ValueError, OP, "label_smoothing", 0.5, "less than 0.5: labels that mean nothing")
    sides = (
        answers(OP, "chosen", chosen_logprobs, ref_chosen_logprobs, chosen_mask, chosen_cu_seqlens),
        answers(OP, "rejected", rejected_logprobs, ref_rejected_logprobs, rejected_mask, rejected_cu_seqlens),
    )
    return pair_loss(OP, *sides, mask, weights, normalizer, beta, Curve(beta, win=1 - e, lose=e), average)


def answers(
    op: str, side: str, logprobs: Tensor, ref: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Answers:
    """Checked log-probs of the tokens of the chosen or of the rejected answers."""
    name = f"{side}_logprobs"
    _check.floating(op, name, logprobs)
    if ref is not None:
        _check.like(op, f"ref_{name}", ref, logprobs, name)
    mask = _check.mask_like(op, mask, logprobs, name, f"{side}_mask")
    if cu_seqlens is not None:
        if logprobs.dim() != 1:
            raise _check.error(ValueError, op, name, f"shape {tuple(logprobs.shape)}", f"(N,) with {side}_cu_seqlens")
        cu_seqlens = _check.cu_seqlens(op, cu_seqlens, logprobs.shape[0], logprobs)
    elif logprobs.dim() != 2:
        raise _check.error(ValueError, op, name, f"shape {tuple(logprobs.shape)}", f"(B, T), or {side}_cu_seqlens")
    return Answers(logprobs, ref, mask, cu_seqlens)


def check_pairs(op: str, chosen: Answers, rejected: Answers) -> int:
    """The number of pairs; both sides hold as many answers, on one device, with a reference or without."""
    if chosen.pairs != rejected.pairs:
        raise _check.error(
            ValueError,
            op,
            "rejected_logprobs",
            f"{rejected.pairs} answers",
            f"{chosen.pairs}, one for each chosen answer",
        )
    _check.device(op, "rejected_logprobs", rejected.logprobs, chosen.logprobs, "chosen_logprobs")
    for side, other, x in (("chosen", "rejected", chosen), ("rejected", "chosen", rejected)):
        if x.ref_logprobs is None and (chosen if x is rejected else rejected).ref_logprobs is not None:
            raise _check.error(ValueError, op, f"ref_{side}_logprobs", None, f"a tensor with ref_{other}_logprobs")
    return chosen.pairs


def pair_loss(
    op: str, chosen: Answers, rejected: Answers, mask: Tensor | None, weights: Tensor | None,
    normalizer: Tensor | float | None, beta: float, curve: Curve, average: bool,
) -> PreferenceOutput:  # fmt: skip
    """The loss of checked answers; mask, weights and normalizer are checked here."""
    pairs = check_pairs(op, chosen, rejected)
    for name, x in (("mask", mask), ("weights", weights)):
        if x is not None:
            (_check.boolean if name == "mask" else _check.floating)(op, name, x)
            _check.shape(op, name, x, (pairs,), "the pairs")
            _check.device(op, name, x, chosen.logprobs, "chosen_logprobs")
    mask = None if mask is None else (mask if mask.dtype is torch.bool else mask != 0).contiguous()
    divisor = 0.0
    if normalizer is not None and not isinstance(normalizer, Tensor):
        divisor, normalizer = _check.number(op, "normalizer", normalizer, 0.0, open_low=True), None
    tensors = (chosen.logprobs, rejected.logprobs, chosen.ref_logprobs, rejected.ref_logprobs, weights)
    policy_chosen, policy_rejected, *constants, weights = _check.common_wide(*tensors)
    assert policy_chosen is not None and policy_rejected is not None
    if normalizer is not None:
        normalizer = scalar(op, normalizer, policy_chosen)
    grad = torch.is_grad_enabled()
    loss, rewards, *_ = _dpo_loss(
        policy_chosen, policy_rejected, *constants, chosen.mask, rejected.mask, mask, weights, normalizer,
        chosen.cu_seqlens, rejected.cu_seqlens, beta, *curve, average, divisor,
        [grad and policy_chosen.requires_grad, grad and policy_rejected.requires_grad],
    )  # fmt: skip
    return PreferenceOutput(loss, *rewards.unbind())


_PLACES = (0, 1)
"""Inputs that get a gradient: chosen, rejected."""


def _forward(
    chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, mask, weights, normalizer, chosen_cu_seqlens,
    rejected_cu_seqlens, beta, scale, offset, curve, win, lose, average, divisor, wanted,
):  # type: ignore[no-untyped-def]  # fmt: skip
    dtype = chosen.dtype
    pairs = _pairs(chosen, chosen_cu_seqlens)
    loss, rewards = torch.empty((), dtype=dtype), torch.empty(2, pairs, dtype=dtype)
    grads = [
        _buffers.empty(x.shape, dtype) if want else None for x, want in zip((chosen, rejected), wanted, strict=True)
    ]
    kernel(OP)(
        chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, mask, weights, normalizer,
        chosen_cu_seqlens, rejected_cu_seqlens, loss, rewards, *grads, torch.empty(2, pairs, 2, dtype=torch.float64), pairs,
        chosen.shape[-1], rejected.shape[-1], chosen.numel() + rejected.numel(), beta, scale, offset,
        list(CURVES).index(curve), win, lose, average, divisor, dtype is torch.float64, torch.get_num_threads(),
    )  # fmt: skip
    return loss, rewards, *grads


def _pairs(logprobs: Tensor, cu_seqlens: Tensor | None) -> int:
    return logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake(*args):  # type: ignore[no-untyped-def]
    chosen, rejected, wanted = args[0], args[1], args[-1]
    grads = (x.new_empty(x.shape if want else 0) for x, want in zip((chosen, rejected), wanted, strict=True))
    return chosen.new_empty(()), chosen.new_empty(2, _pairs(chosen, args[9])), *grads


_dpo_loss = Op(
    OP,
    "(Tensor chosen, Tensor rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? chosen_mask, Tensor? rejected_mask, "
    "Tensor? mask, Tensor? weights, Tensor? normalizer, Tensor? chosen_cu_seqlens, Tensor? rejected_cu_seqlens, float beta, "
    "float scale, float offset, str curve, float win, float lose, bool average, float divisor, bool[2] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_cell(reference, _PLACES, 1, lambda inputs: [inputs[0].dtype] * 2),
    fake=_fake,
    backends=[triton(OP, "forward", no_doubles), cpp(_forward)],
    **scaling(_PLACES),
)
