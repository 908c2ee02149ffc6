"""Token statistics of a vocabulary that lies in contiguous slices on the ranks of a process group (tensor parallelism).

Rank r computes on its slice alone, with the kernels of one device: L_r = logsumexp, H_r = entropy, KL_r and the token's log p_r
under its own softmax. With w_r = exp(L_r - L), the share of slice r in the whole softmax:

    L = log sum_r exp(L_r)                    log p[token] = log p_r[token] + L_r - L on the rank that holds the token
    H = sum_r w_r (H_r - log w_r)             KL = sum_r w_r (KL_r + log w_r - log v_r), v_r the share of the reference's slice

Every rank computes these sums from one all-gather of at most five numbers per token and rank. An all-reduce would add in an order
that depends on where in the buffer a token lies; this way a row has the same bits in any batch, and on every rank. The results
and the loss are the same everywhere, so each rank differentiates its own terms and nothing is exchanged on the way back (the
operators f and g of Megatron-LM, Shoeybi et al. 2019, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast import _check
from rlhf_fast._types import TokenStats


class Slice(NamedTuple):
    """What a rank computes on its slice of the vocabulary, of ids relative to its first class and a mask, each (...)."""

    classes: int
    statistics: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor | None]]
    """(logprobs, entropy, logsumexp, kl), each (...), differentiable; kl None without a reference."""
    excluded: Callable[[], Tensor | None]
    """(...) or 0-d: True where every class of the slice is at -inf, which the kernels take for an error. None: nowhere."""
    ref_logsumexp: Callable[[Tensor, Tensor | None], Tensor] | None = None
    """Of the reference's slice, a constant; None without a reference."""
    ref_excluded: Callable[[], Tensor | None] = lambda: None


def check_group(op: str, group: object) -> None:
    """`group` is a process group that this process belongs to."""
    import torch.distributed as dist  # not every build of PyTorch has it

    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:  # what a rank outside of a new group holds
        raise _check.error(ValueError, op, "process_group", "a group without this rank", "one that it belongs to")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        expected = "a torch.distributed.ProcessGroup (mesh.get_group() of a DeviceMesh) or None"
        raise _check.error(TypeError, op, "process_group", type(group).__name__, expected)


def excluded(x: Tensor, softcap: float) -> Tensor | None:
    """Where x (..., V) is -inf in all of its last dimension. A cap makes every logit finite."""
    return None if softcap else x.detach().amax(-1) == float("-inf")


def token_stats(
    op: str, part: Slice, token_ids: Tensor, mask: Tensor | None, temperature: Tensor | None, group: Any
) -> TokenStats:
    """The statistics of the whole vocabulary, from this rank's slice; token_ids, mask, temperature (...), the ids global."""
    import torch.distributed as dist

    ids = token_ids.to(torch.int64)
    (sizes,) = gather([ids.new_full((), part.classes)], group)
    ends = sizes.cumsum(0)
    read = ids.is_cpu and not torch.compiler.is_compiling()  # a GPU's numbers would stop the queue
    if read:  # every rank raises the same here; later one could wait for another that did
        _check.token_rows(op, ids, temperature, mask, int(ends[-1]))
    starts = ends - sizes
    inside = [(ids >= start) & (ids < end) for start, end in zip(starts.unbind(), ends.unbind(), strict=True)]
    rank = dist.get_rank(group)
    own = (ids - starts[rank]).masked_fill(~inside[rank], 0)

    def rows(where: Tensor) -> Tensor:
        where = where.expand(ids.shape)
        return where if mask is None else where & mask

    # A slice without a class gives NaN, as does a NaN: reading it once more tells the two apart.
    results = part.statistics(own, mask) if read else None
    where = None
    if results is None or bool(results[2].isnan().any()):
        where = part.excluded()
        results = part.statistics(own, mask if where is None else rows(~where).contiguous())
    logprobs, entropy, logsumexp, kl = results
    if where is not None:
        logsumexp = logsumexp.masked_fill(rows(where), float("-inf"))
    found = [logprobs, entropy, logsumexp]
    if part.ref_logsumexp is not None and kl is not None:
        ref_logsumexp = part.ref_logsumexp(torch.zeros_like(own), mask)
        where = part.ref_excluded() if not read or bool(ref_logsumexp.isnan().any()) else None
        if where is not None:
            ref_logsumexp = ref_logsumexp.masked_fill(rows(where), float("-inf"))
            kl = kl.masked_fill(where, 0.0)  # its share of the sum is infinite on its own
        found += [kl, ref_logsumexp]
    legal = functools.reduce(torch.logical_or, inside)
    logprobs, entropy, logsumexp, kl = _whole(torch.stack(inside), *gather(found, group))
    logprobs, entropy, logsumexp = (_shown(x, legal, mask) for x in (logprobs, entropy, logsumexp))
    return TokenStats(logprobs, entropy, logsumexp, None if kl is None else _shown(kl, legal, mask))


