"""What a loss is divided by, counted once per optimiser step over the whole batch, and the rows of all ranks for what looks across
it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_fast import _check, _parallel
from rlhf_fast.reference._reduce import sequences, tokens

COUNTS = ("tokens", "sequences", "slots", "sequence_slots")
"""Real tokens; sequences with a real token; sequences x horizon, with all sequences or with those that have a real token."""

DIVISORS: dict[str, str | None] = {
    "token-mean": "tokens",
    "token-sum": None,
    "seq-mean-token-mean": "sequences",
    "seq-mean-token-sum": "sequences",
    "seq-mean-token-sum-norm": "sequence_slots",
    "constant": "slots",
}
"""Reductions of `policy_loss` and the count that divides the sum over the tokens (over the token means of the sequences for
seq-mean-token-mean). "constant" is Dr. GRPO's (TRL: rows x max_completion_length), "seq-mean-token-sum-norm" verl's."""


@dataclass(frozen=True, eq=False)
class Denominators:
    """Counts of a batch, so that the losses of its parts add up to the loss of the whole, gradients included.

    A mean over the tokens of a micro-batch, averaged over micro-batches or ranks, weighs a token by the company it happens to
    be in. With one Denominators for everything that contributes to an optimiser step, any split (micro-batches of any size,
    accumulation steps, ranks, packed or padded, in any order) gives the same sum:

        d = Denominators.of(mask_of_the_whole_step, process_group=group)
        for rows in micro_batches:
            policy_loss("dapo", ..., denominators=d).loss.backward()  # accumulates the gradient of the whole

    Who averages the parts afterwards (DDP and FSDP over ranks, some trainers over accumulation steps) takes `d.averaged(n)`.
    A sequence must lie in one part: seq-mean-token-mean and the sequence ratios read all of its tokens.

    Pairs, scores and answers that are one number each are rows of one token:

        d = Denominators.of(real_pairs[:, None], process_group=group)
        preference_loss(..., mask=..., normalizer=d.normalizer("token-mean"))

    What looks across the batch (aot, the kinds of `group_advantages` that scale by it, `running_delta`) takes `gather_rows`.
    """

    counts: Tensor
    """(4,) int64, in the order of COUNTS."""
    bounded: bool = True
    """Whether the two counts of slots are known: padded input, or a given horizon."""
    parts: int = 1
    """How many parts will be averaged instead of added."""

    @classmethod
    def of(
        cls,
        mask: Tensor,
        cu_seqlens: Tensor | None = None,
        process_group: object | None = None,
        *,
        horizon: int | None = None,
    ) -> Denominators:
        """Count a batch, without a host synchronisation.

        Args:
            mask: (B, T), or (N,) with cu_seqlens; True = real token.
            cu_seqlens: (S+1,) boundaries of packed sequences.
            process_group: adds the counts of its ranks in one all-reduce (torch.distributed.group.WORLD for all of them); every
                rank calls with its own mask.
            horizon: >= 1, length that a sequence could have had in tokens (the generation limit), for "constant" and
                "seq-mean-token-sum-norm". None = T; packed input has none. Only a given horizon makes those two independent of
                the padding.

        Raises:
            TypeError, ValueError: wrong dtype, shape or range; names the argument.
        """
        op = "Denominators.of"
        _check.boolean(op, "mask", mask)
        mask = mask if mask.dtype is torch.bool else mask != 0
        if cu_seqlens is not None:
            if mask.dim() != 1:
                raise _check.error(ValueError, op, "mask", f"shape {tuple(mask.shape)}", "(N,) with cu_seqlens")
            cu_seqlens = _check.cu_seqlens(op, cu_seqlens, mask.shape[0], mask)
            rows, length = cu_seqlens.shape[0] - 1, 0
        elif mask.dim() != 2:
            raise _check.error(ValueError, op, "mask", f"shape {tuple(mask.shape)}", "(B, T), or cu_seqlens")
        else:
            rows, length = mask.shape
        if horizon is not None:
            length = _whole(op, "horizon", horizon)
        real = sequences(mask, cu_seqlens)
        counts = torch.stack([tokens(mask), real, torch.full_like(real, rows * length), real * length])
        found = cls(counts, cu_seqlens is None or horizon is not None)
        return found if process_group is None else found.all_reduce(process_group)

    def all_reduce(self, process_group: object | None = None) -> Denominators:
        """The counts of all ranks of the group together (None: of all ranks)."""
        import torch.distributed as dist  # not every build of PyTorch has it

        counts = self.counts.clone()
        dist.all_reduce(counts, group=process_group)  # type: ignore[arg-type]
        return replace(self, counts=counts)

    def to(self, device: torch.device | str) -> Denominators:
        """On another device, where the losses are."""
        return replace(self, counts=self.counts.to(device))

    def __add__(self, other: Denominators) -> Denominators:
        """The counts of two batches together."""
        if not isinstance(other, Denominators):
            return NotImplemented
        if self.parts != other.parts:
            raise _check.error(
                ValueError, "Denominators", "parts", other.parts, f"{self.parts}, like the other summand's"
            )
        return Denominators(self.counts + other.counts, self.bounded and other.bounded, self.parts)

    def __radd__(self, other: object) -> Denominators:
        return self if other == 0 else NotImplemented  # so that sum() works

    def averaged(self, parts: int) -> Denominators:
        """For losses or gradients that are averaged over `parts` ranks or accumulation steps instead of added."""
        return replace(self, parts=self.parts * _whole("Denominators.averaged", "parts", parts))

    def normalizer(self, reduction: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """What divides the sum of `reduction`, 0-d: for `ppo_loss` and `policy_loss`. 0 in an empty batch.

        Raises:
            ValueError: unknown reduction, or one that divides by slots when their number is not known.
        """
        op = "Denominators.normalizer"
        _check.choice(op, "reduction", reduction, tuple(DIVISORS))
        name = DIVISORS[reduction]
        if name is None:
            return torch.full((), 1.0 / self.parts, dtype=dtype, device=self.counts.device)
        if not self.bounded and name.endswith("slots"):
            raise _check.error(
                ValueError, op, "reduction", repr(reduction), "one without slots, or Denominators.of(..., horizon=...)"
            )
        return self.counts[COUNTS.index(name)].to(dtype) / self.parts


def gather_rows(x: Tensor, process_group: object | None = None) -> Tensor:
    """The rows of all ranks one after the other, the same on each of them: for losses and advantages that look across the batch.

    The other ranks' rows are constants, so the loss of all rows gives every rank the gradient of its own, and these add up to the
    gradient of the whole. (Where DDP or FSDP averages them, multiply the loss by the number of ranks.)

        preference_loss(*(gather_rows(x, group) for x in (chosen, rejected, ref_chosen, ref_rejected)), kind="aot")

    Micro-batches of a rank can not be gathered one by one: such a loss needs all of its pairs in one call.

    Args:
        x: (n, ...), n its own on every rank, the rest the same on all.
        process_group: its ranks all call (None: all ranks).

    Returns:
        (sum of n, ...) in the order of the ranks; the first derivative towards x. Its shape is read on the host.

    Raises:
        TypeError, ValueError: no tensor, or one without rows; a process_group that is not one; names the argument.
    """
    import torch.distributed as dist  # not every build of PyTorch has it

    op = "gather_rows"
    _check.tensor(op, "x", x)
    if x.dim() == 0:
        raise _check.error(ValueError, op, "x", "a scalar", "(n, ...)")
    if process_group is None:
        process_group = dist.group.WORLD
    _parallel.check_group(op, process_group)
    (sizes,) = _parallel.gather([x.new_tensor(len(x), dtype=torch.int64)], process_group)
    counts = sizes.tolist()
    padded = torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])])
    (found,) = _parallel.gather([padded], process_group)
    return torch.cat([part[:n] for part, n in zip(found.unbind(), counts, strict=True)])


def _whole(op: str, argument: str, x: object) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise _check.error(TypeError, op, argument, f"{x!r} of type {type(x).__name__}", "a whole number")
    return int(_check.number(op, argument, x, 1.0))
