"""What the instructions of PTX compute. Everything is exact, or rounded once more: the .approx instructions of a GPU differ by
a few units in the last place, and flush denormals where .ftz is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu.tools.numerics import bf16_to_f32, f32_to_bf16, tf32
from gpu.tools.ptx_parse import BITS, DTYPES, Group, Instruction, Unsupported
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gpu.tools.ptx import Batch

FLOATS = {"f16", "f32", "f64", "bf16", "f16x2", "bf16x2", "f32x2"}
PAIRS = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}


def _decoded(kind: str, raw: NDArray) -> NDArray:
    """Register contents as numbers; pairs get a last dimension of 2."""
    if kind in PAIRS:
        half = PAIRS[kind]
        parts = np.ascontiguousarray(raw).view(DTYPES[half]).reshape(-1, 2)
        return bf16_to_f32(parts) if half == "bf16" else parts
    return bf16_to_f32(raw) if kind == "bf16" else raw


def _encoded(kind: str, values: NDArray) -> NDArray:
    single = PAIRS.get(kind, kind)
    raw = f32_to_bf16(values) if single == "bf16" else values.astype(DTYPES[single])
    return np.ascontiguousarray(raw).view(DTYPES[kind]).reshape(-1) if kind in PAIRS else raw


# ---- floating point: of (instruction, operands)


def _fma(ins: Instruction, a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    return a.astype(np.float64) * b + c


def _extreme(plain: Callable[..., Any], number: Callable[..., Any]) -> Callable[..., NDArray]:
    def of(ins: Instruction, *values: NDArray) -> NDArray:
        chosen = plain if "NaN" in ins.mods else number
        out = chosen(values[0], values[1])
        return chosen(out, values[2]) if len(values) > 2 else out

    return of


_FLOAT: dict[str, Callable[..., NDArray]] = {
    "add": lambda _, a, b: a + b,
    "sub": lambda _, a, b: a - b,
    "mul": lambda _, a, b: a * b,
    "fma": _fma,
    "mad": _fma,
    "min": _extreme(np.minimum, np.fmin),
    "max": _extreme(np.maximum, np.fmax),
    "neg": lambda _, a: -a,
    "abs": lambda _, a: np.abs(a),
    "div": lambda _, a, b: a / b,
    "rcp": lambda _, a: 1 / a,
    "sqrt": lambda _, a: np.sqrt(a),
    "rsqrt": lambda _, a: 1 / np.sqrt(a),
    "ex2": lambda _, a: np.exp2(a),
    "lg2": lambda _, a: np.log2(a),
    "sin": lambda _, a: np.sin(a),
    "cos": lambda _, a: np.cos(a),
    "tanh": lambda _, a: np.tanh(a),
    "copysign": lambda _, a, b: np.copysign(b, a),
}


_MIXED = ("add", "sub", "fma")
"""Instructions with a form for mixed precision, as in sub.f32.bf16 (PTX ISA 9.0, section 9.7.5)."""


# ---- integers


def _high(a: NDArray, b: NDArray) -> NDArray:
    """Upper half of the product."""
    if a.itemsize <= 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.itemsize)).astype(a.dtype)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    xl, xh, yl, yh = x & low, x >> shift, y & low, y >> shift
    middle = xh * yl + ((xl * yl) >> shift)
    other = xl * yh + (middle & low)
    out = xh * yh + (middle >> shift) + (other >> shift)
    if a.dtype.kind == "i":
        out = out - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return out.view(a.dtype)


def _product(ins: Instruction, a: NDArray, b: NDArray) -> NDArray:
    if "wide" in ins.mods:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
        return a.astype(wide) * b.astype(wide)
    return _high(a, b) if "hi" in ins.mods else a * b


def _quotient(ins: Instruction, a: NDArray, b: NDArray) -> NDArray:
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, ~a.dtype.type(0), (a - np.fmod(a, safe)) // safe)


def _shift(left: bool) -> Callable[..., NDArray]:
    def of(ins: Instruction, a: NDArray, count: NDArray) -> NDArray:
        bits = 8 * a.itemsize
        within = np.minimum(count, bits - 1).astype(a.dtype)
        out = a << within if left else a >> within
        beyond = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" and not left else a.dtype.type(0)
        return np.where(count >= bits, beyond, out)

    return of


def _funnel(ins: Instruction, low: NDArray, high: NDArray, count: NDArray) -> NDArray:
    count = (count & np.uint32(31) if "wrap" in ins.mods else np.minimum(count, np.uint32(32))).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    return ((both << count) >> np.uint64(32) if "l" in ins.mods else both >> count).astype(np.uint32)


def _lop3(ins: Instruction, a: NDArray, b: NDArray, c: NDArray, table: NDArray) -> NDArray:
    out = np.zeros(1, np.uint32)
    for k in range(8):
        if int(table[0]) >> k & 1:
            out = out | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def _prmt(ins: Instruction, a: NDArray, b: NDArray, selector: NDArray) -> NDArray:
    if ins.among("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        raise Unsupported(ins.text)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(1, np.uint32)
    for k in range(4):
        chosen = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = (both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out = out | np.where(chosen & np.uint32(8), sign, byte) << np.uint32(8 * k)
    return out


def _field_mask(position: NDArray, length: NDArray) -> tuple[NDArray, NDArray]:
    position, length = (np.minimum(x & np.uint32(255), 63).astype(np.uint64) for x in (position, length))
    return position, (np.uint64(1) << length) - np.uint64(1)


def _bfe(ins: Instruction, a: NDArray, position: NDArray, length: NDArray) -> NDArray:
    position, mask = _field_mask(position, length)
    signed = a.dtype.kind == "i"
    wide = a.astype(np.int64).view(np.uint64) if signed else a.astype(np.uint64)
    out = (wide >> position) & mask
    if signed:
        negative = (out & (mask ^ (mask >> np.uint64(1)))) != 0
        out = np.where(negative, out | ~mask, out)
    return out.astype(BITS[a.itemsize])


def _bfi(ins: Instruction, a: NDArray, into: NDArray, position: NDArray, length: NDArray) -> NDArray:
    position, mask = _field_mask(position, length)
    kept = into.astype(np.uint64) & ~(mask << position)
    return (kept | (a.astype(np.uint64) & mask) << position).astype(a.dtype)


def _brev(ins: Instruction, a: NDArray) -> NDArray:
    out, bits = np.zeros_like(a), 8 * a.itemsize
    for k in range(bits):
        out |= ((a >> a.dtype.type(k)) & a.dtype.type(1)) << a.dtype.type(bits - 1 - k)
    return out


def _clz(ins: Instruction, a: NDArray) -> NDArray:
    return (8 * a.itemsize - np.frompyfunc(lambda x: int(x).bit_length(), 1, 1)(a).astype(np.int64)).astype(np.uint32)


_INTEGER: dict[str, Callable[..., NDArray]] = {
    "add": lambda _, a, b: a + b,
    "sub": lambda _, a, b: a - b,
    "mul": _product,
    "div": _quotient,
    "rem": lambda _, a, b: np.fmod(a, np.where(b == 0, b.dtype.type(1), b)),
    "min": _extreme(np.minimum, np.minimum),
    "max": _extreme(np.maximum, np.maximum),
    "neg": lambda _, a: np.negative(a),
    "abs": lambda _, a: np.abs(a),
    "and": lambda _, a, b: a & b,
    "or": lambda _, a, b: a | b,
    "xor": lambda _, a, b: a ^ b,
    "not": lambda _, a: ~a,
    "shl": _shift(left=True),
    "shr": _shift(left=False),
    "shf": _funnel,
    "lop3": _lop3,
    "prmt": _prmt,
    "bfe": _bfe,
    "bfi": _bfi,
    "brev": _brev,
    "popc": lambda _, a: np.bitwise_count(a).astype(np.uint32),
    "clz": _clz,
}

# Types of operands that differ from the instruction's, by position among the sources.
_OTHER_KINDS = {
    "shl": {1: "u32"},
    "shr": {1: "u32"},
    "shf": {2: "u32"},
    "bfe": {1: "u32", 2: "u32"},
    "bfi": {2: "u32", 3: "u32"},
}


def elementwise(batch: Batch, ins: Instruction) -> None:
    kind = ins.kind
    if kind in FLOATS:
        function = _FLOAT.get(ins.op)
        if function is None or ins.among("relu", "rz", "rm", "rp"):
            raise Unsupported(ins.text)
        kinds = [kind] * len(ins.sources)
        if ins.op in _MIXED and len(ins.kinds) > 1:  # all but the last operand are narrower
            kinds = [*[ins.kinds[1]] * (len(kinds) - 1), kind]
        values = function(ins, *(_decoded(k, batch.read(o, k)) for o, k in zip(ins.sources, kinds, strict=True)))
        if "sat" in ins.mods:
            values = np.fmin(np.fmax(values, 0), 1)
        batch.write(ins.target, _encoded(kind, values))
        return
    if ins.among("cc", "sat"):
        raise Unsupported(ins.text)
    if ins.op == "mad":
        a, b = (batch.read(o, kind) for o in ins.sources[:2])
        product = _product(ins, a, b)
        sum_kind = f"{kind[0]}{8 * product.itemsize}"
        batch.write(ins.target, product + batch.read(ins.sources[2], sum_kind))
        return
    function = _INTEGER.get(ins.op)
    if function is None:
        raise Unsupported(ins.text)
    others = _OTHER_KINDS.get(ins.op, {})
    values = function(ins, *(batch.read(o, others.get(i, kind)) for i, o in enumerate(ins.sources)))
    batch.write(ins.target, values)


# ---- comparisons, selections, moves, conversions

_COMPARE: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def setp(batch: Batch, ins: Instruction) -> None:
    kind, name = ins.kind, ins.mods[0]
    a, b = (_decoded(kind, batch.read(o, kind)) for o in ins.sources[:2])
    if kind in FLOATS:
        nan = np.isnan(a) | np.isnan(b)
        if name in ("nan", "num"):
            values = nan if name == "nan" else ~nan
        elif name in _COMPARE:
            values = _COMPARE[name](a, b) & ~nan
        else:
            values = _COMPARE[name.removesuffix("u")](a, b) | nan
    else:
        values = _COMPARE[name](a, b)
    join = ins.among("and", "or", "xor")
    both = (values, ~values)
    if join:
        third = batch.read(ins.sources[2], "pred")
        function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join]
        both = (function(both[0], third), function(both[1], third))
    if isinstance(ins.target, Group):
        batch.write(ins.target.parts[0], both[0])
        batch.write(ins.target.parts[1], both[1])
    else:
        batch.write(ins.target, both[0])


def selp(batch: Batch, ins: Instruction) -> None:
    yes, no = (batch.read(o, ins.kind) for o in ins.sources[:2])
    batch.write(ins.target, np.where(batch.read(ins.sources[2], "pred"), yes, no))


def mov(batch: Batch, ins: Instruction) -> None:
    source = ins.sources[0]
    if isinstance(ins.target, Group):
        whole = batch.read(source, f"b{8 * DTYPES[ins.kind].itemsize}")
        bits = 8 * whole.itemsize // len(ins.target.parts)
        for k, part in enumerate(ins.target.parts):
            batch.write(part, (whole >> whole.dtype.type(k * bits)).astype(BITS[bits // 8]))
    elif isinstance(source, Group):
        dtype = BITS[DTYPES[ins.kind].itemsize]
        bits = 8 * dtype.itemsize // len(source.parts)
        out = np.zeros(1, dtype)
        for k, part in enumerate(source.parts):
            out = out | batch.read(part, f"b{bits}").astype(dtype) << dtype.type(k * bits)
        batch.write(ins.target, out)
    else:
        batch.write(ins.target, batch.read(source, ins.kind))


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def cvt(batch: Batch, ins: Instruction) -> None:
    if "tf32" in ins.mods:
        batch.write(ins.target, tf32(batch.read(ins.sources[0], "f32")))
        return
    to, source = ins.kinds[0], ins.kinds[1]
    values = [_decoded(source, batch.read(o, source)) for o in ins.sources]
    from_float = source in FLOATS
    if ins.among("rz", "rm", "rp", "relu", "satfinite") or (source in PAIRS):
        raise Unsupported(ins.text)
    rounding = ins.among(*_ROUND)
    if to in PAIRS:  # the first operand is the upper half
        both = np.stack(np.broadcast_arrays(values[1], values[0]), -1)
        batch.write(ins.target, _encoded(to, both))
    elif to in FLOATS:
        out = _ROUND[rounding](values[0]) if rounding and from_float else values[0]
        if "sat" in ins.mods:
            out = np.fmin(np.fmax(out, 0), 1)
        batch.write(ins.target, _encoded(to, out.astype(np.float32) if to == "bf16" else out))
    elif from_float:
        batch.write(ins.target, _to_integer(_ROUND[rounding or "rzi"](values[0].astype(np.float64)), DTYPES[to]))
    elif "sat" in ins.mods:
        raise Unsupported(ins.text)
    else:
        batch.write(ins.target, values[0].astype(DTYPES[to]))


def _to_integer(values: NDArray, dtype: np.dtype) -> NDArray:
    """Saturating; NaN gives 0."""
    info = np.iinfo(dtype)
    above, below = values >= float(info.max), values <= float(info.min)
    inside = np.where(above | below | np.isnan(values), 0, values).astype(dtype)
    return np.where(above, dtype.type(info.max), np.where(below, dtype.type(info.min), inside))


# ---- between the lanes of a warp


def warp(batch: Batch, ins: Instruction) -> None:
    lane = batch.lane
    active = batch.on.reshape(-1, 32)
    ones = np.uint64(1) << np.arange(32, dtype=np.uint64)
    bits = (active * ones).sum(1).astype(np.uint32)
    if ins.op == "activemask":
        batch.write(ins.target, np.repeat(bits, 32))
        return
    members = np.broadcast_to(batch.read(ins.operands[-1], "b32"), batch.on.shape).reshape(-1, 32)
    if ((members & ~bits[:, None])[active] != 0).any():
        batch.result.note(f"warp collective whose mask names lanes that are elsewhere: {ins.text}")
    if ins.op == "elect":
        first = np.repeat(active.argmax(1), 32)
        if isinstance(ins.target, Group):
            batch.write(ins.target.parts[0], first.astype(np.uint32))
            batch.write(ins.target.parts[1], lane == first)
    elif ins.op == "shfl":
        _shuffle(batch, ins)
    elif ins.op == "vote":
        flags = np.broadcast_to(batch.read(ins.sources[0], "pred"), batch.on.shape).reshape(-1, 32)
        if "ballot" in ins.mods:
            batch.write(ins.target, np.repeat(((flags & active) * ones).sum(1).astype(np.uint32), 32))
        elif ins.among("any", "all"):
            out = (flags & active).any(1) if "any" in ins.mods else (flags | ~active).all(1)
            batch.write(ins.target, np.repeat(out, 32))
        else:
            raise Unsupported(ins.text)
    elif ins.op == "redux":
        _reduce(batch, ins, active)
    else:
        raise Unsupported(ins.text)


def _shuffle(batch: Batch, ins: Instruction) -> None:
    lane = batch.lane
    value = np.broadcast_to(batch.read(ins.sources[0], "b32"), batch.on.shape)
    by = batch.read(ins.sources[1], "u32").astype(np.int64) & 31
    control = batch.read(ins.sources[2], "u32").astype(np.int64)
    segment, clamp = (control >> 8) & 31, control & 31
    lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment)
    mode = ins.among("bfly", "down", "up", "idx")
    source = {
        "bfly": lane ^ by,
        "down": lane + by,
        "up": lane - by,
        "idx": lowest | (by & ~segment & 31),
    }[str(mode)]
    valid = source >= highest if mode == "up" else source <= highest
    source = np.where(valid, source, lane)
    start = np.arange(lane.size) - lane
    if not batch.on[start + source][batch.on].all():
        batch.result.note(f"shuffle from a lane that does not take part: {ins.text}")
    target = ins.target.parts if isinstance(ins.target, Group) else (ins.target,)
    batch.write(target[0], value[start + source])
    if len(target) > 1:
        batch.write(target[1], valid)


def _reduce(batch: Batch, ins: Instruction, active: NDArray) -> None:
    name, kind = ins.among("add", "min", "max", "and", "or", "xor"), ins.kind
    number = kind in FLOATS
    functions: dict[str, Any] = {
        "add": np.add,
        "min": np.fmin if number and "NaN" not in ins.mods else np.minimum,
        "max": np.fmax if number and "NaN" not in ins.mods else np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    rows = np.broadcast_to(batch.read(ins.sources[0], kind), batch.on.shape).reshape(-1, 32)
    out = rows[:, 0].copy()
    for i in np.flatnonzero(active.any(1)).tolist():
        out[i] = functions[str(name)].reduce(rows[i][active[i]], dtype=rows.dtype)
    batch.write(ins.target, np.repeat(out, 32))
