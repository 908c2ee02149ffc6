"""Shadow memory of a kernel launch: for every element of every tensor, who initialised, read and wrote it, and in what order.

A pointer is known by the argument it was made from, so an access one element past a row is found even where the next
allocation begins, and no bad address is ever touched. Programs of a launch are unordered, except through atomics that
acquire what another program's atomic released (vector clocks). Of what a program wrote before such an atomic, that counts as
released which lies before its last tl.debug_barrier(), since the atomic is one thread's and the stores are the others'; its
atomics, which are one thread's too, all do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MANY = -1
"""In place of a reader's number: several programs."""

SECTOR = 32
"""Bytes that DRAM moves at once."""


@dataclass
class Launch:
    """What one launch asked of the memory and of the arithmetic units."""

    kernel: str
    grid: tuple[int, int, int]
    load_bytes: int = 0
    """Requested by the active lanes."""
    store_bytes: int = 0
    atomic_bytes: int = 0
    load_first: int = 0
    """Each element once per launch: what DRAM must deliver."""
    load_first_prog: int = 0
    """Each element once per program: a private cache without end, and nothing shared."""
    store_first: int = 0
    sectors: int = 0
    """Distinct 32-byte sectors, summed over the tiles."""
    lanes: int = 0
    lanes_off: int = 0
    ops: Counter[str] = field(default_factory=Counter)
    """Elements per operation, by the name of the numpy function."""

    @property
    def coalescing(self) -> float:
        """Share of the bytes of the sectors that was asked for."""
        return (self.load_bytes + self.store_bytes) / max(1, SECTOR * self.sectors)

    def __str__(self) -> str:
        return (
            f"{self.kernel}{self.grid}: loads {self.load_bytes / 1e6:.3f} MB requested, "
            f"{self.load_first_prog / 1e6:.3f} first touch per program, {self.load_first / 1e6:.3f} per launch; "
            f"stores {self.store_bytes / 1e6:.3f} MB ({self.store_first / 1e6:.3f} distinct); atomics {self.atomic_bytes} bytes; "
            f"sectors used {self.coalescing:.3f}; lanes off {self.lanes_off / max(1, self.lanes):.3f}; "
            f"{dict(self.ops.most_common(8))}"
        )


class Shadow:
    """One storage, element by element. 0 in place of a program's number: none; programs are numbered from 1."""

    def __init__(self, tensor: Tensor, initialised: bool) -> None:
        self.storage = tensor.untyped_storage()  # kept alive: its address must not come back as another tensor's
        self.base, self.itemsize = self.storage.data_ptr(), tensor.element_size()
        self.size = self.storage.nbytes() // self.itemsize
        self.initialised = np.full(self.size, initialised)

    def forget(self) -> None:
        """A launch begins."""

        def numbers() -> NDArray:
            return np.zeros(self.size, np.int32)

        self.writer, self.write_clock, self.write_lane, self.write_epoch = (numbers() for _ in range(4))
        self.reader, self.read_clock, self.read_lane, self.read_epoch = (numbers() for _ in range(4))
        self.last_reader = numbers()
        self.loaded, self.stored, self.updated = (np.zeros(self.size, bool) for _ in range(3))
        self.updates: dict[int, dict[int, int]] = {}  # element: {program: number of its last atomic}

    def covered(self, marks: NDArray, tensor: Tensor) -> NDArray:
        """The part of an array over the storage that the tensor views."""
        steps = [step * marks.itemsize for step in tensor.stride()]
        return np.lib.stride_tricks.as_strided(marks[tensor.storage_offset() :], tensor.shape, steps)


@dataclass
class Region:
    """One tensor argument of the launch."""

    name: str
    shadow: Shadow
    valid: NDArray
    """Which elements of the storage the tensor covers."""


@dataclass
class Access:
    """What a tile of pointers may touch of one region."""

    safe: NDArray
    """Lanes that are on and in bounds, in the shape of the tile."""
    region: Region | None
    index: NDArray
    """Elements of the storage, one per safe lane."""
    lane: NDArray
    """Names of the safe lanes; tiles of different sizes share none."""

    @property
    def scalar(self) -> bool:
        return self.safe.size == 1


