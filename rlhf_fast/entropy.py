"""Entropy of the policy: which tokens to learn from, which to hold back, and how strong a bonus should be.

Quantiles and covariances look across the batch, so they are taken once, over the whole batch of an optimiser step and all of its
ranks, before it is split; the losses of the parts then read the masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast.ops.ppo_loss import token_advantages

COVARIANCE_KINDS = ("clip_cov", "kl_cov")


@torch.no_grad()
def top_entropy_mask(
    entropy: Tensor, mask: Tensor, *, fraction: float = 0.2, process_group: object | None = None
) -> Tensor:
    """Real tokens with an entropy in the top `fraction` (Wang et al. 2025, "Beyond the 80/20 rule", arXiv 2506.01939).

    The threshold is the (1 - fraction) quantile of the real tokens, interpolated as torch.quantile does (for any number of
    tokens); a token at the threshold stays. As a factor of importance_weights the mask leaves the denominators and the
    sequence ratios of the loss as they are (TRL's form); as the loss's mask it does not.

    Args:
        entropy: (...), in nats, of the policy at every position.
        mask: like entropy, True = real token. Masked tokens are never read.
        fraction: in [0, 1]; 0 keeps the highest alone.
        process_group: ranks whose tokens count for the quantile; every rank calls with its own.

    Returns:
        bool, like entropy.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; names the argument.
    """
    op = "top_entropy_mask"
    fraction = _check.number(op, "fraction", fraction, 0.0, 1.0)
    _check.floating(op, "entropy", entropy)
    _check.boolean(op, "mask", mask)
    mask = _check.mask_like(op, mask, entropy, "entropy")  # type: ignore[assignment]
    wide = _check.wide(entropy)
    ordered = _gather(wide[mask], process_group)[0].sort().values
    if not len(ordered):
        return mask.clone()
    position = (1 - fraction) * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    threshold = torch.lerp(ordered[below].double(), ordered[above].double(), position - below).to(wide.dtype)
    return mask & (wide >= threshold)


@torch.no_grad()
def covariance_mask(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kind: str,
    fraction: float = 2e-4,
    bounds: tuple[float, float] = (1.0, 5.0),
    generator: torch.Generator | None = None,
    process_group: object | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The few tokens that cost the most entropy: `selected` of the recipes clip_cov and kl_cov (Cui et al. 2025, arXiv 2505.22617).

    With cov = (A - mean A)(logp - mean logp) over the real tokens and n = max(1, floor(fraction x real tokens)): clip_cov draws n
    tokens at random among those with low < cov < high; kl_cov takes the n with the largest cov (all that tie with the last).

    Args:
        logprobs: (B, T) of the sampled tokens, in nats; (N,) with cu_seqlens. The log-probs of before the update do, and are
            known for the whole batch when it starts.
        advantages: like logprobs, or one per sequence.
        mask: like logprobs, True = real token. Masked tokens are never read.
        kind: "clip_cov" or "kl_cov".
        fraction: in (0, 1].
        bounds: (low, high) of cov for clip_cov.
        generator: of the draw of clip_cov; None = PyTorch's own for the device.
        process_group: ranks whose tokens count; every rank calls with its own.
        cu_seqlens: (S+1,) boundaries of packed sequences, for one advantage per sequence.

    Returns:
        bool, like logprobs.

    Raises:
        TypeError, ValueError: wrong kind, dtype, shape, device or range; names the argument.
    """
    op = "covariance_mask"
    _check.choice(op, "kind", kind, COVARIANCE_KINDS)
    fraction = _check.number(op, "fraction", fraction, 0.0, 1.0, open_low=True)
    low, high = (_check.number(op, "bounds", x) for x in bounds)
    _check.floating(op, "logprobs", logprobs)
    _check.boolean(op, "mask", mask)
    mask = _check.mask_like(op, mask, logprobs, "logprobs")  # type: ignore[assignment]
    if cu_seqlens is not None:
        cu_seqlens = _check.cu_seqlens(op, cu_seqlens, logprobs.numel(), logprobs)
    _check.floating(op, "advantages", advantages)
    advantages = token_advantages(advantages, logprobs, cu_seqlens)
    _check.like(op, "advantages", advantages, logprobs, "logprobs")
    new, A = _check.common_wide(logprobs, advantages)
    place = mask.device if generator is None else generator.device
    draw = torch.rand(mask.shape, generator=generator, device=place, dtype=torch.float64).to(mask.device)
    columns = torch.stack([x[mask].double() for x in (new, A, draw)])  # type: ignore[index]
    (every, start), own = _gather(columns, process_group), columns.shape[-1]
    selected = torch.zeros_like(mask)
    total = every.shape[-1]
    if not total:
        return selected
    n = max(1, math.floor(fraction * total))
    logps, advs, draws = every
    covariance = (advs - advs.mean()) * (logps - logps.mean())
    if kind == "kl_cov":
        chosen = covariance >= covariance.topk(n).values[-1]
    else:
        order = draws.where((covariance > low) & (covariance < high), math.inf)
        last = order.topk(n, largest=False).values[-1]
        chosen = (order <= last) & order.isfinite()
    selected[mask] = chosen[start : start + own]
    return selected


def _gather(x: Tensor, group: object | None) -> tuple[Tensor, int]:
    """(`x` of all ranks in a row along the last dimension, where the own part starts)."""
    if group is None:
        return x, 0
    import torch.distributed as dist  # not every build of PyTorch has it

    sizes = [0] * dist.get_world_size(group)  # type: ignore[arg-type]
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in sizes]
    dist.all_gather(counts, torch.tensor([x.shape[-1]], device=x.device), group=group)  # type: ignore[arg-type]
    sizes = [int(c) for c in counts]
    padded = x.new_zeros((*x.shape[:-1], max(sizes)))
    padded[..., : x.shape[-1]] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)  # type: ignore[arg-type]
    own = dist.get_rank(group)  # type: ignore[arg-type]
    return torch.cat([p[..., :n] for p, n in zip(parts, sizes, strict=True)], dim=-1), sum(sizes[:own])


