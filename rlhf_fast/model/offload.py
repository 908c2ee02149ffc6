"""Frozen decoder layers that stay in host memory and come to the device one after the other, the next one while one computes.

Every weight is read by a pass once, so a device need hold no more than the layer that computes and the one that follows. A layer lies
on the host as one block of bytes, page-locked for CUDA at its exact size (PyTorch's own pinned blocks are rounded up to powers of two),
and comes as one copy. What computes is what computed before, on the same numbers: results have the same bits.

The backward of a frozen linear layer needs its weight again. A weight that autograd saves is kept as its place alone and comes again
when it is asked for; under gradient checkpointing nothing of a layer is saved, and its second forward asks as the first one did. So no
arithmetic is added, and a layer comes twice in a training pass: once forward, once backward.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes: weights start at multiples of it in a block, as those that the allocators of devices return."""


class Copies:
    """Copies between host and device, done when the call returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host(self, size: int) -> Tensor:
        """(size,) bytes of host memory that this device copies from and to fast."""
        return torch.empty(size, dtype=torch.uint8)

    def begin(self, host: Tensor) -> tuple[Tensor, Any]:
        """A copy on the device, and what `ready` wants to know before it is read."""
        return host.to(self.device, copy=True), None

    def ready(self, token: Any) -> None:
        """What the device computes from here on finds the copy complete."""

    def fetch(self, host: Tensor, there: Tensor) -> None:
        """Overwrite host memory by a tensor of the device; complete after `finish`."""
        host.copy_(there)

    def put(self, host: Tensor, there: Tensor) -> None:
        """Overwrite a tensor of the device by host memory, which must not change before the next `finish`."""
        there.copy_(host)

    def finish(self) -> None:
        """Wait until the host may read what was fetched and change what was put."""


class SideStream(Copies):
    """Copies to a CUDA device on a stream of their own, beside what computes on the current one.

    A copy gets memory of the current stream's pool and begins behind all that was launched there. So memory of a layer that is let go
    is free again as soon as its last kernel has run, without a word to the allocator, and no more layers are alive than are held:
    what runs ahead on the host cannot pile them up. streams: torch.cuda, or what stands in for it.
    """

    def __init__(self, device: torch.device, streams: Any = torch.cuda) -> None:
        super().__init__(device)
        self.streams, self.side = streams, streams.Stream(device)

    def host(self, size: int) -> Tensor:
        if not size:
            return super().host(size)
        pages, code = _Pages.locked(size, self.streams.cudart())
        if code:
            with suppress(RuntimeError):  # CUDA remembers the error, and PyTorch would raise it at some later launch
                torch.zeros(1, device=self.device)
            logger.warning(
                "offload: %.1f MiB of host memory cannot be page-locked (CUDA error %d): copies from there are slower, and not"
                " beside the computation",
                *(size / 2**20, code),
            )
        return torch.frombuffer(pages, dtype=torch.uint8)

    def begin(self, host: Tensor) -> tuple[Tensor, Any]:
        there = torch.empty_like(host, device=self.device)
        self.side.wait_stream(self.streams.current_stream(self.device))
        with self.streams.stream(self.side):
            there.copy_(host, non_blocking=True)
            return there, self.side.record_event()

    def ready(self, token: Any) -> None:
        self.streams.current_stream(self.device).wait_event(token)

    def fetch(self, host: Tensor, there: Tensor) -> None:
        host.copy_(there, non_blocking=True)

    def put(self, host: Tensor, there: Tensor) -> None:
        there.copy_(host, non_blocking=True)

    def finish(self) -> None:
        self.streams.current_stream(self.device).synchronize()


def copies_to(device: torch.device) -> Copies:
    """The copies of a device that is not the CPU."""
    return SideStream(device) if device.type == "cuda" else Copies(device)


class _Pages(mmap):
    """Host memory of exact size in pages of its own, which CUDA copies from without a stop in between."""

    unlock: Callable[[], object] | None = None

    @classmethod
    def locked(cls, size: int, cudart: Any) -> tuple[_Pages, int]:
        """Such memory, and 0 or the error of CUDA, for which it stays memory as any other."""
        pages = cls(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
        code = int(cudart.cudaHostRegister(address, size, 0))
        if not code:
            pages.unlock = partial(cudart.cudaHostUnregister, address)
        return pages, code

    def __del__(self) -> None:
        if self.unlock is not None:  # before the pages go: others may come to lie at their address
            self.unlock()


class _Weight(NamedTuple):
    """A parameter of a layer in its block."""

    parameter: nn.Parameter
    owners: list[tuple[nn.Module, str]]
    start: int
    """First byte."""


class Block:
    """Where the streamed parameters of one layer lie."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.starts, self.size = [], 0
        for p in parameters:
            self.starts.append(self.size)
            self.size += -(-p.nbytes // ALIGNMENT) * ALIGNMENT


def streamed(model: nn.Module, layers: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """The parameters of every layer that neither another layer nor anything else in the model uses: those that can be streamed."""
    inside = {module for layer in layers for module in layer.modules()}
    outside = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
    users = Counter(outside)
    for layer in layers:
        users.update(set(layer.parameters()))
    return [[p for p in layer.parameters() if users[p] == 1] for layer in layers]


@dataclass
class _There:
    """A layer on the device."""

    roots: dict[torch.dtype, Tensor]
    """The block as numbers of every dtype in it: what its weights are views of."""
    token: Any
    weights: list[Tensor] = field(default_factory=list)


class _Saved(NamedTuple):
    """A weight, or a view of one, that autograd has saved."""

    layer: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class LayerStream:
    """Streams the layers of a model whose other parameters are on the device of `copies`.

    decoder: the module that runs the layers; it and they get forwards of their own. The parameters keep their names and places, on
    the host: what reads them outside of a layer's forward finds them there. first: where every backward ends.
    """

    def __init__(
        self, model: nn.Module, decoder: nn.Module, layers: Sequence[nn.Module], copies: Copies, first: int = 0
    ) -> None:
        self.copies, self.first = copies, first
        self.hosts: list[Tensor] = []
        self.weights: list[list[_Weight]] = []
        self._there: dict[int, _There] = {}
        for layer, parameters in zip(layers, streamed(model, layers), strict=True):
            self._take(layer, parameters)
        for i, layer in enumerate(layers):
            layer.forward = self._streaming(i, layer.forward)  # type: ignore[method-assign]
        decoder.forward = self._without_weights(decoder.forward)  # type: ignore[method-assign]

    @property
    def held(self) -> int:
        """Bytes of the layers that are on the device now."""
        return sum(self.hosts[i].nbytes for i in self._there)

    @torch.no_grad()
    def _take(self, layer: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        block = Block(parameters)
        host = self.copies.host(block.size)
        weights = []
        for p, start in zip(parameters, block.starts, strict=True):
            view = host[start : start + p.nbytes].view(p.dtype).view(p.shape)
            view.copy_(p)
            p.data = view
            owners = [(m, name) for m in layer.modules() for name, q in m._parameters.items() if q is p]
            weights.append(_Weight(p, owners, start))
        self.hosts.append(host)
        self.weights.append(weights)

    def _streaming(self, i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._placed(i):
                return forward(*args, **kwargs)

        return run

    @contextmanager
    def _placed(self, i: int) -> Iterator[None]:
        """Inside, the modules of layer i find their weights on the device."""
        backward = torch._C._current_graph_task_id() != -1  # a checkpointed layer runs again; the one before it is next
        there = self._get(i, self._before(i) if backward else i + 1)
        try:
            for weight, tensor in zip(self.weights[i], there.weights, strict=True):
                for module, name in weight.owners:
                    module._parameters[name] = tensor  # type: ignore[assignment]
            yield
        finally:
            for weight in self.weights[i]:
                for module, name in weight.owners:
                    module._parameters[name] = weight.parameter

    def _before(self, i: int) -> int | None:
        """The layer whose backward comes after that of layer i."""
        return i - 1 if i > self.first else None

    def _get(self, i: int, following: int | None) -> _There:
        """Layer i on the device, ready to be read; the following one is on its way, and no third one is there."""
        for other in self._there.keys() - {i, following}:
            self._ready(self._there[other])  # its memory is not to be written any more when it is given out again
            del self._there[other]
        if i not in self._there:
            self._begin(i)
        found = self._there[i]
        self._ready(found)
        if following is not None and following < len(self.hosts) and following not in self._there:
            self._begin(following)
        return found

    def _ready(self, there: _There) -> None:
        if there.token is not None:
            self.copies.ready(there.token)
            there.token = None

    @torch.no_grad()
    def _begin(self, i: int) -> None:
        with torch.inference_mode(False):  # whose views have no base: a later pass would not know them for weights
            block, token = self.copies.begin(self.hosts[i])
            there = _There({p.dtype: block.view(p.dtype) for p, *_ in self.weights[i]}, token)
            for p, _, start in self.weights[i]:
                first = start // p.itemsize
                there.weights.append(there.roots[p.dtype][first : first + p.numel()].view(p.shape))
        self._there[i] = there

    def _without_weights(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder's forward that leaves no weight of a layer behind for the backward."""

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self._pack, self._unpack):
                return forward(*args, **kwargs)

        return run

    def _pack(self, x: Tensor) -> Tensor | _Saved:
        for i, there in self._there.items():
            if x._base is not None and x._base is there.roots.get(x.dtype):
                return _Saved(i, x.dtype, x.shape, x.stride(), int(x.storage_offset()))
        return x.detach()  # an output that holds itself would never go

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        there = self._get(saved.layer, self._before(saved.layer))
        return there.roots[saved.dtype].as_strided(saved.size, saved.stride, saved.offset)
