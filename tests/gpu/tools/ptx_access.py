"""The instructions of PTX that touch memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from gpu.tools.ptx_ops import PAIRS
from gpu.tools.ptx_parse import DTYPES, Address, Group, Immediate, Instruction, Operand, Unsupported
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gpu.tools.ptx import Batch

WARP = 32


def _space(ins: Instruction) -> str:
    if ins.among("local", "const", "shared#cluster", "mbarrier", "bulk", "tensor"):
        raise Unsupported(ins.text)
    return "shared" if ins.among("shared", "shared#cta") else "param" if "param" in ins.mods else "global"


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Group) else (operand,)


def load(batch: Batch, ins: Instruction) -> None:
    space, item = _space(ins), DTYPES[ins.kind].itemsize
    targets = _parts(ins.target)
    if space == "param":
        source = ins.sources[0]
        if not isinstance(source, Address):
            raise Unsupported(ins.text)
        bases = batch.read(source.base, "u64").astype(np.int64)  # offsets may be negative
        starts = np.broadcast_to(bases, batch.on.shape)[batch.lanes.index] + source.offset
        found, which = np.unique(starts, return_inverse=True)  # blocks may have chosen among parameters
        data = np.stack([batch.parameters.memory[i : i + item * len(targets)] for i in found.astype(int).tolist()])
        columns = data.view(DTYPES[ins.kind])[which]
        for k, target in enumerate(targets):
            batch.write(target, columns[:, k], batch.lanes.index)
        return
    access = batch.access(ins, ins.sources[0], item * len(targets))
    if space == "shared":
        data = batch.shared.load(access)
    elif is_strong_load(ins):
        data = np.zeros((access.lane.size, access.size), np.uint8)
        for i in range(access.lane.size):
            cell = batch.memory.cell(access, i, "acquire" in ins.mods, releases=False, updates=False)
            data[i] = 0xFF if cell is None else cell
    else:
        data = batch.memory.load(access)
    columns = data.view(DTYPES[ins.kind])
    for k, target in enumerate(targets):
        batch.write(target, columns[:, k], access.lane)


def is_strong_load(ins: Instruction) -> bool:
    """Of what another block may be changing: an atomic that changes nothing."""
    return ins.op == "ld" and bool(ins.among("acquire", "relaxed", "volatile"))


def store(batch: Batch, ins: Instruction) -> None:
    space, dtype = _space(ins), DTYPES[ins.kind]
    if space == "param":  # of a call
        return
    if space == "global" and ins.among("release", "relaxed", "volatile"):
        raise Unsupported(ins.text)
    sources = _parts(ins.sources[0])
    access = batch.access(ins, ins.target, dtype.itemsize * len(sources))
    columns = [np.broadcast_to(batch.read(o, ins.kind), batch.on.shape)[access.lane] for o in sources]
    data = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
    if space == "shared":
        batch.shared.store(access, data)
    else:
        batch.memory.store(access, data)


_UPDATE: dict[str, Callable[..., NDArray]] = {
    "add": lambda old, a: old + a,
    "min": lambda old, a: np.minimum(old, a),
    "max": lambda old, a: np.maximum(old, a),
    "and": lambda old, a: old & a,
    "or": lambda old, a: old | a,
    "xor": lambda old, a: old ^ a,
    "exch": lambda old, a: a,
    "cas": lambda old, a, b: b if old == a else old,
    "inc": lambda old, a: old.dtype.type(0) if old >= a else old + old.dtype.type(1),
    "dec": lambda old, a: a if old == 0 or old > a else old - old.dtype.type(1),
}


def atomic(batch: Batch, ins: Instruction) -> None:
    space, dtype, returns = _space(ins), DTYPES[ins.kind], ins.op == "atom"
    name = ins.among(*_UPDATE)
    if name is None or ins.kind in ("bf16", *PAIRS):
        raise Unsupported(ins.text)
    address, *operands = ins.sources if returns else ins.operands
    access = batch.access(ins, address, dtype.itemsize)
    values = [np.broadcast_to(batch.read(o, ins.kind), batch.on.shape)[access.lane] for o in operands]
    old = np.zeros(access.lane.size, dtype)
    acquires, releases = bool(ins.among("acquire", "acq_rel")), bool(ins.among("release", "acq_rel"))
    for i in range(access.lane.size):
        if space == "shared":
            cell = batch.shared.cell(access, i)
        else:
            cell = batch.memory.cell(access, i, acquires, releases)
        if cell is not None:
            number = cell.view(dtype)
            old[i] = number[0]
            number[0] = _UPDATE[name](number[0], *(v[i] for v in values))
    if returns:
        batch.write(ins.target, old, access.lane)


def fence(batch: Batch, ins: Instruction) -> None:
    if not ins.among("cta"):
        for lane in batch.lanes.index.tolist():
            batch.memory.order.fence(int(batch.block[lane]), int(batch.thread[lane]))


def copy(batch: Batch, ins: Instruction) -> None:
    """cp.async"""
    if "async" not in ins.mods or ins.among("bulk", "mbarrier", "reduce"):
        raise Unsupported(ins.text)
    if "commit_group" in ins.mods:
        batch.copies.append([])
    elif ins.among("wait_group", "wait_all"):
        keep = (
            int(ins.operands[0].as_kind("u32")[0])
            if isinstance(ins.operands[0] if ins.operands else None, Immediate)
            else 0
        )
        while len(batch.copies) - 1 > keep:
            for cells in batch.copies.pop(0):
                batch.shared.initialised[cells] = True
    else:
        size = int(ins.operands[2].as_kind("u32")[0])  # type: ignore[union-attr]
        given = ins.operands[3] if len(ins.operands) > 3 else Immediate(str(size))
        wanted = np.broadcast_to(batch.read(given, "u32"), batch.on.shape)[batch.lanes.index]
        source = batch.access(ins, ins.operands[1], size)
        some = np.flatnonzero(wanted > 0)
        data = np.zeros((source.lane.size, size), np.uint8)
        if some.size:
            data[some] = batch.memory.load(source.only(some))
        data[np.arange(size) >= wanted[:, None]] = 0
        target = batch.access(ins, ins.operands[0], size)
        batch.shared.store(target, data)
        batch.copies[-1].append(batch.shared.pending(target))


def matrix(batch: Batch, ins: Instruction) -> None:
    """ldmatrix and stmatrix: 8 x 8 matrices of 16 bits. Lane 8 k + r has the address of row r of matrix k; of matrix k, lane t holds
    row t // 4, columns 2 (t % 4) and the next."""
    store = ins.op == "stmatrix"
    address, registers = (ins.operands[0], ins.operands[1]) if store else (ins.operands[1], ins.operands[0])
    parts = _parts(registers)
    if "m8n8" not in ins.mods or _space(ins) != "shared":
        raise Unsupported(ins.text)
    if not batch.on.reshape(-1, WARP)[batch.on.reshape(-1, WARP).any(1)].all():
        batch.result.note(f"matrix access without some lanes of the warp: {ins.text}")
    rows = batch.lanes.index[batch.lane[batch.lanes.index] < 8 * len(parts)]
    access = batch.access(ins, address, 16, rows)
    warps = -1, len(parts), 8, 8
    if store:
        held = [np.broadcast_to(batch.read(x, "b32"), batch.on.shape)[batch.lanes.index] for x in parts]
        data = np.stack([np.ascontiguousarray(x).view(np.uint16).reshape(-1, 8, 8) for x in held], 1)
        data = data.swapaxes(2, 3) if "trans" in ins.mods else data
        batch.shared.store(access, np.ascontiguousarray(data).reshape(-1, 8).view(np.uint8))
    else:
        data = batch.shared.load(access).view(np.uint16).reshape(warps)
        data = data.swapaxes(2, 3) if "trans" in ins.mods else data
        for k, target in enumerate(parts):
            batch.write(target, np.ascontiguousarray(data[:, k]).view(np.uint32).reshape(-1), batch.lanes.index)
