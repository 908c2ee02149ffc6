"""One thing deleted or damaged at a time in the source of a Triton kernel.

mask        the mask of a load, a store or an atomic is gone
other       the value of the lanes that are masked off is gone
barrier     a tl.debug_barrier() is gone
boundary    < became <= (not against floating constants, where the two often agree)
int64       a .to(tl.int64) is gone
alignment   the launcher promises the widest access whatever the address
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("mask", "other", "barrier", "boundary", "int64", "alignment")

_MASK_AT = {"load": 1, "store": 2, "atomic_add": 2, "atomic_max": 2, "atomic_min": 2}
"""Position of the mask among the arguments."""


@dataclass(frozen=True)
class Mutant:
    file: str
    """Below kernels/."""
    function: str
    kind: str
    line: int
    code: str
    """What was there."""
    source: str
    """The whole damaged file."""

    @property
    def key(self) -> str:
        """That of twins on other lines too."""
        return f"{self.file} {self.function}: {self.kind} of `{self.code}`"

    def __str__(self) -> str:
        return f"{self.key}, line {self.line}"


def mutants(root: Path) -> list[Mutant]:
    """Of every file below `root`, in order."""
    files = sorted(root.rglob("*.py"))
    return [
        m for path in files for m in _of_source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
    ]


def _of_source(file: str, source: str) -> Iterator[Mutant]:
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node, kind, replacement in _damages(function):
            yield Mutant(
                file, function.name, kind, node.lineno, ast.unparse(node), _replaced(source, node, replacement)
            )


def _damages(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, str, str]]:
    """(node, kind, its replacement)"""
    device = any(isinstance(x, ast.Name) and x.id == "tl" for stmt in function.body for x in ast.walk(stmt))
    for node in ast.walk(ast.Module(function.body, [])):
        if isinstance(node, ast.IfExp) and function.name == "vector_of":
            yield node, "alignment", ast.unparse(node.body)
        if not device:
            continue
        if isinstance(node, ast.Compare) and _is_boundary(node):
            yield node, "boundary", f"{ast.unparse(node.left)} <= {ast.unparse(node.comparators[0])}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of_tl = isinstance(node.func.value, ast.Name) and node.func.value.id == "tl"
        if of_tl and node.func.attr == "debug_barrier":
            yield node, "barrier", "None"
        elif of_tl and node.func.attr in _MASK_AT:
            yield from _of_access(node, _MASK_AT[node.func.attr])
        elif node.func.attr == "to" and [ast.unparse(a) for a in node.args] == ["tl.int64"]:
            yield node, "int64", f"({ast.unparse(node.func.value)})"


def _of_access(call: ast.Call, at: int) -> Iterator[tuple[ast.AST, str, str]]:
    named = {k.arg for k in call.keywords}
    if "mask" not in named and len(call.args) <= at:
        return

    def without(*names: str) -> str:
        args = call.args[:at] if "mask" in names else call.args
        return ast.unparse(ast.Call(call.func, args, [k for k in call.keywords if k.arg not in names]))

    yield call, "mask", without("mask", "other")
    if "other" in named:
        yield call, "other", without("other")


def _is_boundary(node: ast.Compare) -> bool:
    sides = [node.left, *node.comparators]
    floats = any(
        (isinstance(x, ast.Constant) and isinstance(x.value, float)) or (isinstance(x, ast.Name) and x.id == "float")
        for side in sides
        for x in ast.walk(side)
    )
    return len(node.ops) == 1 and isinstance(node.ops[0], ast.Lt) and not floats


def _replaced(source: str, node: ast.AST, replacement: str) -> str:
    lines = source.encode().splitlines(keepends=True)  # columns count bytes
    start, end = node.lineno - 1, node.end_lineno - 1  # type: ignore[attr-defined]
    before = b"".join(lines[:start]) + lines[start][: node.col_offset]  # type: ignore[attr-defined]
    after = lines[end][node.end_col_offset :] + b"".join(lines[end + 1 :])  # type: ignore[attr-defined]
    return (before + replacement.encode() + after).decode()


def dependents(root: Path, file: str) -> list[str]:
    """The top-level modules below `root` that use the file, themselves included."""
    uses: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        imported = {x for x in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(x, ast.ImportFrom)}
        found = set()
        for node in imported:
            module = (node.module or "").removeprefix("rlhf_fast.kernels").strip(".").replace(".", "/")
            if (node.module or "").startswith("rlhf_fast.kernels"):
                found |= {f"{module}.py", *(f"{module}/{alias.name}.py".lstrip("/") for alias in node.names)}
        uses[name] = found
    reached, new = {file}, {file}
    while new:
        new = {name for name, of in uses.items() if of & new} - reached
        reached |= new
    return sorted(name.removesuffix(".py") for name in reached if "/" not in name and not name.startswith("__"))
