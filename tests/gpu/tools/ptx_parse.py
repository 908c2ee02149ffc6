"""PTX text to instructions with decoded operands (PTX ISA 9.0, docs.nvidia.com/cuda/parallel-thread-execution)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


class Unsupported(Exception):
    """PTX that the machine does not execute."""


DTYPES = {
    **{
        f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
        for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"))
        for bits in (8, 16, 32, 64)
    },
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "f32x2": np.dtype(np.uint64),
    "pred": np.dtype(np.bool_),
}
"""numpy dtype of a register that is read as this PTX type."""

BITS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
"""How a register of that many bytes is kept."""


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False


class Immediate:
    """A literal; as(kind) is an array of one element, which broadcasts."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._values: dict[str, NDArray] = {}

    def as_kind(self, kind: str) -> NDArray:
        if kind not in self._values:
            self._values[kind] = self._read(kind)
        return self._values[kind]

    def _read(self, kind: str) -> NDArray:
        text, dtype = self._text, DTYPES[kind]
        if text[:2] in ("0f", "0F", "0d", "0D"):
            bits = int(text[2:], 16)
            exact = (
                np.array([bits], np.uint32).view(np.float32)
                if text[1] in "fF"
                else np.array([bits], np.uint64).view(np.float64)
            )
            return exact.astype(dtype) if dtype.kind == "f" else exact.view(BITS[exact.itemsize]).astype(dtype)
        if "." in text:
            return np.array([float(text)], dtype)
        value = int(text.rstrip("U"), 0)
        if kind == "pred":
            return np.array([bool(value)])
        if dtype.kind == "f":
            return np.array([value & ((1 << 8 * dtype.itemsize) - 1)], BITS[dtype.itemsize]).view(dtype)
        return np.array([value & ((1 << 8 * dtype.itemsize) - 1)], BITS[dtype.itemsize]).view(dtype)


@dataclass(frozen=True)
class Name:
    """A register without %, a special register, a symbol of shared memory, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Name | Immediate
    offset: int


@dataclass(frozen=True)
class Group:
    """{a, b, ...} of a vector access, or a|b of an instruction with two results."""

    parts: tuple[Operand, ...]


Operand = Register | Immediate | Name | Address | Group


def name_of(operand: Operand) -> str:
    """Of a register, a symbol or a label."""
    if isinstance(operand, (Register, Name)):
        return operand.name
    raise Unsupported(str(operand))


_NUMBER = re.compile(
    r"^(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|-?(?:0x[0-9a-fA-F]+|\d+)U?|-?\d+\.\d*(?:[eE][+-]?\d+)?)$"
)
_WORDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s][^,]*")


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Group(tuple(_operand(part) for part in text.strip("{}").split(",")))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        simple = _operand(base)
        if isinstance(simple, (Address, Group)):
            raise Unsupported(text)
        return Address(simple, int(offset.strip() or "0", 0))
    if "|" in text:
        return Group(tuple(_operand(part) for part in text.split("|")))
    if _NUMBER.match(text):
        return Immediate(text)
    if text.startswith(("%", "!")) and "." not in text:
        return Register(text.lstrip("!"), text.startswith("!"))
    return Name(text)


@dataclass
class Instruction:
    text: str
    op: str
    mods: tuple[str, ...]
    """What follows the opcode, without the types."""
    kinds: tuple[str, ...]
    """The types."""
    operands: tuple[Operand, ...]
    guard: Register | None = None
    """@p or @!p."""
    vector: int = 1

    @property
    def kind(self) -> str:
        return self.kinds[0] if self.kinds else "b32"

    @property
    def target(self) -> Operand:
        return self.operands[0]

    @property
    def sources(self) -> tuple[Operand, ...]:
        return self.operands[1:]

    def among(self, *names: str) -> str | None:
        """The first of the names that is among the modifiers."""
        return next((name for name in names if name in self.mods), None)


def _instruction(text: str) -> Instruction:
    match = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
    if match is None:
        raise Unsupported(text[:80])
    negated, guard, name, rest = match.groups()
    op, *parts = name.replace("::", "#").split(".")
    mods = tuple(part for part in parts if part not in DTYPES)
    vector = next((int(part[1:]) for part in mods if re.fullmatch(r"v[248]", part)), 1)
    return Instruction(
        " ".join(text.split()),
        op,
        mods,
        tuple(part for part in parts if part in DTYPES),
        tuple(_operand(word) for word in _WORDS.findall(rest)),
        None if guard is None else Register(guard, negated == "!"),
        vector,
    )


@dataclass
class Kernel:
    """One .entry of a PTX module."""

    name: str
    parameters: dict[str, tuple[str, int]]
    """name: (type, bytes), in order; a structure is of type b8."""
    required_threads: tuple[int, ...]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    """name: type."""
    shared: dict[str, int | None] = field(default_factory=dict)
    """Symbol of shared memory: its offset, None for the dynamic part, which follows the rest."""
    static_shared: int = 0


def parse(text: str, entry: str | None = None) -> Kernel:
    """The kernel of that name, or the first of the module."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    name = re.escape(entry) if entry else r"[\w$]+"
    head = re.search(rf"\.entry\s+({name})\s*\((.*?)\)([^{{]*)\{{", text, re.S)
    if head is None:
        raise ValueError(f"no kernel {entry or ''} in the PTX")
    kernel = Kernel(head.group(1), {}, tuple(int(n) for n in re.findall(r"\.reqntid\s+(\d+)", head.group(3))))
    for declared in filter(None, (part.strip() for part in head.group(2).split(","))):
        match = re.search(r"\.([busf]\d+)\b.*?([\w$]+)(?:\[(\d+)\])?$", declared)
        if match is None:
            raise Unsupported(declared)
        kind, what, count = match.groups()
        kernel.parameters[what] = (kind, DTYPES[kind].itemsize * int(count or 1))
    _shared_symbols(kernel, text)
    depth, end = 1, head.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    _body(kernel, text[head.end() : end - 1])
    return kernel


