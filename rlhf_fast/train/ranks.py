"""Several processes that train one model: what each of them does, what they exchange, and what happens when one fails.

The base is frozen, so every rank holds all of it and only the gradients of adapters and heads are added up, once per update
(data parallelism). What is small is the same on every rank: prompts, masks, log-probs, values and scores of the whole batch are
gathered after scoring, so denominators, whitening, group advantages and metrics are those of one process, computed everywhere. What
is large stays where it was computed: a rank runs the model on its rows alone.

A base that one rank cannot hold is spread over all of them with FSDP2 (`shard`): a layer is gathered when it runs, so then all ranks
make the same passes.

Text goes as JSON, never as a pickle.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf_fast.train._run import fault_point

logger = logging.getLogger(__name__)
T = TypeVar("T")

BEAT = 0.5
"""Seconds between the signs of life of a rank."""
LETTER = 4096
"""Bytes that ranks exchange in one message; longer texts take a second."""
BUCKET = 1 << 24
"""Gradients that are added up in one message: 64 MiB in fp32."""
_joined = itertools.count()


class RankError(RuntimeError):
    """The ranks disagree, or one of them is gone; the message names it."""


class Ranks:
    """One process alone. Several of them are a ProcessRanks, with the same methods, which all ranks call in the same order."""

    rank, world = 0, 1

    @property
    def first(self) -> bool:
        """Whether this rank writes what a run leaves behind."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """This rank's contiguous share of some rows; the first ranks get what is left over, and the last ones may get none."""
        each, rest = divmod(rows, self.world)
        start = self.rank * each + min(self.rank, rest)
        return slice(start, start + each + (self.rank < rest))

    def passes(self, rows: int, size: int) -> int:
        """How many passes of `size` rows all ranks have to make over their shares of some rows: those of the largest share where layers
        are spread, which every pass gathers from all. 0 where a rank's passes are its own affair."""
        return 0

    def gather(self, value: T) -> list[T]:
        """A JSON value of every rank, in their order."""
        return [value]

    def join(self, values: list[T]) -> list[T]:
        """The lists of all ranks, one after the other."""
        return list(itertools.chain.from_iterable(self.gather(values)))

    def rows(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows (n, ...) of all ranks, one after the other.

        n is a rank's own; what follows it is padded with zeros to the largest. A rank without rows may leave all names out.
        """
        return dict(named)

    def mean(self, rows: Sequence[T], work: Callable[[Sequence[T]], float]) -> float:
        """work(rows), a mean over rows, from the means of the ranks over their shares."""
        return work(rows)

    def sum_gradients(self, parameters: Mapping[str, nn.Parameter]) -> list[int]:
        """Add up the gradients of all ranks, in place; a parameter without one on any rank keeps none.

        Returns the ranks whose own gradient was not finite.
        """
        return []

    def share_state(self, value: T, tensors: Mapping[str, Tensor]) -> tuple[T, dict[str, Tensor]]:
        """The JSON value and the tensors that the first rank gave, on all."""
        return value, dict(tensors)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise RankError, on all ranks, unless all of them have the same facts."""

    def seed(self, seed: int, step: int) -> None:
        """Start PyTorch's generator of a step: dropout must not repeat itself from rank to rank."""

    def at(self, step: int) -> None:
        """Tell the other ranks which step this one is in."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def shard(self, root: nn.Module, layers: Sequence[nn.Module]) -> None:
        """Spread the parameters of some layers of `root` over the ranks; what else is in it stays whole on each of them."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, what is spread is whole everywhere, and the passes of a rank are its own affair."""
        yield

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.fail(error)

    def fail(self, error: BaseException | None) -> None:
        """Tell the other ranks why this one stops."""


def join(timeout: float, slow: float, device: torch.device) -> Ranks:
    """The ranks that torchrun started (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT tell of them), or this process alone.

    timeout: seconds to wait for another rank before giving up. slow: seconds before a warning that names who is late. device: of the
    model of this rank.

    Raises RankError when only some of these variables are there, or PyTorch has no process group for the device.
    """
    world = int(os.environ.get("WORLD_SIZE") or 1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world > 1 and missing:
        raise RankError(f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: start the ranks with torchrun")
    return ProcessRanks(world, timeout, slow, device) if world > 1 else Ranks()


class ProcessRanks(Ranks):
    """This process as one of several, from `with` to its end; a process group that is there already is used.

    Beside the process group stands a store of texts, where a thread of every rank leaves signs of life and how far it has come.
    """

    def __init__(self, world: int, timeout: float, slow: float, device: torch.device) -> None:
        self.device = device
        self.rank, self.world, self.timeout, self.slow = int(os.environ["RANK"]), world, timeout, slow
        self._step, self._exchanges, self._owned = 0, 0, False
        self._waits: tuple[float, str] | None = None
        self._over = threading.Event()
        self._sharded: list[Any] = []
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def __enter__(self) -> ProcessRanks:
        import torch.distributed as dist  # not every build of PyTorch has it

        cuda = self.device.type == "cuda"
        if cuda and not dist.is_nccl_available():
            raise RankError(
                f"rank {self.rank}: this PyTorch has no NCCL for ranks on CUDA devices: set run.device to cpu"
            )
        self._dist, wait = dist, datetime.timedelta(seconds=self.timeout)
        run = f"rlhf_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_joined)}"
        try:
            store = _server(dist, wait)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank}: nobody answers at MASTER_ADDR and MASTER_PORT ({_line(error)})"
            ) from None
        self._store = dist.PrefixStore(run, store)
        self._signs = dist.PrefixStore(run, store.clone())  # waiting for a key blocks a connection
        self._store.set(f"here/{self.rank}", "")
        names = [f"here/{r}" for r in range(self.world)]
        try:
            self._store.wait(names, wait)
        except RuntimeError:
            missing = [f"rank {r}" for r, name in enumerate(names) if not self._store.check([name])]
            raise RankError(f"{', '.join(missing)} did not start within {self.timeout:g} s") from None
        if not dist.is_initialized():
            # Texts and what an engine on the CPU sampled go between hosts' memories.
            backend, group = "cpu:gloo,cuda:nccl" if cuda else "gloo", dist.PrefixStore("group", self._store)
            dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.world, timeout=wait)
            self._owned = True
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.barrier()  # the first rank may hold the store, which the others still use
            if error is not None and self._of_a_gather(error):
                raise RankError(f"rank {self.rank} stops: {self._blame('weights', error)}") from error
        finally:
            self.fail(error)
            self._over.set()
            self._thread.join()
            if self._owned:
                with suppress(Exception):  # of peers that are gone
                    self._dist.destroy_process_group()

    def fail(self, error: BaseException | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, RankError) and not self._of_a_gather(error):
            self._judge(f"rank {self.rank} failed: {type(error).__name__}: {_line(error)}")

    def _of_a_gather(self, error: BaseException | None) -> bool:
        """Whether a layer of a sharded base could not be had: an exchange that is FSDP's, not ours."""
        ours = isinstance(error, RankError)
        theirs = any(backend in str(error).lower() for backend in ("gloo", "nccl"))
        return bool(self._sharded) and isinstance(error, RuntimeError) and not ours and theirs

    def passes(self, rows: int, size: int) -> int:
        return -(-rows // (self.world * size)) if self._sharded else 0

    def gather(self, value: T) -> list[T]:
        return [json.loads(text) for text in self._texts(json.dumps(value).encode())]

    def rows(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shapes = self.gather({name: (list(x.shape), _name(x.dtype), x.device.type) for name, x in named.items()})
        known = next((own for own in shapes if own), {})
        found = {}
        for name, (_, dtype, device) in known.items():
            sizes = [own[name][0] if name in own else [0] * len(known[name][0]) for own in shapes]
            largest = [max(lengths) for lengths in zip(*sizes, strict=True)]
            x = named.get(name)
            padded = torch.zeros(largest, dtype=getattr(torch, dtype), device=device)
            if x is not None:
                padded[tuple(slice(0, n) for n in x.shape)] = x
            parts = [torch.empty_like(padded) for _ in range(self.world)]
            sent = [_bytes(t) for t in (*parts, padded)]
            self._exchange(name, self._dist.all_gather, sent[:-1], sent[-1])
            found[name] = torch.cat([part[: size[0]] for part, size in zip(parts, sizes, strict=True)])
        return found

    def mean(self, rows: Sequence[T], work: Callable[[Sequence[T]], float]) -> float:
        if self._sharded:  # uneven shares would be other numbers of passes
            return work(rows)
        own = rows[self.share(len(rows))]
        return sum(self.gather(work(own) * len(own) if own else 0.0)) / len(rows)

    def sum_gradients(self, parameters: Mapping[str, nn.Parameter]) -> list[int]:
        named = list(parameters.values())
        own = [p.grad for p in named if p.grad is not None]
        has = torch.tensor([p.grad is not None for p in named], device=named[0].device, dtype=torch.float32)
        bad = has.new_zeros(self.world)
        if own:
            bad[self.rank] = ~nn.utils.get_total_norm(own).isfinite()
        flags = torch.cat([has, bad])
        self._exchange("gradients", self._dist.all_reduce, flags)
        fault_point("train.sum")
        counts = flags.tolist()
        bucket: list[nn.Parameter] = []
        for p, count in zip(named, counts, strict=False):
            if count:
                if bucket and sum(q.numel() for q in bucket) + p.numel() > BUCKET:
                    self._sum(bucket)
                    bucket = []
                bucket.append(p)
        if bucket:
            self._sum(bucket)
        return [rank for rank, count in enumerate(counts[len(named) :]) if count]

    def _sum(self, parameters: list[nn.Parameter]) -> None:
        # Adapters and heads are fp32 (fp64 in tests); ranks of another dtype would add up roundings.
        dtype = torch.promote_types(max((p.dtype for p in parameters), key=lambda d: d.itemsize), torch.float32)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().to(dtype) for p in parameters])
        self._exchange("gradients", self._dist.all_reduce, flat)
        for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = total.view(p.shape).to(p.dtype)

    def share_state(self, value: T, tensors: Mapping[str, Tensor]) -> tuple[T, dict[str, Tensor]]:
        shapes = {name: (list(x.shape), _name(x.dtype)) for name, x in tensors.items()}
        value, shapes = self.gather((value, shapes) if self.first else None)[0]  # type: ignore[misc]
        found = {}
        for name, (shape, dtype) in shapes.items():
            x = tensors[name].contiguous() if self.first else torch.empty(shape, dtype=getattr(torch, dtype))
            if x.numel():
                self._exchange(name, self._dist.broadcast, _bytes(x), 0)
            found[name] = x
        return value, found

    def agree(self, facts: Mapping[str, str]) -> None:
        everyone = self.gather(dict(facts))
        for rank, others in enumerate(everyone):
            for name in sorted({*everyone[0], *others}):
                here, there = everyone[0].get(name), others.get(name)
                if here != there:
                    raise RankError(f"ranks 0 and {rank} are not of one run: their '{name}' is {here} and {there}")

    def seed(self, seed: int, step: int) -> None:
        torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + self.rank) % 2**63)

    def at(self, step: int) -> None:
        self._step = step

    def barrier(self) -> None:
        self.gather(None)

    def shard(self, root: nn.Module, layers: Sequence[nn.Module]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        inside = {p for layer in layers for p in layer.parameters()}
        outside = {p for p in root.parameters() if p not in inside}
        mesh = init_device_mesh(self.device.type, (self.world,))
        for layer in layers:  # one after the other comes from the host, if it waits there
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(root, mesh=mesh, ignored_params=outside)
        self._sharded = list(layers)

    @contextmanager
    def whole(self) -> Iterator[None]:
        for layer in self._sharded:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        try:
            yield
        finally:
            for layer in self._sharded:
                layer.reshard()
                layer.set_reshard_after_forward(True)

    def _texts(self, text: bytes) -> list[bytes]:
        """Texts of all ranks. A letter holds its length and the beginning; the rest follows when one is longer than that."""
        letter = torch.zeros(LETTER, dtype=torch.uint8)
        head = len(text).to_bytes(8, "little") + text[: LETTER - 8]
        letter[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        found = [bytes(part.numpy()) for part in self._all(letter)]
        sizes = [int.from_bytes(part[:8], "little") for part in found]
        texts = [part[8 : 8 + size] for part, size in zip(found, sizes, strict=True)]
        longest = max(sizes) - (LETTER - 8)
        if longest > 0:
            rest = torch.zeros(longest, dtype=torch.uint8)
            if len(text) > LETTER - 8:
                rest[: len(text) - (LETTER - 8)] = torch.frombuffer(bytearray(text[LETTER - 8 :]), dtype=torch.uint8)
            parts = [bytes(part.numpy()) for part in self._all(rest)]
            texts = [
                beginning + part[: max(size - (LETTER - 8), 0)]
                for beginning, part, size in zip(texts, parts, sizes, strict=True)
            ]
        return texts

    def _all(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.world)]
        self._exchange("values", self._dist.all_gather, parts, own)
        return parts

    def _exchange(self, what: str, work: Callable[..., object], *arguments: object) -> None:
        """One call of the process group, which all ranks make; raises RankError for one that did not."""
        self._exchanges += 1
        self._waits = (time.monotonic(), what)
        try:
            work(*arguments)
        except RuntimeError as error:
            raise RankError(f"rank {self.rank} stops: {self._blame(what, error)}") from error
        finally:
            self._waits = None

    def _watch(self) -> None:
        """Signs of life, and a warning with the names of those that this rank waits for."""
        told, pause = None, self.slow
        for beat in itertools.count():
            try:
                self._signs.set(f"sign/{self.rank}", json.dumps([beat, self._exchanges, self._step]))
                waits = self._waits
                pause = pause if waits is told else self.slow  # doubled by every warning of one wait
                if waits is not None and (waited := time.monotonic() - waits[0]) > pause:
                    told, pause = waits, 2 * pause
                    self._warn(waits[1], waited)
            except Exception:  # the store is gone, and the run with it; who waits is told by the process group
                logger.debug("rank %d: no sign of life", self.rank, exc_info=True)
            if self._over.wait(BEAT):
                return

    def _warn(self, what: str, waited: float) -> None:
        signs = self._read_signs()
        late = [r for r, (_, exchanges, _) in signs.items() if exchanges < self._exchanges and r != self.rank]
        if late and self.rank == min(set(signs) - set(late)):
            places = ", ".join(f"rank {r} (in step {signs[r][2] + 1})" for r in late)
            logger.warning("waiting %.0f s for %s, which is slow: %s of step %d", waited, places, what, self._step + 1)

    def _read_signs(self) -> dict[int, list[int]]:
        """Rank -> beats, exchanges begun, step."""
        names = [f"sign/{r}" for r in range(self.world)]
        found = [json.loads(self._signs.get(name)) if self._signs.check([name]) else [0, 0, 0] for name in names]
        return dict(enumerate(found))

    def _blame(self, what: str, error: BaseException) -> str:
        """Who is to blame for an exchange that failed; the same on every rank, by the first one that knows."""
        try:
            before = self._read_signs()
            for _ in range(5):  # what a rank says of itself comes before its connections end
                if self._store.check(["verdict"]):
                    return self._store.get("verdict").decode()
                time.sleep(BEAT)
            after = self._read_signs()
        except Exception:
            return f"{_holder()}, which holds the store, is gone ({_line(error)})"
        gone = [r for r in after if after[r][0] == before[r][0] and r != self.rank]
        late = [r for r in after if after[r][1] < self._exchanges and r not in gone]
        where = f"step {self._step + 1}, {what}"
        if gone:
            return self._judge(f"{_ranks(gone)} died or cannot be reached ({where})")
        if late:
            return self._judge(f"{_ranks(late)} did not come within {self.timeout:g} s ({where})")
        return self._judge(f"the ranks lost each other ({where}; {_line(error)})")

    def _judge(self, verdict: str) -> str:
        with suppress(Exception):  # without the store everybody judges alone
            return self._store.compare_set("verdict", "", verdict).decode()
        return verdict


_servers: dict[tuple[str, int], Any] = {}
"""Kept to the end of the process: a second run of it would find the port taken or, on other ranks, the store of the first."""


def _server(dist: Any, wait: datetime.timedelta) -> Any:
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if address not in _servers:
        hosts = os.environ["RANK"] == "0" and _holder() == "rank 0"
        _servers[address] = dist.TCPStore(
            *address, None, is_master=hosts, timeout=wait, wait_for_workers=False, multi_tenant=True
        )
    return _servers[address]


def _holder() -> str:
    return "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def _bytes(x: Tensor) -> Tensor:
    """The same memory as uint8, which every backend moves."""
    return x.view(-1).view(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
