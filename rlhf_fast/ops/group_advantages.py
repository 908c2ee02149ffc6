"""Advantages relative to the other answers to the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._native import kernel
from rlhf_fast._op import Op, cpp, cuda, no_doubles, reference_backward, triton
from rlhf_fast.reference.group_advantages import KINDS
from rlhf_fast.reference.group_advantages import group_advantages as reference


def group_advantages(
    scores: Tensor,
    group_ids: Tensor,
    kind: str = "grpo",
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    greedy_scores: Tensor | None = None,
    unbiased: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """One advantage per sample from the scores of its group.

    The formula and the paper of each kind are in FORMULAS. lite_ppo and gpg are plain PyTorch on dr_grpo; they and reinforce++ are
    scaled by the samples of the whole call, the other kinds by their group alone.
    A group of one and a group whose scores are equal carry no signal and give 0; remax compares with the greedy answer
    instead of the group.

    Args:
        scores: (...) one reward per sample.
        group_ids: like scores, any integers in any order.
        kind: one of FORMULAS.
        mask: like scores, False = sample to leave out (its score is never read; it gives 0).
        lengths: like scores, response lengths in tokens; for opo.
        greedy_scores: like scores, reward of the greedy answer to the same prompt; for remax. A constant.
        unbiased: std over n - 1 (verl, TRL) or n; for grpo and lite_ppo.
        eps: > 0, added to the std; for grpo and lite_ppo.

    Returns:
        Like scores, fp32 (fp64 for fp64); differentiable towards scores.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, kind or range; names the argument.
    """
    op = "group_advantages"
    if type(scores) is not Tensor or scores.dtype not in _check.FLOATS:
        _check.floating(op, "scores", scores)
    _check.integer(op, "group_ids", group_ids)
    if group_ids.shape != scores.shape:
        _check.shape(op, "group_ids", group_ids, scores.shape, "scores")
    if group_ids.device != scores.device:
        _check.device(op, "group_ids", group_ids, scores, "scores")
    _check.choice(op, "kind", kind, tuple(FORMULAS))
    if mask is not None:
        mask = _check.mask_like(op, mask, scores, "scores")
    eps = _check.number(op, "eps", eps, 0.0, open_low=True)
    lengths = _lengths(lengths, scores) if kind == "opo" else None
    if kind == "remax":
        _check.like(op, "greedy_scores", greedy_scores, scores, "scores")
        greedy_scores = greedy_scores.detach()  # type: ignore[union-attr]
    else:
        greedy_scores = None
    if scores.dtype is not torch.float32 or greedy_scores is not None or not scores.is_contiguous():
        scores, greedy_scores = _check.common_wide(scores, greedy_scores)  # type: ignore[assignment]
    if group_ids.dtype is not torch.int64 or not group_ids.is_contiguous():
        group_ids = group_ids.long().contiguous()
    shape = scores.shape
    if kind in COMPOSED:
        return COMPOSED[kind](scores, group_ids, mask, bool(unbiased), eps)
    if len(shape) == 1:
        return _group_advantages(scores, group_ids, mask, lengths, greedy_scores, kind, bool(unbiased), eps)
    flat = [None if x is None else x.reshape(-1) for x in (scores, group_ids, mask, lengths, greedy_scores)]
    return _group_advantages(*flat, kind, bool(unbiased), eps).view(shape)


def _lite_ppo(scores: Tensor, group_ids: Tensor, mask: Tensor | None, unbiased: bool, eps: float) -> Tensor:
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    count = real.sum()
    mean = scores.where(real, 0.0).sum() / count.clamp(min=1)
    variance = (scores - mean).where(real, 0.0).square().sum() / (count - int(unbiased)).clamp(min=1)
    varies = variance > 0  # sqrt has no derivative at 0
    std = variance.where(varies, 1.0).sqrt()
    return group_advantages(scores, group_ids, "dr_grpo", mask=mask) / (std + eps)


def _gpg(scores: Tensor, group_ids: Tensor, mask: Tensor | None, unbiased: bool, eps: float) -> Tensor:
    centred = group_advantages(scores, group_ids, "dr_grpo", mask=mask)
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    ids, index = torch.unique(group_ids, return_inverse=True)
    index = index.reshape(-1)
    # Groups of equal scores are exact zeros; a sample at the mean of a group that varies is not told apart by its own.
    varies = (
        centred.detach().new_zeros(len(ids)).scatter_reduce(0, index, centred.detach().abs().reshape(-1), "amax") > 0
    )
    signal = (varies[index].view(scores.shape) & real).sum()
    return centred * (real.sum() / signal.clamp(min=1))


COMPOSED = {"lite_ppo": _lite_ppo, "gpg": _gpg}
"""Kinds that are no kernels."""

FORMULAS: dict[str, tuple[str, str]] = {
    "grpo": ("(r - mean) / (std + eps)", "Shao et al. 2024, arXiv 2402.03300"),
    "dr_grpo": ("r - mean", "Liu et al. 2025, arXiv 2503.20783"),
    "rloo": ("r - mean of the others", "Ahmadian et al. 2024, arXiv 2402.14740"),
    "reinforce++": ("r - mean, whitened over the batch", "Hu et al. 2025, arXiv 2501.03262 (with baseline)"),
    "opo": ("r - sum(length r) / sum(length)", "Hao et al. 2025, arXiv 2505.23585"),
    "remax": ("r - score of the greedy answer", "Li et al. 2023, arXiv 2310.10505"),
    "pass@k": (
        "best - second best for the best sample, 0 for the others",
        "Tang et al. 2025, arXiv 2503.19595 (verl can also divide by the std)",
    ),
    "lite_ppo": ("(r - mean) / (std of the batch + eps)", "Liu et al. 2025, arXiv 2508.08221"),
    "gpg": (
        "(r - mean) B / (B - M), M of the B samples in groups of equal scores",
        "Chu et al. 2025, arXiv 2504.02546, F_norm 1 (verl counts the scores of 0 for M)",
    ),
}
"""{kind: (advantage of a sample, source)}; mean and std are those of its group."""


def _lengths(lengths: Tensor | None, scores: Tensor) -> Tensor:
    _check.integer("group_advantages", "lengths", lengths)
    _check.shape("group_advantages", "lengths", lengths, scores.shape, "scores")  # type: ignore[arg-type]
    _check.device("group_advantages", "lengths", lengths, scores, "scores")  # type: ignore[arg-type]
    return lengths.long().contiguous()  # type: ignore[union-attr]


def _run(grad, scores, group_ids, mask, lengths, greedy_scores, kind, unbiased, eps):  # type: ignore[no-untyped-def]
    """The kernel serves both directions: advantages without `grad`, the gradient of the scores with it."""
    out = torch.empty_like(scores)
    n = out.shape[0]
    slots = 1 << max(1, (2 * n - 1).bit_length())  # a hash table of group ids, at most half full
    scratch = torch.empty(slots + 6 * n, dtype=torch.int64)
    kernel("group_advantages")(
        grad,
        scores,
        group_ids,
        mask,
        lengths,
        greedy_scores,
        out,
        scratch,
        n,
        slots,
        KINDS.index(kind),
        unbiased,
        eps,
        out.dtype is torch.float64,
    )
    return out


def _forward(*args):  # type: ignore[no-untyped-def]
    return _run(None, *args)


def _backward_cpp(grad, scores, group_ids, mask, lengths, kind, unbiased, eps):  # type: ignore[no-untyped-def]
    return _run(grad.contiguous(), scores, group_ids, mask, lengths, None, kind, unbiased, eps)


def _backward_reference(grad, scores, group_ids, mask, lengths, kind, unbiased, eps):  # type: ignore[no-untyped-def]
    greedy = torch.zeros_like(scores)  # shifts the result, not the gradient
    return reference_backward(
        reference, (scores, group_ids, mask, lengths, greedy, kind, unbiased, eps), (0,), (grad,)
    )[0]


_group_advantages_backward = Op(
    "group_advantages_backward",
    "(Tensor grad, Tensor scores, Tensor group_ids, Tensor? mask, Tensor? lengths, str kind, bool unbiased, float eps) "
    "-> Tensor",
    reference=_backward_reference,
    fake=lambda grad, scores, *_: torch.empty_like(scores, memory_format=torch.contiguous_format),
    backends=[
        cuda("group_advantages", "backward", no_doubles),
        triton("group_advantages", "backward", no_doubles),
        cpp(_backward_cpp),
    ],
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    scores, group_ids, mask, lengths, _, *ctx.rest = inputs
    ctx.save_for_backward(scores, group_ids, mask, lengths)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return _group_advantages_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 7


_group_advantages = Op(
    "group_advantages",
    "(Tensor scores, Tensor group_ids, Tensor? mask, Tensor? lengths, Tensor? greedy_scores, str kind, bool unbiased, "
    "float eps) -> Tensor",
    reference=reference,
    fake=lambda scores, *_: torch.empty_like(scores, memory_format=torch.contiguous_format),
    backends=[
        cuda("group_advantages", "forward", no_doubles),
        triton("group_advantages", "forward", no_doubles),
        cpp(_forward),
    ],
    setup_context=_setup,
    backward=_backward,
    differentiable=(0,),
)