def _whole(
    inside: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    logsumexp: Tensor,
    kl: Tensor | None = None,
    ref_logsumexp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(logprobs, entropy, logsumexp, kl), each (...), of the statistics (n, ...) of n slices. inside: whether it has the token."""
    largest, share, log_share, log_sum = _shares(logsumexp)
    nothing = share == 0
    of_token = _sum((logprobs + log_share).masked_fill(~inside, 0.0)) - log_sum
    of_entropy = log_sum + _sum(share * (entropy - log_share.masked_fill(nothing, 0.0)))
    of_kl = None
    if kl is not None and ref_logsumexp is not None:
        _, _, ref_log_share, ref_log_sum = _shares(ref_logsumexp)
        terms = (kl + log_share - ref_log_share).masked_fill(nothing, 0.0)
        of_kl = _sum(share * terms) - log_sum + ref_log_sum
    return of_token, of_entropy, largest + log_sum, of_kl


def _shares(logsumexp: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of (n, ...): the largest; each slice's share of the softmax; its logarithm up to the last one, which is log sum exp
    relative to the largest."""
    largest = logsumexp.detach().amax(0)
    relative = logsumexp - largest
    weights = relative.exp()
    total = _sum(weights)
    return largest, weights / total, relative, total.log()


def _sum(x: Tensor) -> Tensor:
    """Over the first dimension, in the order of the ranks."""
    return functools.reduce(torch.add, x.unbind())


def _shown(x: Tensor, legal: Tensor, mask: Tensor | None) -> Tensor:
    x = x.masked_fill(~legal, float("nan"))
    return x if mask is None else x.masked_fill(~mask, 0.0)


def gather(own: Sequence[Tensor], group: Any) -> list[Tensor]:
    """(n, ...) of each of `own`, which have one shape, with a first derivative towards this rank's; none where nobody asks for it."""
    import torch.distributed as dist

    packed = torch.stack([x.detach() for x in own])
    parts = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, packed, group=group)
    rank = dist.get_rank(group)
    own = [_Own.apply(x) if x.requires_grad else x for x in own]
    return [torch.stack([x if r == rank else part[k] for r, part in enumerate(parts)]) for k, x in enumerate(own)]


def replicated(x: Tensor, group: Any) -> Tensor:
    """x, which every rank holds whole; its gradient is the sum of what the ranks find."""
    return _Replicated.apply(x, group) if x.requires_grad and torch.is_grad_enabled() else x


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _once(grad, ctx.saved_tensors[0])


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        import torch.distributed as dist

        with torch.no_grad():
            wide = torch.promote_types(grad.dtype, torch.float32)  # n roundings to bf16 would add up
            total = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=ctx.group)
        return _once(total.to(grad.dtype), ctx.saved_tensors[0]), None


def _once(grad: Tensor, x: Tensor) -> Tensor:
    """grad towards x, which raises when it is differentiated again: that would also need what the other ranks find."""
    return _Refused.apply(grad, x) if torch.is_grad_enabled() else grad  # create_graph=True turns it on


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("process_group: the second derivative of statistics over several ranks is not available")
