"""Memory of the PTX machine: the tensors of a launch and the shared memory of its blocks, with every access checked."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from gpu.tools.ptx_order import Order
from numpy.typing import NDArray
from torch import Tensor

SECTOR = 32
MANY = -1
"""In place of a reader's number: several."""

_MOST_GAPS = 2**28


@dataclass
class Result:
    """What one launch did. Counts of instructions are per warp."""

    kernel: str = ""
    grid: tuple[int, int, int] = (1, 1, 1)
    threads: int = 0
    findings: list[str] = field(default_factory=list)
    by_op: Counter[str] = field(default_factory=Counter)
    warp_instructions: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    load_width: Counter[int] = field(default_factory=Counter)
    """Bytes loaded, by the width of the access in bits."""
    store_width: Counter[int] = field(default_factory=Counter)
    load_sectors: int = 0
    store_sectors: int = 0
    sectors_read: NDArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Distinct 32-byte sectors that were loaded, as addresses / 32, ascending."""
    sectors_written: NDArray = field(default_factory=lambda: np.zeros(0, np.int64))
    shared_requests: int = 0
    bank_conflicts: int = 0
    """Extra cycles."""
    barriers: int = 0

    @property
    def dram_read(self) -> int:
        """Bytes; of a cache that holds what the launch touches."""
        return SECTOR * self.sectors_read.size

    @property
    def dram_written(self) -> int:
        return SECTOR * self.sectors_written.size

    def note(self, finding: str) -> None:
        if finding not in self.findings and len(self.findings) < 50:
            self.findings.append(finding)

    def __str__(self) -> str:
        efficiency = self.load_bytes / max(1, SECTOR * self.load_sectors)
        return (
            f"{self.kernel}{self.grid}: {self.warp_instructions} warp instructions; loads {self.load_bytes / 1e6:.3f} MB, "
            f"sectors used {efficiency:.2f}; DRAM read {self.dram_read / 1e6:.3f} MB, written {self.dram_written / 1e6:.3f} MB; "
            f"{self.shared_requests} shared requests, {self.bank_conflicts} bank cycles more; {self.barriers} barriers; "
            f"{self.by_op.most_common(6)}; findings {self.findings}"
        )


def traffic(launches: Iterable[Result]) -> int:
    """Bytes that DRAM must move for these launches, one after another, when caches keep what they wrote."""
    read, written = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for launch in launches:
        read = np.union1d(read, np.setdiff1d(launch.sectors_read, written))
        written = np.union1d(written, launch.sectors_written)
    return SECTOR * (read.size + written.size)


class Region:
    """One tensor. Bytes from 16-byte aligned base on; who touched what is kept per granule (an element, at most 4 bytes)."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.low = tensor.data_ptr()
        extent = 1 + sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.high = self.low + (extent * tensor.element_size() if tensor.numel() else 0)
        self.base = self.low // SECTOR * SECTOR
        size = -(-(self.high - self.base) // SECTOR) * SECTOR if tensor.numel() else 0
        memory = (ctypes.c_uint8 * size).from_address(self.base) if size else (ctypes.c_uint8 * 0)()
        raw = np.ctypeslib.as_array(memory)
        self.words = {n: raw.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.gaps = _gaps(tensor, self.base, size)
        self.granule = min(tensor.element_size(), 4)
        self.read, self.wrote = np.zeros(size // SECTOR, bool), np.zeros(size // SECTOR, bool)
        self._reads: list[tuple[NDArray, int, NDArray, NDArray, NDArray]] | None = []
        self.atomics: dict[int, dict[int, tuple[int, int, bool]]] = {}
        """By granule and block: its last atomic there, as clock, thread, and whether it or one before changed the value."""
        self._size = size

    def granules(self, offset: NDArray, size: int) -> NDArray:
        """(accesses, granules of each)."""
        return offset[:, None] // self.granule + np.arange(max(1, size // self.granule))

    def loaded(self, offset: NDArray, size: int, who: NDArray, clock: NDArray, thread: NDArray) -> None:
        if self._reads is not None:  # nobody has written yet: most tensors stay at that
            self._reads.append((offset, size, who, clock, thread))
        else:
            self._note_reads(offset, size, who, clock, thread)

    def stored_to(self) -> None:
        """Before the first store."""
        if self._reads is None:
            return
        n = self._size // self.granule
        self.writer, self.write_clock, self.write_thread = (np.zeros(n, np.int32) for _ in range(3))
        self.reader, self.read_clock, self.read_thread = (np.zeros(n, np.int32) for _ in range(3))
        self.read_warp = np.zeros(n, np.int16)  # since the last barrier, from 1
        reads, self._reads = self._reads, None
        for entry in reads:
            self._note_reads(*entry)

    @property
    def written(self) -> bool:
        return self._reads is None

    def _note_reads(self, offset: NDArray, size: int, who: NDArray, clock: NDArray, thread: NDArray) -> None:
        granules = self.granules(offset, size)
        flat = granules.reshape(-1)
        who, clock, thread = (np.repeat(x, granules.shape[1]) for x in (who, clock, thread))
        before, warp = self.reader[flat], ((thread >> 5) + 1).astype(np.int16)
        also = (before == who) & (self.read_clock[flat] == clock) & (self.read_warp[flat] != warp)
        self.read_warp[flat] = np.where(also, MANY, warp)
        self.reader[flat] = np.where((before == 0) | (before == who), who, MANY)
        # Two blocks or warps that read one granule in the same instruction.
        self.reader[flat[(self.reader[flat] != who) & (self.reader[flat] != MANY)]] = MANY
        self.read_warp[flat[(self.read_warp[flat] != warp) & (self.read_warp[flat] != MANY)]] = MANY
        self.read_clock[flat], self.read_thread[flat] = clock, thread


def _gaps(tensor: Tensor, base: int, size: int) -> NDArray | None:
    """Bytes between low and high that a strided view does not cover; None: there are none, or too many to keep."""
    if tensor.is_contiguous() or not tensor.numel() or size > _MOST_GAPS:
        return None
    item = tensor.element_size()
    mark = np.ones(size, bool)
    offset = np.array([tensor.data_ptr() - base], np.int64)
    for n, step in zip(tensor.shape, tensor.stride(), strict=True):
        offset = (offset[:, None] + np.arange(n) * step * item).reshape(-1)
    mark[(offset[:, None] + np.arange(item)).reshape(-1)] = False
    return mark if mark.any() else None


@dataclass
class Access:
    """The active lanes of one memory instruction."""

    text: str
    lane: NDArray
    """Numbers of the lanes in the batch."""
    address: NDArray
    size: int
    block: NDArray
    """Number of the block in the grid."""
    slot: NDArray
    """Number of the block in the batch."""
    thread: NDArray
    """Number of the thread in its block."""

    def only(self, keep: NDArray) -> Access:
        return Access(
            self.text,
            self.lane[keep],
            self.address[keep],
            self.size,
            self.block[keep],
            self.slot[keep],
            self.thread[keep],
        )

    @property
    def warp(self) -> NDArray:
        return self.lane // 32


class GlobalMemory:
    def __init__(self, tensors: list[tuple[str, Tensor]], blocks: int, result: Result) -> None:
        self.regions = [Region(name, tensor) for name, tensor in tensors]
        self.order = Order(blocks)
        self._result = result

    def finish(self) -> None:
        """At the end of the launch."""
        first = [region.base // SECTOR for region in self.regions]
        marks = ([region.read for region in self.regions], [region.wrote for region in self.regions])
        read, written = (
            np.unique(
                np.concatenate(
                    [np.zeros(0, np.int64), *(np.flatnonzero(m) + f for m, f in zip(of, first, strict=True))]
                )
            )
            for of in marks
        )
        self._result.sectors_read, self._result.sectors_written = read, written

    def load(self, access: Access) -> NDArray:
        """(accesses, size) bytes; what may not be read is 0xff."""
        result = self._result
        result.load_sectors += _sectors(access)
        result.load_bytes += access.lane.size * access.size
        result.load_width[8 * access.size] += access.lane.size * access.size
        out = np.full((access.lane.size, access.size), 0xFF, np.uint8)
        for region, part, offset in self._parts(access, "load"):
            out[part] = _gathered(region.words, offset, access.size)
            self._note(region, access.only(part), offset, store=False)
            region.read[offset // SECTOR] = True
        return out

    def store(self, access: Access, data: NDArray) -> None:
        """data (accesses, size) bytes."""
        result = self._result
        result.store_sectors += _sectors(access)
        result.store_bytes += access.lane.size * access.size
        result.store_width[8 * access.size] += access.lane.size * access.size
        for region, part, offset in self._parts(access, "store"):
            _scatter(region.words, offset, data[part])
            self._note(region, access.only(part), offset, store=True)
            region.wrote[offset // SECTOR] = True

    def cell(self, access: Access, i: int, acquires: bool, releases: bool, updates: bool = True) -> NDArray | None:
        """The bytes of one lane's atomic access, to be changed in place where it updates."""
        one = access.only(np.array([i]))
        for region, _, offset in self._parts(one, "atomic"):
            block, thread = int(one.block[0]), int(one.thread[0])
            granules = region.granules(offset, one.size)
            region.stored_to()
            self._against(region, one, granules, "writer", "write")
            if updates:
                self._against(region, one, granules, "reader", "read")
                region.wrote[offset // SECTOR] = True
            region.read[offset // SECTOR] = True
            for g in granules[0].tolist():
                here = region.atomics.setdefault(g, {})
                here[block] = (int(self.order.clock[block]), thread, updates or here.get(block, (0, 0, False))[2])
            self.order.atomic(block, thread, int(one.address[0]), acquires, releases)
            start = int(offset[0])
            return region.words[1][start : start + access.size]
        return None

    def _parts(self, access: Access, what: str) -> list[tuple[Region, NDArray, NDArray]]:
        """(region, which accesses, offsets from its base) of what is in bounds and aligned."""
        address, size = access.address, access.size
        todo = address % size == 0
        if not todo.all():
            self._result.note(f"misaligned {size}-byte global {what}: {access.text}")
        found, between = [], None
        for region in self.regions:
            inside = todo & (address >= region.low) & (address + size <= region.high)
            if region.gaps is not None and inside.any():
                lanes = np.flatnonzero(inside)
                gap = region.gaps[address[lanes, None] - region.base + np.arange(size)].any(1)
                inside[lanes[gap]] = False  # it may belong to another view of the storage
                between = region.name if gap.any() else between
            if not inside.any():
                continue
            todo &= ~inside
            found.append((region, np.flatnonzero(inside), address[inside] - region.base))
            if not todo.any():
                return found
        if todo.any() and between is not None:
            self._result.note(f"global {what} between the rows of {between}: {access.text}")
            return found
        if todo.any():
            self._out_of_bounds(access.only(todo), what)
        return found

    def _out_of_bounds(self, access: Access, what: str) -> None:
        first = int(access.address[0])
        where = "no tensor at all"
        if self.regions:
            near = min(self.regions, key=lambda r: min(abs(first - r.low), abs(first - r.high)))
            where = f"{first - near.low} bytes into {near.name} of {near.high - near.low}"
        self._result.note(f"out of bounds global {what}, {access.lane.size} lanes, {where}: {access.text}")

    def _note(self, region: Region, access: Access, offset: NDArray, store: bool) -> None:
        granules = region.granules(offset, access.size)
        who, clock = access.block.astype(np.int32) + 1, self.order.clock[access.block]
        self._against_atomics(region, access, granules, store)
        if not store:
            if region.written:
                self._against(region, access, granules, "writer", "write")
                self._between_warps(region, access, granules, clock, store)
            region.loaded(offset, access.size, who, clock, access.thread.astype(np.int32))
            return
        region.stored_to()
        self._against(region, access, granules, "writer", "write")
        self._against(region, access, granules, "reader", "read")
        self._between_warps(region, access, granules, clock, store)
        region.writer[granules] = who[:, None]
        if (region.writer[granules] != who[:, None]).any():  # two blocks in one instruction
            self._race(region, access)
        region.write_clock[granules] = clock[:, None]
        region.write_thread[granules] = access.thread[:, None]
        self._between_warps(region, access, granules, clock, store=False)  # two warps in one instruction

    def _between_warps(self, region: Region, access: Access, granules: NDArray, clock: NDArray, store: bool) -> None:
        """What one warp wrote no other of its block may touch before a barrier, nor may it write what another read."""
        who, now, warp = (access.block + 1)[:, None], clock[:, None], (access.thread >> 5)[:, None]
        found = (region.writer[granules] == who) & (region.write_clock[granules] == now)
        found &= region.write_thread[granules] >> 5 != warp
        if store:
            read = (region.reader[granules] == who) & (region.read_clock[granules] == now)
            found |= read & (region.read_warp[granules] != warp + 1)
        if found.any():
            self._result.note(f"global race between warps on {region.name}, no barrier between: {access.text}")

    def _race(self, region: Region, access: Access) -> None:
        self._result.note(f"global race between blocks on {region.name}: {access.text}")

    def _against_atomics(self, region: Region, access: Access, granules: NDArray, store: bool) -> None:
        for g, here in region.atomics.items():
            for i in np.flatnonzero((granules == g).any(1)).tolist():
                block = int(access.block[i])
                others = [(b, *of) for b, of in here.items() if b != block and (store or of[2])]
                if others:
                    who, clock, thread, _ = (np.array(x) for x in zip(*others, strict=True))
                    if not self.order.after(block, who, clock, thread).all():
                        self._race(region, access)

    def _against(self, region: Region, access: Access, granules: NDArray, kind: str, prefix: str) -> None:
        who = getattr(region, kind)[granules]
        other = (who != 0) & (who != access.block[:, None] + 1)
        if not other.any():
            return
        clock, thread = getattr(region, f"{prefix}_clock")[granules], getattr(region, f"{prefix}_thread")[granules]
        for block in np.unique(access.block[other.any(1)]).tolist():
            mine = other & (access.block == block)[:, None]
            if (who[mine] == MANY).any() or not self.order.after(block, who[mine] - 1, clock[mine], thread[mine]).all():
                self._race(region, access)
                return


class SharedMemory:
    """Of the blocks of one batch. Between two barriers, what one warp writes no other may touch."""

    def __init__(self, slots: int, size: int, result: Result) -> None:
        self.size = size
        self._stride = size // 16 * 16 + 32
        raw = np.full(slots * self._stride, 0xFF, np.uint8)
        self._words = {n: raw.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.initialised = np.zeros(raw.size, bool)
        self._writer, self._reader = np.zeros(raw.size, np.int32), np.zeros(raw.size, np.int32)  # warps from 1
        self._result = result

    def barrier(self, slots: NDArray) -> None:
        self._writer.reshape(-1, self._stride)[slots] = 0
        self._reader.reshape(-1, self._stride)[slots] = 0

    def load(self, access: Access) -> NDArray:
        keep, cells = self._cells(access)
        warp = access.warp[keep][:, None].astype(np.int32) + 1
        if not self.initialised[cells].all():
            self._result.note(f"uninitialised shared read: {access.text}")
        self._race(self._writer[cells], warp, access.text)
        before = self._reader[cells]
        self._reader[cells] = np.where((before == 0) | (before == warp), warp, MANY)
        self._reader[cells[(self._reader[cells] != warp) & (self._reader[cells] != MANY)]] = MANY
        out = np.full((access.lane.size, access.size), 0xFF, np.uint8)
        out[keep] = _gathered(self._words, cells[:, 0], access.size)
        return out

    def store(self, access: Access, data: NDArray) -> None:
        keep, cells = self._cells(access)
        warp = access.warp[keep][:, None].astype(np.int32) + 1
        self._race(self._writer[cells], warp, access.text)
        self._race(self._reader[cells], warp, access.text)
        self._writer[cells] = warp
        self.initialised[cells] = True
        _scatter(self._words, cells[:, 0], data[keep])
        clash = (
            self._writer[cells] != warp
        )  # two warps in one instruction; compilers let several hold and store one value
        if clash.any() and (self._words[1][cells] != data[keep])[clash].any():
            self._race(self._writer[cells], warp, access.text)

    def cell(self, access: Access, i: int) -> NDArray | None:
        """The bytes of one lane's atomic access, to be changed in place."""
        keep, cells = self._cells(access.only(np.array([i])))
        if not keep.size:
            return None
        start = int(cells[0, 0])
        self.initialised[start : start + access.size] = True
        return self._words[1][start : start + access.size]

    def pending(self, access: Access) -> NDArray:
        """Marks what an asynchronous copy writes as not yet initialised; returns the cells."""
        _, cells = self._cells(access)
        self.initialised[cells] = False
        return cells

    def _race(self, before: NDArray, warp: NDArray, text: str) -> None:
        if ((before != 0) & (before != warp)).any():
            self._result.note(f"shared-memory race between warps, no barrier between: {text}")

    def _cells(self, access: Access) -> tuple[NDArray, NDArray]:
        """(accesses that are in bounds and aligned, their bytes)."""
        address, size = access.address, access.size
        good = (address >= 0) & (address + size <= self.size)
        if not good.all():
            first = int(address[~good][0])
            self._result.note(f"out of bounds shared access at {first} of {self.size}: {access.text}")
        aligned = address % size == 0
        if not aligned.all():
            self._result.note(f"misaligned shared access: {access.text}")
        keep = np.flatnonzero(good & aligned)
        start = access.slot[keep] * self._stride + address[keep]
        if keep.size:
            self._count(access.warp[keep], address[keep], size)
        return keep, start[:, None] + np.arange(size)

    def _count(self, warp: NDArray, address: NDArray, size: int) -> None:
        """Requests, and the cycles beyond the least that their 32 banks of 4 bytes need."""
        names, place = np.unique(warp, return_inverse=True)
        words = np.unique((place.astype(np.int64) << 32) + address // 4)
        banks = np.bincount((words >> 32) * 32 + words % 32, minlength=32 * names.size).reshape(-1, 32).max(1)
        self._result.shared_requests += names.size
        self._result.bank_conflicts += int(np.maximum(banks - max(1, size // 4), 0).sum())


def _gathered(words: dict[int, NDArray], offset: NDArray, size: int) -> NDArray:
    """(accesses, size) bytes at aligned offsets."""
    word = min(size, 8)
    if size == word:
        data = words[word][offset // word]
    else:
        data = words[word][offset[:, None] // word + np.arange(size // word)]
    return np.ascontiguousarray(data).view(np.uint8).reshape(offset.size, size)


def _scatter(words: dict[int, NDArray], offset: NDArray, data: NDArray) -> None:
    size = data.shape[1]
    word = min(size, 8)
    wide = np.ascontiguousarray(data).view(f"u{word}")
    words[word][offset[:, None] // word + np.arange(size // word)] = wide


def _sectors(access: Access) -> int:
    """Sectors that each warp's request touches, summed. Accesses are aligned, so each lies in one sector."""
    key = (access.warp.astype(np.int64) << 44) + (access.address - access.address.min() // SECTOR * SECTOR) // SECTOR
    steps = np.diff(key)
    return int(np.count_nonzero(steps)) + 1 if (steps >= 0).all() else int(np.unique(key).size)
