"""Products of a warp on tensor cores: mma.sync of 16 x 16 by 16 x 8 numbers of 16 bits, summed in fp32 (PTX ISA 9.0, section 9.7.15).

Which element of a tile lies in which register of which lane is as the manual draws it. Products are exact, and so is their sum with what was
there until it is rounded to fp32, once; hardware adds in groups and cuts the lowest bits, so its results differ by units in the last place.
wgmma, tcgen05 and other shapes and types raise Unsupported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from gpu.tools.numerics import bf16_to_f32
from gpu.tools.ptx_parse import Group, Instruction, Operand, Unsupported
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gpu.tools.ptx import Batch

_LANE = np.arange(32)
_GROUP, _PAIR = _LANE >> 2, 2 * (_LANE & 3)
"""Row of the first and the third operand, column of the second; first of two columns, or rows."""


def product(batch: Batch, ins: Instruction) -> None:
    """d = a b + c"""
    kind = next((k for k in ("bf16", "f16") if f".f32.{k}.{k}.f32" in ins.text), None)
    if kind is None or not {"sync", "m16n8k16", "row", "col"} <= set(ins.mods):
        raise Unsupported(ins.text)
    active = batch.on.reshape(-1, 32)
    if not active[active.any(1)].all():
        batch.result.note(f"product without some lanes of the warp: {ins.text}")
    warps = active.shape[0]
    a, b, c = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    for i, pair in enumerate(_halves(batch, ins.operands[1], kind)):
        a[:, _GROUP + 8 * (i % 2), _PAIR + 8 * (i // 2)] = pair[..., 0]
        a[:, _GROUP + 8 * (i % 2), _PAIR + 8 * (i // 2) + 1] = pair[..., 1]
    for i, pair in enumerate(_halves(batch, ins.operands[2], kind)):
        b[:, _PAIR + 8 * i, _GROUP] = pair[..., 0]
        b[:, _PAIR + 8 * i + 1, _GROUP] = pair[..., 1]
    for i, operand in enumerate(_parts(ins.operands[3], ins)):
        values = np.broadcast_to(batch.read(operand, "f32"), batch.on.shape)
        c[:, _GROUP + 8 * (i // 2), _PAIR + i % 2] = values.reshape(warps, 32)
    d = (a @ b + c).astype(np.float32)
    for i, operand in enumerate(_parts(ins.operands[0], ins)):
        batch.write(operand, np.ascontiguousarray(d[:, _GROUP + 8 * (i // 2), _PAIR + i % 2]).reshape(-1))


def _parts(operand: Operand, ins: Instruction) -> tuple[Operand, ...]:
    if not isinstance(operand, Group):
        raise Unsupported(ins.text)
    return operand.parts


def _halves(batch: Batch, operand: Operand, kind: str) -> list[NDArray]:
    """Of every register (warps, 32, 2) numbers."""
    found = []
    for part in operand.parts if isinstance(operand, Group) else (operand,):
        raw = np.ascontiguousarray(np.broadcast_to(batch.read(part, "b32"), batch.on.shape))
        if kind == "bf16":
            values = bf16_to_f32(raw.view(np.uint16))
        else:
            values = raw.view(np.float16)
        found.append(values.astype(np.float64).reshape(-1, 32, 2))
    return found
