"""AdamW of a run, on the device of its parameters or, with `optim.offload`, in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.model.offload import Block, Copies, copies_to
from rlhf_fast.settings.common import OptimConfig


def adamw(groups: Sequence[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) over groups with their parameters and peak rates, as the settings say."""
    options: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    device = groups[0]["params"][0].device
    if optim.offload and device.type != "cpu":
        return HostAdamW(groups, copies_to(device), **options)
    return torch.optim.AdamW(groups, **options)


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments and step are on the host, for parameters of another device (Ren et al. 2021, arXiv:2101.06840).

    A step copies parameters and gradients to the host, runs PyTorch's fused AdamW there and copies the parameters back. Parameters are
    copied both ways because they are changed elsewhere too, by a resume or an adapter that is loaded: what is on the device counts.
    They are those of adapters, small beside the base. `param_groups` and `state` are of the copies on the host, in the same order.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], copies: Copies, **options: Any) -> None:
        self.copies = copies
        self.there: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.here = [nn.Parameter(x) for x in self._on_host()]
        self._gradients = self._on_host()
        own = dict(zip(map(id, self.there), self.here, strict=True))
        groups = [{**group, "params": [own[id(p)] for p in group["params"]]} for group in groups]
        super().__init__(groups, **options, fused=True)

    def _on_host(self) -> list[Tensor]:
        """A tensor for each parameter, with no values yet."""
        block = Block(self.there)
        host = self.copies.host(block.size)
        each = zip(self.there, block.starts, strict=True)
        return [host[start : start + p.nbytes].view(p.dtype).view(p.shape) for p, start in each]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients of the parameters on the device; those without one stay."""
        changed = []
        for p, own, gradient in zip(self.there, self.here, self._gradients, strict=True):
            own.grad = None
            if p.grad is not None:
                self.copies.fetch(own, p)
                self.copies.fetch(gradient, p.grad)
                own.grad = gradient
                changed.append((p, own))
        self.copies.finish()
        super().step(closure)
        for p, own in changed:
            self.copies.put(own, p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients on the device."""
        for p in self.there:
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()
