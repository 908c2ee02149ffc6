"""Executes compiled PTX on the CPU: the threads of many blocks at once, as numpy lanes.

    result = PTX(compiled.asm["ptx"]).launch(grid=(N,), block=(256,), args=[x, y, out, 50257], shared=1024)
    result.findings            # [] when clean
    result.warp_instructions, result.by_op, result.load_sectors, result.dram_read, ...

It checks what the compiler made, not the source: types, masks, vector widths, alignment, barriers. Findings: global accesses out
of bounds, between the rows of a strided tensor or misaligned; races between blocks that no atomic orders; shared memory out
of bounds, misaligned, read before it is written, or touched by two warps with no barrier between; barriers that some
threads of a block never reach; warp collectives that name absent lanes; failed device asserts; no end.

Lanes run in lockstep, the smallest program counter first, so divergent branches meet again as they do on a GPU; a block in a
loop around an atomic runs on when all others have ended, wait or do the same. cp.async
copies at once, and its bytes count as uninitialised until their wait_group. Tensor cores other than by mma.sync, TMA, mbarriers,
clusters and local memory raise Unsupported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
from gpu.tools import ptx_access, ptx_mma, ptx_ops
from gpu.tools.ptx_memory import Access, GlobalMemory, Result, SharedMemory
from gpu.tools.ptx_parse import (
    BITS,
    DTYPES,
    Address,
    Immediate,
    Instruction,
    Operand,
    Register,
    Unsupported,
    name_of,
    parse,
)
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["PTX", "Result", "Unsupported"]

WARP = 32


class Lanes:
    """A set of the lanes of a batch."""

    def __init__(self, mask: NDArray) -> None:
        self.mask = mask

    @cached_property
    def index(self) -> NDArray:
        return np.flatnonzero(self.mask)

    @cached_property
    def every(self) -> bool:
        return bool(self.mask.all())

    @cached_property
    def warps(self) -> int:
        return int(self.mask.reshape(-1, WARP).any(1).sum())

    @property
    def any(self) -> bool:
        return self.warps > 0

    def __and__(self, mask: NDArray) -> Lanes:
        return Lanes(self.mask & mask)


class PTX:
    """One kernel. entry: its name; the first of the module when left out."""

    def __init__(self, text: str, entry: str | None = None) -> None:
        self.kernel = parse(text, entry)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Tensor | float | int | bytes],
        shared: int = 0,
        *,
        names: Sequence[str] = (),
        regions: Mapping[str, Tensor] | None = None,
        at_once: int = 64,
        limit: int = 500_000,
    ) -> Result:
        """args: CPU tensors and numbers, or bytes for a structure; parameters beyond them are null (Triton's scratch pointers).

        shared: bytes of dynamic shared memory. names: of the arguments, for the findings. regions: further tensors that the kernel reaches through pointers in memory.
        at_once: blocks that run together. limit: instructions of one batch before it counts as endless.
        """
        grid = tuple(grid) + (1,) * (3 - len(grid))
        block = tuple(block) + (1,) * (3 - len(block))
        threads, blocks = int(np.prod(block)), int(np.prod(grid))
        if threads % WARP:
            raise ValueError(f"launch: argument 'block' got {threads} threads, expected whole warps")
        result = Result(self.kernel.name, grid, threads)
        declared = self.kernel.parameters
        if len(args) > len(declared):
            raise ValueError(f"launch: {self.kernel.name} takes {len(declared)} arguments, got {len(args)}")
        named = zip(names or declared, args, strict=False)
        tensors = [(name, x) for name, x in named if isinstance(x, Tensor)] + list((regions or {}).items())
        memory = GlobalMemory(tensors, blocks, result)
        values = [*args, *[0] * (len(declared) - len(args))]
        given = [_parameter(x, *of) for of, x in zip(declared.values(), values, strict=True)]
        parameters = Parameters(list(declared), given)
        for first in range(0, blocks, at_once):
            numbers = np.arange(first, min(first + at_once, blocks))
            if not Batch(self, memory, result, parameters, numbers, grid, block, shared).run(limit):
                result.note(f"no end after {limit} instructions")
                break
        memory.finish()
        return result


class Parameters:
    """The parameter space: where each begins, and its bytes."""

    def __init__(self, names: list[str], given: list[NDArray]) -> None:
        padded = [np.pad(x, (0, -x.size % 16)) for x in given]
        starts = np.cumsum([0, *(x.size for x in padded)])
        self.at = {name: Immediate(str(start)) for name, start in zip(names, starts.tolist(), strict=False)}
        self.memory = np.concatenate([np.zeros(0, np.uint8), *padded])


def _parameter(value: Tensor | float | int | bytes, kind: str, size: int) -> NDArray:
    """The bytes of a parameter."""
    if isinstance(value, Tensor):
        value = value.data_ptr()
    if isinstance(value, bytes):
        if len(value) != size:
            raise ValueError(f"launch: a structure of {size} bytes got {len(value)}")
        return np.frombuffer(value, np.uint8)
    if isinstance(value, float) or kind[0] == "f":
        return np.array([value], f"f{size}").view(np.uint8)
    return np.array([int(value) & ((1 << 8 * size) - 1)], f"u{size}").view(np.uint8)


class Batch:
    """Several blocks that run together."""

    def __init__(
        self,
        ptx: PTX,
        memory: GlobalMemory,
        result: Result,
        parameters: Parameters,
        numbers: NDArray,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        shared: int,
    ) -> None:
        kernel = ptx.kernel
        self.kernel, self.memory, self.result, self.parameters = kernel, memory, result, parameters
        self._threads, self._blocks = int(np.prod(block)), numbers
        count = self._threads * numbers.size
        self.thread = np.tile(np.arange(self._threads), numbers.size)
        self.slot = np.repeat(np.arange(numbers.size), self._threads)
        self.block = numbers[self.slot]
        self.lane = self.thread % WARP
        self._special = _special_registers(self.thread, self.block, grid, block)
        self._registers = {name: _undefined(count, kind) for name, kind in kernel.registers.items()}
        self.shared = SharedMemory(numbers.size, kernel.static_shared + shared, result)
        shared_symbols = {
            name: Immediate(str(kernel.static_shared if offset is None else offset))
            for name, offset in kernel.shared.items()
        }
        self._symbols = shared_symbols | parameters.at
        self.copies: list[list[NDArray]] = [[]]  # of each uncommitted or pending group of cp.async: its bytes
        self.lanes = Lanes(np.ones(count, bool))

    @property
    def on(self) -> NDArray:
        """Lanes that execute the current instruction."""
        return self.lanes.mask

    # ---- control

    def run(self, limit: int) -> bool:
        """False: no end within so many instructions."""
        code, result = self.kernel.code, self.result
        ready: dict[int, Lanes] = {0: self.lanes}  # by what they execute next
        waiting: dict[int, Lanes] = {}  # at a barrier
        parked: dict[int, Lanes] = {}  # in a loop that looks for what another block does
        exited = np.zeros(self.lanes.mask.size, bool)
        for _ in range(limit):
            if not ready:
                released = self._release(waiting, parked, exited)
                ready, parked = (released, parked) if released else (parked, {})
                if not ready:
                    return True
            at = min(ready)
            lanes = ready.pop(at)
            if at == len(code):
                exited |= lanes.mask
                continue
            ins = code[at]
            taken, rest = lanes, None
            if ins.guard is not None:
                guard = self.read(ins.guard, "pred")
                taken, rest = lanes & guard, lanes & ~guard
            counted = lanes.warps if ins.op == "bra" else taken.warps
            result.warp_instructions += counted
            result.by_op[_counted_name(ins)] += counted
            if ins.op == "bra":
                target = self.kernel.labels[name_of(ins.target)]
                looks = target <= at and any(x.op == "atom" or ptx_access.is_strong_load(x) for x in code[target:at])
                _join(parked if looks else ready, target, taken)
                _join(ready, at + 1, rest)
            elif ins.op in ("ret", "exit"):
                exited |= taken.mask
                _join(ready, at + 1, rest)
            elif _is_block_barrier(ins, self._threads):
                _join(waiting, at + 1, taken)
                _join(ready, at + 1, rest)
            else:
                if taken.any:
                    self.lanes = taken
                    with np.errstate(all="ignore"):
                        _HANDLERS.get(ins.op, ptx_ops.elementwise)(self, ins)
                _join(ready, at + 1, lanes)
        return False

    def _release(self, waiting: dict[int, Lanes], parked: dict[int, Lanes], exited: NDArray) -> dict[int, Lanes]:
        """Nobody runs any more: takes out of `waiting` the blocks whose living threads all wait."""
        rows = (-1, self._threads)
        looking = sum((lanes.mask.reshape(rows).any(1) for lanes in parked.values()), np.zeros(self._blocks.size, bool))
        places = {at: lanes.mask.reshape(rows).any(1) & ~looking for at, lanes in waiting.items()}
        slots = sum(places.values(), np.zeros(self._blocks.size, bool))
        if not slots.any():
            return {}
        if (np.stack(list(places.values())).sum(0) > 1).any():
            self.result.note("the threads of a block wait at different barriers")
        if exited.reshape(rows)[slots].any():
            self.result.note("a barrier was passed though threads of the block had already ended")
        self.result.barriers += int(slots.sum())
        self.shared.barrier(slots)
        self.memory.order.barrier(self._blocks[slots])
        released: dict[int, Lanes] = {}
        chosen = slots[self.slot]
        for at, lanes in list(waiting.items()):
            _join(released, at, lanes & chosen)
            del waiting[at]
            _join(waiting, at, lanes & ~chosen)
        return released

    # ---- registers

    def read(self, operand: Operand, kind: str) -> NDArray:
        """The operand as that type: one element per lane, or one for all."""
        if isinstance(operand, Immediate):
            return operand.as_kind(kind)
        name = name_of(operand)
        if name in self._registers:
            values = self._registers[name]
            if kind == "pred":
                return ~values if isinstance(operand, Register) and operand.negated else values
            dtype = DTYPES[kind]
            if values.itemsize != dtype.itemsize:
                values = values.astype(BITS[dtype.itemsize])
            return values.view(dtype)
        if name in self._symbols:
            return self._symbols[name].as_kind(kind)
        if name in self._special:
            return self._special[name].astype(DTYPES[kind])
        raise Unsupported(f"operand {name}")

    def write(self, operand: Operand, values: NDArray, lanes: NDArray | None = None) -> None:
        """values: per lane of the batch or one for all; with `lanes`, one for each of these."""
        name = name_of(operand)
        if name == "_":
            return
        register = self._registers[name]
        if register.dtype != np.bool_:
            values = _resized(values, register.dtype)
        if lanes is not None:
            register[lanes] = values
        elif self.lanes.every:
            register[:] = values
        else:
            np.copyto(register, values, where=self.lanes.mask)

    def access(self, ins: Instruction, operand: Operand, size: int, lanes: NDArray | None = None) -> Access:
        if not isinstance(operand, Address):
            raise Unsupported(ins.text)
        index = self.lanes.index if lanes is None else lanes
        base = np.broadcast_to(self.read(operand.base, "s64"), self.on.shape)[index]
        if isinstance(operand.base, Register) and self._registers[operand.base.name].itemsize == 4:
            base = base & 0xFFFFFFFF
        return Access(
            ins.text, index, base + operand.offset, size, self.block[index], self.slot[index], self.thread[index]
        )


def _undefined(count: int, kind: str) -> NDArray:
    """A register that nothing was written to: NaN in every float format, and a number in every second thread."""
    if kind == "pred":
        return np.zeros(count, np.bool_)
    dtype = BITS[DTYPES[kind].itemsize]
    nan = {1: 0x5A, 2: 0x7FC1, 4: 0x7FC17FC1, 8: 0x7FFA5A5A7FC17FC1}[dtype.itemsize]
    number = {1: 0x5B, 2: 0x4B1A, 4: 0x4B1A4B1A, 8: 0x4B1A5A5A4B1A4B1A}[dtype.itemsize]
    found = np.full(count, nan, dtype)
    found[1::2] = number
    return found


def _special_registers(
    thread: NDArray, block_number: NDArray, grid: Sequence[int], block: Sequence[int]
) -> dict[str, NDArray]:
    found = {"%laneid": thread % WARP, "%warpid": thread // WARP, "WARP_SZ": np.array([WARP])}
    for name, number, extent, count in (("tid", thread, block, "ntid"), ("ctaid", block_number, grid, "nctaid")):
        for axis, letter in enumerate("xyz"):
            found[f"%{name}.{letter}"] = number // int(np.prod(extent[:axis])) % extent[axis]
            found[f"%{count}.{letter}"] = np.array([extent[axis]])
    return found


def _resized(values: NDArray, dtype: np.dtype) -> NDArray:
    """Bit patterns of the register's width; signed integers are extended by their sign."""
    values = np.ascontiguousarray(values)
    if values.dtype == np.bool_:
        return values.astype(dtype)
    if values.itemsize < dtype.itemsize:
        if values.dtype.kind == "i":
            return values.astype(f"i{dtype.itemsize}").view(dtype)
        return values.view(BITS[values.itemsize]).astype(dtype)
    if values.itemsize > dtype.itemsize:
        return values.view(BITS[values.itemsize]).astype(dtype)
    return values.view(dtype)


def _join(groups: dict[int, Lanes], at: int, lanes: Lanes | None) -> None:
    if lanes is None or not lanes.any:
        return
    groups[at] = Lanes(groups[at].mask | lanes.mask) if at in groups else lanes


def _counted_name(ins: Instruction) -> str:
    if ins.op in ("ld", "st", "atom", "cp", "ex2"):
        return ".".join([ins.op, *ins.mods[:1]])
    return ins.op


def _is_block_barrier(ins: Instruction, threads: int) -> bool:
    if ins.op not in ("bar", "barrier") or "warp" in ins.mods:
        return False
    numbers = [int(o.as_kind("u32")[0]) if isinstance(o, Immediate) else -1 for o in ins.operands]
    if "sync" not in ins.mods or numbers[:1] not in ([0], []) or numbers[1:] not in ([], [threads]):
        raise Unsupported(ins.text)
    return True


def _call(batch: Batch, ins: Instruction) -> None:
    if "__assertfail" not in ins.text:
        raise Unsupported(ins.text)
    batch.result.note("device_assert failed")


def _nothing(batch: Batch, ins: Instruction) -> None:
    """Caching hints and waits within a warp: lanes run in lockstep."""


_HANDLERS: dict[str, Callable[[Batch, Instruction], None]] = {
    "ld": ptx_access.load,
    "ldu": ptx_access.load,
    "st": ptx_access.store,
    "atom": ptx_access.atomic,
    "red": ptx_access.atomic,
    "membar": ptx_access.fence,
    "fence": ptx_access.fence,
    "cp": ptx_access.copy,
    "ldmatrix": ptx_access.matrix,
    "stmatrix": ptx_access.matrix,
    "mma": ptx_mma.product,
    "call": _call,
    "trap": lambda batch, ins: batch.result.note("trap reached"),
    "mov": ptx_ops.mov,
    "cvta": ptx_ops.mov,
    "cvt": ptx_ops.cvt,
    "setp": ptx_ops.setp,
    "selp": ptx_ops.selp,
    **dict.fromkeys(("shfl", "vote", "redux", "activemask", "elect"), ptx_ops.warp),
    **dict.fromkeys(
        ("bar", "nanosleep", "prefetch", "griddepcontrol", "discard", "createpolicy", "applypriority"), _nothing
    ),
}
