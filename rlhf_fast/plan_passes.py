"""What the passes of a run hold at once, from the model's own code run on shapes (torch's fake tensors): no number is computed.

Every tensor that PyTorch would allocate is counted from its birth to its end, so activations, what a layer leaves behind in the
backward and what gradient checkpointing saves are those of the real code. Kernels' own scratch is not seen: what of it matters, the
chunks of the LM head, is `head_bytes`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from rlhf_fast.ops._lm_head import CHUNK_BYTES, DEVICE_CHUNK_BYTES, even_part
from rlhf_fast.ops._matmul import pitch

_QUESTIONS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.allclose.default)
"""Models ask whether a mask can be left out, which with whole rows of real tokens it can; SharedModel, whether two ways to compute
agree, which a run finds out on numbers."""


class LiveBytes(TorchDispatchMode):
    """Counts the storages of tensors that are born inside the context, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _QUESTIONS:
            return True
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


class _Bounds:
    """Boundaries of sequences of one length, as attention on one after the other reads them; shapes have no values."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = list(values)

    def tolist(self) -> list[int]:
        return self._values

    def diff(self) -> _Bounds:
        return _Bounds([b - a for a, b in zip(self._values, self._values[1:], strict=False)])


class Passes:
    """The passes of a SharedModel that was built of fake tensors under `fake`.

    packed: sequences lie end to end, as the trainers lay them on a CPU; else in rows of equal length.
    """

    def __init__(self, fake: FakeTensorMode, model: Any, *, packed: bool) -> None:
        from rlhf_fast.model.packing import SPLIT

        self.fake, self.model = fake, model
        backbone = model.backbone
        with fake, LiveBytes():
            model.head_weight  # noqa: B018 (asks how its logits are made, once)
        # A model that attends by another implementation packs by a mask of all tokens, and is laid in rows by the trainers.
        self.packed = packed and model.packed_attention[0] == SPLIT
        if self.packed:
            backbone._packs.add(SPLIT)  # what it proves of an architecture needs numbers
        else:
            backbone.rows_at_a_time = lambda tokens: sys.maxsize

    def trains(
        self,
        role: str,
        rows: int,
        length: int,
        *,
        head: str | None,
        before: Sequence[str] = (),
        responses: int | None = None,
        kept_trunk: bool = False,
    ) -> int:
        """Most bytes at once in forward and backward of `role` on `rows` sequences of `length` tokens.

        head: "logprobs", the loss on "ppo", scalar "values", or None. before: roles without gradients of the same call, whose hidden
        states wait for the end. responses: tokens of each sequence that the head reads (None: all). kept_trunk: the outputs of the
        shared layers are given. Gradients of parameters are there already and are not counted.
        """
        parameters = [p for p in self.model.parameters_of(role).values() if p.requires_grad]
        with self.fake, torch.enable_grad():
            for p in parameters:
                p.grad = torch.zeros_like(p)
            self.model.train()
            with LiveBytes() as counter:
                out = self._outputs((*before, role), rows, length, kept_trunk)
                self._loss(out[role], None if responses is None else rows * responses, head).backward()
                del out
            self.model.eval()
            for p in parameters:
                p.grad = None
        return counter.peak

    def scores(self, roles: Sequence[str], rows: int, length: int, *, kept_trunk: bool = False) -> int:
        """Most bytes at once in one pass for all of `roles` that keeps nothing."""
        with self.fake, torch.no_grad(), LiveBytes() as counter:
            out = self._outputs(roles, rows, length, kept_trunk)
            del out
        return counter.peak

    def reads(self, role: str, rows: int, length: int) -> int:
        """Most bytes at once in the pass over the prompts of a rollout, keys and values of the cache left out."""
        with self.fake, torch.no_grad(), LiveBytes() as counter, self.model.as_role(role):
            ids = torch.zeros(rows, length, dtype=torch.int64)
            self.model.backbone.decoder(input_ids=ids, attention_mask=None, use_cache=False)
        return counter.peak

    def _outputs(self, roles: Sequence[str], rows: int, length: int, kept_trunk: bool) -> Any:
        from rlhf_fast.model.packing import Packing

        shape = (rows * length,) if self.packed else (rows, length)
        trunk = None
        if kept_trunk and self.model.shared_layers:
            trunk = self.model.head_weight.new_zeros(*shape, self.model.backbone.hidden_size)
        if not self.packed:
            ids = torch.zeros(shape, dtype=torch.int64)
            return self.model._outputs(ids, torch.ones_like(ids, dtype=torch.bool), roles, trunk)
        ids = torch.zeros(1, *shape, dtype=torch.int64)
        bounds: Any = _Bounds([0, *accumulate([length] * rows)])
        with self.model.backbone.packed():
            return self.model._outputs(ids, Packing(bounds, torch.zeros_like(ids), length), roles, trunk)

    def _loss(self, out: Any, learned: int | None, head: str | None) -> Tensor:
        from rlhf_fast.train.scoring import head_logprobs, head_ppo_loss

        hidden = out.hidden.flatten(0, -2)
        if learned is not None:
            hidden = hidden[torch.arange(learned)]
        tokens = len(hidden)
        if head == "values":
            return self.model.heads[out.role](hidden).sum()
        if head is None:
            return hidden.sum()
        ids, mask = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.bool)
        if head == "logprobs":
            return head_logprobs(self.model, hidden, ids, mask).logprobs.sum()
        old = torch.zeros(tokens)
        return head_ppo_loss(self.model, hidden, ids, old, old, mask, normalizer=1).loss


def head_bytes(rows: int, weight: Tensor, gpu: bool) -> int:
    """The blocks of logits and of their gradient that the ops on the LM head (V, H) keep for `rows` tokens, as far as they are written:
    as many rows at a time as `whole_rows` of ops/_lm_head.py takes, in bf16 with a gradient of half their size."""
    vocabulary, hidden = weight.shape
    row = pitch(vocabulary) * 4 + (pitch(vocabulary) * 2 if weight.dtype is torch.bfloat16 else 0)
    budget = DEVICE_CHUNK_BYTES if gpu else CHUNK_BYTES
    return even_part(rows, budget // (row + 3 * hidden * 4)) * row


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, those that several share counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
