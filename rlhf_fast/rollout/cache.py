"""Key-value caches that are written in place: no step copies what earlier steps stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class PrefixLayer(CacheLayerMixin):
    """Keys and values of one layer: those of the prompts, once for all their samples, and room for each sample's own.

    The first update stores the prompts, (prompts, heads, P, D). Later ones make room and count: the attention that follows writes
    the token of every running row, (rows, heads, 1, D), to its slot. Padding is stored as it comes and never read.
    """

    is_sliding = False

    def __init__(self, samples: int, room: int) -> None:
        super().__init__()
        self.samples, self.room = samples, room
        self.length = 0
        self.prefix_keys: Tensor | None = None
        self.prefix_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.prefix_keys, self.prefix_values = key_states, value_states
        self.length = key_states.shape[2]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        if self.keys is None:
            self.keys, self.values = (
                x.new_empty(self.samples, x.shape[1], self.room, x.shape[3]) for x in (key_states, value_states)
            )
        self.length += 1
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class PrefixCache(Cache):
    """A PrefixLayer per layer of the model, for `samples` rows of at most `room` new tokens each."""

    def __init__(self, layers: int, samples: int, room: int) -> None:
        self.parts = [PrefixLayer(samples, room) for _ in range(layers)]
        self.last = -1
        """The layer that was updated last: the one whose attention comes next."""
        super().__init__(layers=list(self.parts))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def, override]
        self.last = layer_idx
        return self.parts[layer_idx].update(key_states, value_states)


class InPlaceLayer(DynamicLayer):
    """transformers' layer that keeps everything, in memory that is there from the start: a step writes its token only."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.store: list[Tensor] = []  # keys and values, (rows, heads, capacity, D)
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = key_states.shape[2] + self.room
        self.store = [x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (key_states, value_states)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        for store, new in zip(self.store, (key_states, value_states), strict=True):
            store[:, :, self.length : end] = new
        self.length = end
        return self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (store[:, :, : self.length] for store in self.store)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(torch.arange(len(self.store[0]), device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices)

    def _take(self, rows: Tensor) -> None:
        for i, store in enumerate(self.store):
            taken = store.new_empty(len(rows), *store.shape[1:])
            torch.index_select(store[:, :, : self.length], 0, rows, out=taken[:, :, : self.length])
            self.store[i] = taken
        self._show()


def in_place_cache(config: Any, room: int) -> DynamicCache:
    """The cache that transformers makes for a model, with in-place layers where it would concatenate.

    A layer with a sliding window keeps what leaves the window: masks hide it. Layers of other kinds (linear attention, states)
    stay as they are.
    """
    cache = DynamicCache(config=config)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    cache.layers = [InPlaceLayer(room) if type(layer) in plain else layer for layer in cache.layers]
    return cache
