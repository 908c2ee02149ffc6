"""Losses whose forward returns a gradient for each of some inputs, of its own shape: the backward scales what was kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_fast._op import last_use
from rlhf_fast.reference._gradients import differentiated


def scaling(places: Sequence[int]) -> dict[str, Any]:
    """Keywords of Op for a schema that ends in `bool[] wanted`, one for each of the inputs `places`, and that returns
    (loss, statistics, a gradient for each of them)."""

    def setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, *others = output
        grads = [g for g, want in zip(output[2:], inputs[-1], strict=True) if want]
        ctx.mark_non_differentiable(*(t for t in others if t is not None))
        ctx.save_for_backward(*grads)
        ctx.targets = [(i, inputs[i].dtype) for i, want in zip(places, inputs[-1], strict=True) if want]
        ctx.inputs = len(inputs)
        ctx.set_materialize_grads(False)

    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        result: list[Any] = [None] * ctx.inputs
        if grad is None:
            return tuple(result)
        last = last_use(ctx, grad)
        whole = (
            last and grad.is_cpu and grad.item() == 1.0
        )  # of a loss that backward() is called on: nothing is left to do
        for (i, dtype), kept in zip(ctx.targets, ctx.saved_tensors, strict=True):
            result[i] = (kept if whole else kept.mul_(grad) if last else kept * grad).to(dtype)
        return tuple(result)

    return {"setup_context": setup, "backward": backward, "differentiable": tuple(places)}


def reference_cell(
    reference: Callable[..., Any],
    places: Sequence[int],
    passed: int,
    dtypes: Callable[[Sequence[Any]], Sequence[torch.dtype]],
) -> Callable[..., Any]:
    """The reference as a cell of such an op. The last `passed` arguments are not the reference's; `dtypes` are those of the
    gradients."""

    def cell(*args: Any) -> Any:
        inputs, wanted = args[:-passed], args[-1]
        targets = [i for i, want in zip(places, wanted, strict=True) if want]
        if not targets or torch.is_grad_enabled():  # autograd goes through the reference itself
            return (*reference(*inputs), *(inputs[0].new_empty(0) for _ in places))
        loss, stats, found = differentiated(reference, inputs, targets)
        each = iter(found)
        grads = (next(each).to(t) if want else None for want, t in zip(wanted, dtypes(inputs), strict=True))
        return loss, stats, *grads

    return cell