class Memory:
    """The shadows of all tensors, and the program that runs now."""

    def __init__(self, report: Callable[[str, str], None], reductions_order: bool) -> None:
        self._report = report
        self._reductions_order = reductions_order
        self._shadows: dict[tuple[int, int], Shadow] = {}
        self.launch = Launch("", (0, 0, 0))
        self.regions: list[Region] = []
        self.program = 0

    # ---- tensors

    def shadow(self, tensor: Tensor, initialised: bool = True) -> Shadow:
        storage = tensor.untyped_storage()
        # Storages of no bytes all lie at address 0, whatever their elements.
        key = (storage.data_ptr(), storage.nbytes() or -tensor.element_size())
        if key not in self._shadows:
            self._shadows[key] = Shadow(tensor, initialised)
        return self._shadows[key]

    def poisoned(self, tensor: Tensor) -> None:
        """A tensor that the host has just allocated and not filled."""
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        else:
            pattern = int.from_bytes(b"\x5a" * tensor.element_size(), "little")
            tensor.fill_(True if tensor.dtype is torch.bool else pattern)
        self.shadow(tensor).initialised[:] = False

    def written_by_host(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        shadow = self._shadows.get((storage.data_ptr(), storage.nbytes()))
        if shadow is not None and shadow.itemsize == tensor.element_size():
            shadow.covered(shadow.initialised, tensor)[...] = True

    def hidden(self, tensor: Tensor, where: Tensor) -> None:
        """Elements (or rows, where `where` has fewer dimensions) that count as never written."""
        shadow = self.shadow(tensor)
        shadow.covered(shadow.initialised, tensor)[where.numpy()] = False

    def unwritten(self, tensor: Tensor) -> int:
        shadow = self.shadow(tensor)
        return int((~shadow.covered(shadow.initialised, tensor)).sum())

    # ---- launch and programs

    def begin_launch(self, launch: Launch) -> None:
        self.launch = launch
        self.regions = []
        self._in_launch: set[int] = set()
        # (2, programs): barrier clock and number of atomics of each program; of what a program has acquired, and of what was
        # released at an address.
        self._clocks: dict[int, NDArray] = {}
        self._released: dict[int, NDArray] = {}
        self._programs = int(np.prod(launch.grid))

    def add_region(self, name: str, tensor: Tensor) -> int:
        """Number of the region, which is the provenance of every pointer made from this argument."""
        shadow = self.shadow(tensor)
        if shadow.itemsize != tensor.element_size():
            raise TypeError(
                f"{name}: storage seen with elements of {shadow.itemsize} and {tensor.element_size()} bytes"
            )
        if id(shadow) not in self._in_launch:
            self._in_launch.add(id(shadow))
            shadow.forget()
        valid = np.zeros(shadow.size, bool)
        if tensor.numel():
            shadow.covered(valid, tensor)[...] = True
        self.regions.append(Region(name, shadow, valid))
        return len(self.regions) - 1

    def begin_program(self, number: int) -> None:
        self.program = number
        self._clock = 1
        self._epoch = 1  # since the last barrier; 0 is before everything
        self._fenced = 0  # clock of the stores that a releasing atomic publishes
        self._atomics = 0

    def barrier(self) -> None:
        self._fenced = self._clock
        self._clock += 1
        self._epoch += 1

    def reduction(self) -> None:
        if self._reductions_order:
            self._epoch += 1

    # ---- accesses

    def locate(self, what: str, addresses: NDArray, mask: NDArray, origin: int | None, itemsize: int) -> Access:
        """Checks bounds and alignment. origin: number of the region, None when the pointer's origin was lost."""
        addresses, mask = np.broadcast_arrays(addresses, mask)
        on = np.flatnonzero(mask.reshape(-1))
        self.launch.lanes += mask.size
        self.launch.lanes_off += mask.size - on.size
        address = addresses.reshape(-1)[on].astype(np.int64)
        region = self._region_at(address) if origin is None else self.regions[origin]
        nothing = Access(np.zeros(mask.shape, bool), None, on[:0], on[:0])
        if region is None:
            if on.size:
                self._report("oob", f"{what} through a pointer that belongs to no argument")
            return nothing
        shadow = region.shadow
        if itemsize != shadow.itemsize:
            self._report(
                "itemsize", f"{what} of {itemsize}-byte elements in {region.name} of {shadow.itemsize}-byte ones"
            )
            return nothing
        offset = address - shadow.base
        index = offset // itemsize
        if (offset % itemsize).any():
            self._report("misaligned", f"{what} {region.name}")
        inside = (index >= 0) & (index < shadow.size)
        good = inside.copy()
        good[inside] = region.valid[index[inside]]
        if not good.all():
            kind = "outside-view" if inside.all() else "oob"
            first = int(index[~good][0])
            self._report(
                kind, f"{what} {region.name}: element {first} of a storage of {shadow.size}, {int((~good).sum())} lanes"
            )
        on, index = on[good], index[good]
        self.launch.sectors += _distinct(address[good] // SECTOR)
        safe = np.zeros(mask.size, bool)
        safe[on] = True
        lane = (on + (mask.size.bit_length() << 24)).astype(np.int32)
        return Access(safe.reshape(mask.shape), region, index, lane)

    def _region_at(self, address: NDArray) -> Region | None:
        for region in self.regions:
            shadow = region.shadow
            if address.size and shadow.base <= address[0] < shadow.base + shadow.size * shadow.itemsize:
                return region
        return None

    def load(self, access: Access) -> None:
        region, index = access.region, access.index
        if region is None or not index.size:
            return
        shadow, launch, me = region.shadow, self.launch, self.program
        launch.load_bytes += index.size * shadow.itemsize
        launch.load_first_prog += _distinct(index[shadow.last_reader[index] != me]) * shadow.itemsize
        launch.load_first += _distinct(index[~shadow.loaded[index]]) * shadow.itemsize
        raw = ~shadow.initialised[index]
        if raw.any():
            self._report("uninit-read", f"{region.name}[{int(index[raw][0])}], {int(raw.sum())} lanes")
        self._against_writers("read of", region, index)
        self._against_updates("plain read of", region, index)
        mine = (shadow.writer[index] == me) & (shadow.write_epoch[index] == self._epoch)
        # One thread stores a scalar and all of them load it.
        self._hazard(
            "read after write", region, index, mine & (access.scalar | (shadow.write_lane[index] != access.lane))
        )
        before = shadow.reader[index]
        shadow.reader[index] = np.where((before == 0) | (before == me), me, MANY)
        again = (shadow.last_reader[index] == me) & (shadow.read_epoch[index] == self._epoch)
        several = again & (shadow.read_lane[index] != access.lane)
        shadow.read_clock[index], shadow.read_lane[index] = self._clock, np.where(several, MANY, access.lane)
        shadow.read_epoch[index] = self._epoch
        shadow.last_reader[index] = me
        shadow.loaded[index] = True

    def store(self, access: Access) -> None:
        region, index = access.region, access.index
        if region is None or not index.size:
            return
        shadow, launch, me = region.shadow, self.launch, self.program
        launch.store_bytes += index.size * shadow.itemsize
        launch.store_first += _distinct(index[~shadow.stored[index]]) * shadow.itemsize
        if _distinct(index) != index.size:
            values, counts = np.unique(index, return_counts=True)
            self._report("duplicate", f"several lanes of one store write {region.name}[{int(values[counts > 1][0])}]")
        self._against_writers("write to", region, index)
        self._against_readers(region, index)
        self._against_updates("plain write to", region, index)
        now = self._epoch
        mine = (shadow.writer[index] == me) & (shadow.write_epoch[index] == now)
        self._hazard("write after write", region, index, mine & (shadow.write_lane[index] != access.lane))
        mine = (shadow.last_reader[index] == me) & (shadow.read_epoch[index] == now)
        self._hazard("write after read", region, index, mine & (shadow.read_lane[index] != access.lane))
        shadow.writer[index], shadow.write_clock[index] = me, self._clock
        shadow.write_lane[index], shadow.write_epoch[index] = access.lane, now
        shadow.initialised[index] = True
        shadow.stored[index] = True

    def atomic(self, access: Access, acquires: bool, releases: bool) -> None:
        region, index = access.region, access.index
        if region is None or not index.size:
            return
        shadow = region.shadow
        self.launch.atomic_bytes += index.size * shadow.itemsize
        raw = ~shadow.initialised[index]
        if raw.any():
            self._report("uninit-read", f"atomic on {region.name}[{int(index[raw][0])}]")
        self._against_writers("atomic on", region, index)
        self._against_readers(region, index, "atomic on")
        self._atomics += 1
        for i in np.unique(index).tolist():
            self._synchronise(shadow.base + i * shadow.itemsize, acquires, releases)
            shadow.updates.setdefault(i, {})[self.program] = self._atomics
        shadow.updated[index] = True
        shadow.initialised[index] = True

    # ---- order between programs

    def _synchronise(self, address: int, acquires: bool, releases: bool) -> None:
        clocks = self._clocks.setdefault(self.program, np.zeros((2, self._programs + 1), np.int32))
        there = self._released.get(address)
        if acquires and there is not None:
            np.maximum(clocks, there, out=clocks)
        if releases:
            mine = clocks.copy()
            mine[:, self.program] = self._fenced, self._atomics
            self._released[address] = mine if there is None else np.maximum(mine, there)

    def _after(self, program: NDArray, clock: NDArray, atomics: bool = False) -> NDArray:
        """Has what those programs did at those clocks (or their atomics of those numbers) been released to the present one?"""
        clocks = self._clocks.get(self.program)
        return np.zeros(program.shape, bool) if clocks is None else clocks[int(atomics)][program] >= clock

    def _against_writers(self, what: str, region: Region, index: NDArray) -> None:
        shadow = region.shadow
        writer = shadow.writer[index]
        other = (writer != 0) & (writer != self.program)
        if other.any():
            other[other] = ~self._after(writer[other], shadow.write_clock[index][other])
            if other.any():
                first = f"{region.name}[{int(index[other][0])}]"
                self._report(
                    "race", f"{what} {first}, which program {int(writer[other][0]) - 1} writes in the same launch"
                )

    def _against_readers(self, region: Region, index: NDArray, what: str = "write to") -> None:
        shadow = region.shadow
        reader = shadow.reader[index]
        other = (reader != 0) & (reader != self.program)
        if other.any():
            one = other & (reader != MANY)
            other[one] = ~self._after(reader[one], shadow.read_clock[index][one])
            if other.any():
                self._report("race", f"{what} {region.name}[{int(index[other][0])}], which another program reads")

    def _against_updates(self, what: str, region: Region, index: NDArray) -> None:
        shadow = region.shadow
        for i in np.unique(index[shadow.updated[index]]).tolist():
            programs, numbers = (np.array(list(x), np.int32) for x in zip(*shadow.updates[i].items(), strict=True))
            if not (self._after(programs, numbers, atomics=True) | (programs == self.program)).all():
                self._report("race", f"{what} {region.name}[{i}], which another program updates by an atomic")

    def _hazard(self, what: str, region: Region, index: NDArray, found: NDArray) -> None:
        if found.any():
            self._report(
                "hazard",
                f"{what} of {region.name}[{int(index[found][0])}] by other threads of one program, no tl.debug_barrier() between",
            )


def _distinct(values: NDArray) -> int:
    if not values.size:
        return 0
    steps = np.diff(values)
    return int(np.count_nonzero(steps)) + 1 if (steps >= 0).all() else int(np.unique(values).size)
