"""The reference cell of losses that compute their gradients in the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast._op import grad_inside_op


def with_gradients(reference: Callable[..., Any], wanted: Sequence[int]) -> Callable[..., Any]:
    """The reference cell of a loss whose forward also returns its gradients: (loss, stats, gradients).

    gradients stacks those of the inputs i in `wanted` that are tensors, in that order; empty when the last argument, which is
    not passed on, says that none is asked for. Called with grad mode on (eager, plain tensors), autograd follows the reference
    itself.
    """

    def cell(*args: Any) -> Any:
        *inputs, gradients = args
        if not gradients or torch.is_grad_enabled():
            return (*reference(*inputs), inputs[0].new_empty(0))
        loss, stats, found = differentiated(reference, inputs, [i for i in wanted if inputs[i] is not None])
        return loss, stats, torch.stack(found)

    return cell


def differentiated(
    reference: Callable[..., Any], inputs: Sequence[Any], wanted: Sequence[int]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(loss, stats) of the reference, and the gradients of the loss towards inputs[i], i in wanted, by autograd."""
    leaves = list(inputs)
    with grad_inside_op():
        for i in wanted:
            leaves[i] = inputs[i].detach().requires_grad_()
        loss, stats = reference(*leaves)
        found = torch.autograd.grad(loss, [leaves[i] for i in wanted], allow_unused=True, materialize_grads=True)
    return loss.detach(), stats, found
