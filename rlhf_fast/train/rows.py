"""Rows of a rollout as the model takes them: padded, or packed end to end without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.batch import pack
from rlhf_fast.model import SharedModel, SharedOutput
from rlhf_fast.model.packing import FLASH, SPLIT
from rlhf_fast.rollout import Rollout


def packs_well(model: SharedModel) -> bool:
    """Whether a packed pass is exact here and costs its tokens and the squares of its sequences: with flash-attn, and on the CPU.

    False for layers that are not there yet, which `Run.shard` will spread over GPUs.
    """
    attention, _ = model.packed_attention
    if attention != FLASH and (attention != SPLIT or model.backbone.device.type != "cpu"):
        return False
    if any(p.device != model.backbone.device for p in model.backbone.layers.parameters()):
        return False  # layers that wait on the host to be spread cannot prove it
    try:
        with model.backbone.packed():
            return True
    except ValueError:  # an architecture whose sequences would see each other
        return False


class Rows:
    """Some rows of a rollout, b of them with R slots for responses; n real response tokens.

    What `tokens` gives and `logprob_states` reads is (b, R, ...) padded and (n, ...) packed, in the order of the real tokens;
    `spread` makes (b, R) of it again.
    """

    def __init__(self, rollout: Rollout, rows: slice | Tensor, packed: bool) -> None:
        self.packed, self.prompt_length = packed, rollout.prompt_length
        self.input_ids, self.attention_mask = rollout.input_ids[rows], rollout.attention_mask[rows]
        self.mask = rollout.response_mask[rows]
        self.responses = rollout.responses[rows]
        if packed:
            self._ids, self._bounds = pack(self.input_ids, self.attention_mask)
            lengths = self.mask.sum(1)
            slots = torch.arange(self.mask.shape[1] + 1, device=lengths.device)
            # The state at the last token of the prompt predicts the first response token, and so on.
            places = (self._bounds[1:] - 1 - lengths)[:, None] + slots
            self._valued = slots <= lengths[:, None]
            self._value_places, self._places = places[self._valued], places[:, :-1][self.mask]

    def forward(self, model: SharedModel, roles: Sequence[str], trunk: list[Tensor] | None) -> SharedOutput:
        """One pass of the model; `trunk` as `trunk_of` gave it, for these rows."""
        if not self.packed:
            whole = None if trunk is None else torch.stack(trunk)
            return model(self.input_ids, self.attention_mask, roles=roles, trunk=whole)
        joined = None if trunk is None else torch.cat(trunk)
        return model(self._ids, roles=roles, trunk=joined, cu_seqlens=self._bounds)

    def trunk_of(self, model: SharedModel) -> list[Tensor] | None:
        """Outputs of the shared layers per row, (P + R, H) padded and (tokens, H) packed; None without shared layers."""
        if not model.shared_layers:
            return None
        if not self.packed:
            return list(model.trunk(self.input_ids, self.attention_mask))
        return list(model.trunk(self._ids, cu_seqlens=self._bounds).split(self._bounds.diff().tolist()))

    def logprob_states(self, hidden: Tensor) -> Tensor:
        """Of the hidden states of the pass those that predict the response tokens."""
        return hidden[self._places] if self.packed else hidden[:, self.prompt_length - 1 : -1]

    def tokens(self, x: Tensor) -> Tensor:
        """Of numbers per response slot (b, R) those of the tokens."""
        return x[self.mask] if self.packed else x

    def spread(self, x: Tensor) -> Tensor:
        """(b, R), 0 where there is no token."""
        if not self.packed:
            return x
        return x.new_zeros(self.mask.shape).index_put((self.mask,), x)

    def values(self, values: Tensor) -> Tensor:
        """(b, R + 1) of the values of the pass: before each response token, and after the last one; packed rows have 0 beyond."""
        if not self.packed:
            return values[:, self.prompt_length - 1 :]
        return values.new_zeros(self._valued.shape).index_put((self._valued,), values[self._value_places])