class EntropyController:
    """Coefficient of the entropy bonus, steered towards a target (Skywork-OR1, arXiv 2505.22312, section 3.3).

    After every optimiser step the coefficient rises by `step` where the entropy of the policy is at or below the target, and falls
    by it otherwise; it is applied only while the last entropy is at or below the target.
    """

    def __init__(
        self, target: float, *, coef: float = 0.01, step: float = 0.005, low: float = 0.0, high: float = 1.0
    ) -> None:
        """target: mean entropy per token, in nats; coef: where it starts; low, high: its bounds."""
        op = "EntropyController"
        self.target = _check.number(op, "target", target, 0.0)
        self.step = _check.number(op, "step", step, 0.0)
        self.low = _check.number(op, "low", low, 0.0)
        self.high = _check.number(op, "high", high, self.low)
        self._coef = _check.number(op, "coef", coef, self.low, self.high)
        self._entropy = math.inf

    @property
    def coef(self) -> float:
        """`entropy_coef` of the next step; 0 before the first measurement and while the entropy is above the target."""
        return self._coef if self._entropy <= self.target else 0.0

    def update(self, entropy: float) -> None:
        """Take in the mean entropy per token (nats) of a whole step. A number that is not finite changes nothing."""
        if math.isfinite(entropy):
            self._entropy = entropy
            change = self.step if entropy <= self.target else -self.step
            self._coef = min(max(self._coef + change, self.low), self.high)

    def get(self) -> list[float]:
        """State, for a checkpoint."""
        return [self._coef, self._entropy]

    def put(self, state: list[float]) -> None:
        """State from a checkpoint."""
        self._coef, self._entropy = state