def _shared_symbols(kernel: Kernel, text: str) -> None:
    pattern = r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.([busf]\d+)\s+([\w$]+)(?:\[(\d*)\])?"
    for external, align, kind, name, count in re.findall(pattern, text):
        if external:
            kernel.shared[name] = None
        else:
            kernel.static_shared = -(-kernel.static_shared // int(align)) * int(align)
            kernel.shared[name] = kernel.static_shared
            kernel.static_shared += int(count or 1) * DTYPES[kind].itemsize


def _body(kernel: Kernel, body: str) -> None:
    body = re.sub(r"\.(?:loc|file|pragma|section)\b[^\n;]*;?", "", body)
    body = re.sub(r"(\$?[\w$]+:)\s", r"\1\n", body)
    for statement in re.split(r";|(?<=:)\s*\n", body):
        rest = statement.strip()
        while True:
            label = re.match(r"^([\w$]+):\s*", rest)
            if label:
                kernel.labels[label.group(1)] = len(kernel.code)
                rest = rest[label.end() :].strip()
            elif rest and rest[0] in "{}" and not re.match(r"^\{[^}]*\}\s*,", rest):
                rest = rest[1:].strip()  # a scope, not an operand
            else:
                break
        if not rest or rest.startswith((".shared", ".param")):  # shared: already known; param: of a call
            continue
        if rest.startswith(".reg"):
            _registers(kernel, rest)
        elif rest.startswith("."):
            raise Unsupported(rest[:80])
        else:
            kernel.code.append(_instruction(rest))


def _registers(kernel: Kernel, text: str) -> None:
    match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
    if match is None:
        raise Unsupported(text[:80])
    kind = match.group(1)
    for declared in match.group(2).split(","):
        many = re.match(r"\s*(%?[\w$]+)<(\d+)>", declared)
        names = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [declared.strip()]
        kernel.registers.update(dict.fromkeys(names, kind))
