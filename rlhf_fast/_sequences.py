"""Padded or packed per-token tensors of sequences: checks, and sums over a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf_fast import _check
from rlhf_fast.reference._reduce import spread, sums


@dataclass(frozen=True)
class Layout:
    """Which tokens are real and which sequence they belong to."""

    mask: Tensor
    """(B, T), or (N,) with cu_seqlens; True = real token."""
    cu_seqlens: Tensor | None

    def lengths(self) -> Tensor:
        """Like mask: real tokens of the token's sequence, at least 1."""
        return spread(sums(self.mask.long(), self.cu_seqlens).clamp(min=1), self.mask, self.cu_seqlens)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the token's sequence, at every token; masked tokens of x must be 0."""
        return spread(sums(x, self.cu_seqlens), x, self.cu_seqlens)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the real tokens of the token's sequence, at every token; masked tokens of x must be 0."""
        return self.sum(x) / self.lengths()


def layout(op: str, name: str, x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """Checked layout of the float tensor `x`, which `op` calls `name`."""
    _check.floating(op, name, x)
    _check.boolean(op, "mask", mask)
    mask = _check.mask_like(op, mask, x, name)  # type: ignore[assignment]
    if cu_seqlens is not None:
        if x.dim() != 1:
            raise _check.error(ValueError, op, name, f"shape {tuple(x.shape)}", "(N,) with cu_seqlens")
        cu_seqlens = _check.cu_seqlens(op, cu_seqlens, x.shape[0], x)
    elif x.dim() != 2:
        raise _check.error(ValueError, op, name, f"shape {tuple(x.shape)}", "(B, T), or cu_seqlens")
    return Layout(mask, cu_seqlens)  # type: ignore[arg-type]
