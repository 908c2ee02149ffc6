"""The loss of a reward model on pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast import _buffers, _check
from rlhf_fast._native import kernel
from rlhf_fast._op import Op, cpp, cuda, no_doubles, triton
from rlhf_fast._types import LossOutput, Stats
from rlhf_fast.ops.ppo_loss import scalar
from rlhf_fast.reference._gradients import with_gradients
from rlhf_fast.reference.reward_loss import STATS
from rlhf_fast.reference.reward_loss import reward_loss as reference


def reward_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | float | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> LossOutput:
    """Bradley-Terry: mean -log sigmoid(chosen - rejected - margin) + center_coef mean (chosen + rejected)^2.

    Ouyang et al. 2022 (arXiv 2203.02155) eq. 1; margin: Touvron et al. 2023 (2307.09288) eq. 2; centring: Eisenstein et al.
    2023 (2312.09244) eq. 4. Loss, both gradients and the statistics come from one pass.

    Args:
        chosen_scores, rejected_scores: (...) scores of the two answers of each pair.
        margin: like the scores, or one number: how much better the chosen one should be. A constant.
        center_coef: >= 0, pulls the scores towards mean 0.
        label_smoothing: in [0, 0.5), probability that a label is flipped.
        mask: like the scores, False = pair to leave out (never read, no gradient).
        normalizer: > 0, replaces the number of pairs under the loss: with that of the whole batch, micro-batches add up to its loss
            and gradient. A float or a 0-d tensor (`Denominators`); the statistics stay means over the pairs of the call.

    Returns:
        LossOutput(loss, stats); the loss is a scalar, fp32 (fp64 when an input is fp64), 0 without pairs; stats are
        accuracy (ties count 0.5), margin, chosen_score, rejected_score, center and pairs.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    op = "reward_loss"
    if type(chosen_scores) is not Tensor or chosen_scores.dtype not in _check.FLOATS:
        _check.floating(op, "chosen_scores", chosen_scores)
    ready = _check.alike(op, chosen_scores, "chosen_scores", {"rejected_scores": rejected_scores})
    if margin is not None:
        if isinstance(margin, Tensor):
            _check.like(op, "margin", margin, chosen_scores, "chosen_scores")
        else:
            margin = torch.full_like(chosen_scores, _check.number(op, "margin", margin))
        margin = margin.detach()
    if mask is not None:
        mask = _check.mask_like(op, mask, chosen_scores, "chosen_scores")
    center_coef = _check.number(op, "center_coef", center_coef, 0.0)
    if label_smoothing:
        label_smoothing = _check.number(op, "label_smoothing", label_smoothing, 0.0, 0.5)
        if label_smoothing == 0.5:
            raise _check.error(ValueError, op, "label_smoothing", 0.5, "less than 0.5: labels that mean nothing")
    if normalizer is not None and not isinstance(normalizer, Tensor):
        normalizer = _check.number(op, "normalizer", normalizer, 0.0, open_low=True)
    if not ready or margin is not None:
        chosen_scores, rejected_scores, margin = _check.common_wide(chosen_scores, rejected_scores, margin)  # type: ignore[assignment]
    if isinstance(normalizer, Tensor):
        normalizer = scalar(op, normalizer, chosen_scores)
    gradients = torch.is_grad_enabled() and (chosen_scores.requires_grad or rejected_scores.requires_grad)
    loss, stats, _ = _reward_loss(chosen_scores, rejected_scores, margin, mask, center_coef, label_smoothing, gradients)
    if normalizer is not None:
        pairs = stats[STATS.index("pairs")]
        loss = loss * (pairs / normalizer).where(pairs > 0, 0.0)  # without pairs a normalizer may be 0 too
    return LossOutput(loss, Stats(stats, STATS))


def _forward(chosen, rejected, margin, mask, center_coef, label_smoothing, gradients):  # type: ignore[no-untyped-def]
    loss, stats = map(torch.empty_like, _TEMPLATES[chosen.dtype])
    grads = _buffers.empty((2, *chosen.shape), chosen.dtype) if gradients else None
    kernel("reward_loss")(
        chosen,
        rejected,
        margin,
        mask,
        loss,
        stats,
        grads,
        chosen.numel(),
        center_coef,
        label_smoothing,
        chosen.dtype is torch.float64,
        torch.get_num_threads(),
    )
    return loss, stats, grads


# empty_like of these costs half of new_empty.
_TEMPLATES = {d: [torch.empty(n, dtype=d) for n in ((), len(STATS))] for d in (torch.float32, torch.float64)}


def _fake(chosen, rejected, margin, mask, center_coef, label_smoothing, gradients):  # type: ignore[no-untyped-def]
    grads = chosen.new_empty((2, *chosen.shape) if gradients else 0)
    return chosen.new_empty(()), chosen.new_empty(len(STATS)), grads


_reward_loss = Op(
    "reward_loss",
    "(Tensor chosen_scores, Tensor rejected_scores, Tensor? margin, Tensor? mask, float center_coef, "
    "float label_smoothing, bool gradients) -> (Tensor, Tensor, Tensor)",
    reference=with_gradients(reference, (0, 1)),
    fake=_fake,
    backends=[cuda("reward_loss", "forward", no_doubles), triton("reward_loss", "forward", no_doubles), cpp(_forward)],
    differentiable=(0, 1),
    gradients_in_forward=True,
)
