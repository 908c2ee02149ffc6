"""What a forward of the shared model returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from rlhf_fast.model.heads import at_last_real
from rlhf_fast.model.packing import Packing

if TYPE_CHECKING:
    from rlhf_fast.model.shared import SharedModel


@dataclass
class RoleOutput:
    """What one role says about a batch; logits, values and scores are computed when first asked for.

    Shapes are those of a padded batch; for packed tokens (N,) stands in the place of (B, T).
    """

    role: str
    hidden: Tensor  # (B, T, H), output of the final norm: what the LM head reads
    _mask: Tensor | Packing
    _model: SharedModel

    @cached_property
    def logits(self) -> Tensor:
        """(B, T, V), the model's own logits (bias, scale and soft-cap included)."""
        return self._model.backbone.logits(self.hidden)

    @cached_property
    def values(self) -> Tensor:
        """(B, T) fp32: the value head at every token. Only for the role "value"."""
        return self._head("value")

    @cached_property
    def token_scores(self) -> Tensor:
        """(B, T) fp32: the reward head at every token. Only for the role "reward"."""
        return self._head("reward")

    @cached_property
    def scores(self) -> Tensor:
        """(B,) fp32: the reward head at the last real token of each sequence. Only for the role "reward"."""
        if isinstance(self._mask, Packing):
            return self.token_scores[self._mask.last]
        return at_last_real(self.token_scores, self._mask)

    def _head(self, role: str) -> Tensor:
        if self.role != role:
            raise ValueError(f"RoleOutput: the role {self.role!r} has no {role} head")
        return self._model.heads[role](self.hidden)


class SharedOutput(dict[str, RoleOutput]):
    """Outputs by role, as `out["policy"]` or `out.policy`."""

    def __getattr__(self, role: str) -> RoleOutput:
        try:
            return self[role]
        except KeyError:
            raise AttributeError(f"SharedOutput: no role {role!r}, computed are {', '.join(self)}") from None
