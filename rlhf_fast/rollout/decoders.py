"""The forward passes of a rollout: prompts once, then one token of every row that still runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_fast._op import forced_backend
from rlhf_fast.model import SharedModel
from rlhf_fast.model.backbone import Backbone
from rlhf_fast.model.linear import weight_of
from rlhf_fast.model.packing import attending
from rlhf_fast.rollout.attention import NAME, Pass, kernel_on, passing, unusable, windows_of
from rlhf_fast.rollout.cache import PrefixCache, in_place_cache
from rlhf_fast.rollout.packed import PackedBase, can_pack


class Decoder(Protocol):
    """Hidden states of the last token, (rows, H)."""

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of left-padded prompts (G, P)."""

    def step(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Of one more token (A,) of the samples `rows` (A,), ascending; a row that is left out never comes back."""


class CachedDecoder:
    """By our attention: the prompt's keys lie there once for its samples, and finished rows just stop asking.

    The C++ kernel reads prompts as well. A GPU has faster ways to attend with many tokens of a sequence at once: there the model
    reads them by its own attention. `stack` holds what the base attends by.
    """

    def __init__(self, backbone: Backbone, samples: int, room: int, stack: ExitStack) -> None:
        self.backbone, self.samples, self.room, self.stack = backbone, samples, room, stack
        self.takes_positions = _takes_positions(backbone)
        self.windows: dict[int, int | None] = {}
        """Sliding window of every layer that has attended by our kernel."""

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        G, P = ids.shape
        self.cache = PrefixCache(len(self.backbone.layers), G * self.samples, self.room)
        self.starts = P - mask.sum(1)
        self.prompt_length, self.steps = P, 0
        places = torch.arange(P, device=ids.device)
        positions = (places - self.starts[:, None]).clamp_(min=0)
        attend_by_us = attending(self.backbone.base, NAME)
        if kernel_on(ids.device).name != "cpp":
            hidden = _hidden(self, ids, positions, mask.long())
            self.stack.enter_context(attend_by_us)
            return hidden[:, -1]
        self.stack.enter_context(attend_by_us)
        # A real token sees the prompt up to itself; a padding token sees nothing.
        stops = torch.where(mask, places + 1, self.starts[:, None])
        prompts, starts, stops = _flat(torch.arange(G)[:, None], self.starts[:, None], stops)
        return self._run(Pass(self.cache, prompts, starts, stops), ids, positions)[:, -1]

    def step(self, ids: Tensor, rows: Tensor) -> Tensor:
        prompts = rows // self.samples
        starts = self.starts[prompts]
        self.steps += 1
        own, stops = torch.full_like(rows, self.steps), torch.full_like(rows, self.prompt_length)
        told = Pass(self.cache, prompts, starts, stops, rows, own, windows=self.windows)
        return self._run(told, ids[:, None], (self.prompt_length + self.steps - 1 - starts)[:, None])[:, -1]

    def _run(self, told: Pass, ids: Tensor, positions: Tensor) -> Tensor:
        with passing(told):
            return _hidden(self, ids, positions, None)


class PlainDecoder:
    """By the model's own attention and mask, on any device: the cache is written in place, copied for the samples of a prompt,
    and again without finished rows whenever a quarter of its rows have finished."""

    def __init__(self, backbone: Backbone, samples: int, room: int) -> None:
        self.backbone, self.samples, self.room = backbone, samples, room
        self.takes_positions = _takes_positions(backbone)

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.cache = in_place_cache(self.backbone.base.config, self.room)
        self.mask = mask.long()
        hidden = self._run(ids, (self.mask.cumsum(1) - 1).clamp_(min=0))
        if self.samples > 1:
            self.cache.batch_repeat_interleave(self.samples)
            self.mask = self.mask.repeat_interleave(self.samples, 0)
        self.held = torch.arange(len(self.mask), device=ids.device)  # samples in the cache
        return hidden[:, -1]

    def step(self, ids: Tensor, rows: Tensor) -> Tensor:
        if len(rows) <= 3 * len(self.held) // 4:
            kept = torch.searchsorted(self.held, rows)
            self.cache.batch_select_indices(kept)
            self.mask, self.held = self.mask[kept], rows
        at = torch.searchsorted(self.held, rows)
        fed = ids.new_zeros(len(self.held)).index_copy_(0, at, ids)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return self._run(fed[:, None], self.mask.sum(1, keepdim=True) - 1)[at, -1]

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        return _hidden(self, ids, positions, self.mask)


def _hidden(decoder: CachedDecoder | PlainDecoder, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states (rows, S, H) of the tokens `ids` (rows, S) behind what the decoder's cache holds."""
    extra = {"position_ids": positions} if decoder.takes_positions else {}
    out = decoder.backbone.decoder(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=decoder.cache,
        use_cache=True,
        return_dict=True,
        **extra,
    )
    return out.last_hidden_state


def _takes_positions(backbone: Backbone) -> bool:
    return "position_ids" in signature(type(backbone.decoder).forward).parameters


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Broadcast against each other, one entry per token, contiguous."""
    return tuple(x.flatten() for x in torch.broadcast_tensors(*tensors))


_tried: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = weakref.WeakKeyDictionary()
_groups: weakref.WeakKeyDictionary[PreTrainedModel, tuple[tuple[str, ...], ...]] = weakref.WeakKeyDictionary()


def attention_of(model: SharedModel) -> str | None:
    """Why rollouts of this model run by its own attention instead of ours, or None; tried out once per base and kernel, on a few
    tokens."""
    reason = unusable(model.base)
    if reason is not None:
        return reason
    tried = _tried.setdefault(model.base, {})
    kernel = kernel_on(model.backbone.device).name
    if kernel not in tried:
        tried[kernel] = _try_attention(model.backbone)
    return tried[kernel]


@contextmanager
def decoding(model: SharedModel, role: str, samples: int, room: int, packed: PackedBase | None) -> Iterator[Decoder]:
    """A decoder of one rollout: `samples` of each prompt, at most `room` new tokens."""
    with ExitStack() as stack:
        stack.enter_context(model.as_role(role))
        if packed is not None:
            stack.enter_context(packed.running(role))
        if attention_of(model) is None:
            yield CachedDecoder(model.backbone, samples, room, stack)
        else:
            yield PlainDecoder(model.backbone, samples, room)


def pack(model: SharedModel) -> PackedBase | None:
    """The linear layers of the decoder packed, or None where the kernel serves none of them, or other backends are asked for."""
    if model.backbone.device.type != "cpu" or torch.is_autocast_enabled("cpu") or forced_backend() not in (None, "cpp"):
        return None
    linears = {name: module for name, module in model.backbone.all_linears().items() if can_pack(module)}
    if model.base not in _groups:
        _groups[model.base] = _find_groups(model.backbone)
    groups = [kept for group in _groups[model.base] if (kept := [name for name in group if name in linears])]
    return PackedBase(linears, groups) if groups else None


@torch.no_grad()
def _find_groups(backbone: Backbone) -> tuple[tuple[str, ...], ...]:
    """Names of linear layers that are called right after each other with the same tensor, in the order of their calls."""
    linears = backbone.all_linears()
    calls: list[tuple[str, Any]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: calls.append((name, args[0])))
        for name, module in linears.items()
    ]
    try:
        ids = torch.arange(2, device=backbone.device)[None]
        backbone.hidden(ids, torch.ones_like(ids, dtype=torch.bool))
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in calls]
    groups: list[list[str]] = []
    before: Any = None
    for name, x in calls:
        if names.count(name) > 1:
            continue  # a layer that runs twice in a pass answers for itself
        if x is before and weight_of(linears[name]).dtype is weight_of(linears[groups[-1][-1]]).dtype:
            groups[-1].append(name)
        else:
            groups.append([name])
        before = x
    return tuple(map(tuple, groups))


@torch.no_grad()
def _try_attention(backbone: Backbone) -> str | None:
    """Prove on a few tokens, some of them padding, that prompts and two steps by our attention are what the model computes.

    Layer by layer, each from the same input: what 30 layers make of the roundings of bf16 can be a quarter of the result.
    """
    base, device = backbone.base, backbone.device
    vocabulary = weight_of(base.get_input_embeddings()).shape[0]
    ids, new = (torch.arange(n, device=device).view(-1, n // 2) % min(7, vocabulary) for n in (10, 8))
    new = new.view(4, 2)
    mask = torch.tensor([[False, False, True, True, True], [True] * 5], device=device)
    whole_ids = torch.cat([ids.repeat_interleave(2, 0), new], 1)
    whole_mask = torch.cat([mask.repeat_interleave(2, 0), torch.ones_like(new, dtype=torch.bool)], 1)
    whole: list[tuple[Tensor, Tensor]] = []  # input and output of every layer, (4, 7, H)
    with _watched(backbone, lambda i, x: x, lambda i, x, y: whole.append((x, y))):
        backbone.hidden(whole_ids, whole_mask)
    error = whole[0][0].new_zeros(len(whole), dtype=torch.float32)
    places = [slice(4, 5), slice(5, 6), slice(6, 7)]  # the last token of the prompt, and two more
    rows, at = torch.arange(4, device=device), -1

    def given(i: int, x: Tensor) -> Tensor:
        return whole[i][0][::2, :5] if at == 0 else whole[i][0][:, places[at]]

    def compare(i: int, x: Tensor, y: Tensor) -> None:
        expected = (whole[i][1] - whole[i][0])[:, places[at]].float()
        found = (y - x)[:, -1:].float()
        found = found.repeat_interleave(2, 0) if at == 0 else found
        off = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
        error[i] = torch.maximum(error[i], off.max())

    try:
        with ExitStack() as stack, _watched(backbone, given, compare):
            decoder = CachedDecoder(backbone, 2, 2, stack)
            for at in range(3):
                _ = decoder.read(ids, mask) if at == 0 else decoder.step(new[:, at - 1], rows)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as failure:
        return f"{type(base).__name__}: {' '.join(str(failure).split())}"
    if not bool((error <= (1e-3 if whole[0][0].dtype is torch.float32 else 0.1)).all()):  # seen: 1e-6, 0.03
        return f"{type(base).__name__} attends in another way"
    layers = range(len(backbone.layers))
    if [decoder.windows.get(i, 0) for i in layers] != windows_of(base, len(layers)):
        return f"{type(base).__name__} keeps its sliding windows elsewhere"
    return None


@contextmanager
def _watched(
    backbone: Backbone, before: Callable[[int, Tensor], Tensor], after: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Layer i gets before(i, its input), and after(i, that, its output) is called."""
    inputs: dict[int, Tensor] = {}

    def enter(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs[i] = before(i, args[0] if args else kwargs["hidden_states"])
        if args:
            return (inputs[i], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": inputs[i]}

    def leave(i: int, output: Any) -> None:
        after(i, inputs.pop(i), output[0] if isinstance(output, tuple) else output)

    handles = []
    for i, layer in enumerate(backbone.layers):
        handles.append(layer.register_forward_pre_hook(lambda _, a, k, i=i: enter(i, a, k), with_kwargs=True))
        handles.append(layer.register_forward_hook(lambda _, a, y, i=i: leave(i, y)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
