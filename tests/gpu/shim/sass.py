"""Machine code of the CUDA kernels: what one round of a loop executes when nothing goes wrong in it."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from pathlib import Path

from gpu.shim.build import CSRC
from gpu.shim.ptx import nvcc
from gpu.tools.audit import disassembled

_EXP, _WIDE_LOAD = re.compile(r"MUFU\.EX2"), re.compile(r"LDG\S*\.128")


def cubin_of(source: str, arch: int) -> bytes:
    """What nvcc makes of CUDA C++ that may include the files of csrc/."""
    compiler = nvcc()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.cu"
        path.write_text(source, encoding="utf-8")
        command = [compiler, "-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{CSRC}", "-cubin", "-o", f"{path}bin"]
        done = subprocess.run([*command, str(path)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return Path(f"{path}bin").read_bytes()


def rounds(cubin: bytes, exps: int) -> list[int]:
    """Of every loop that loads vectors and takes `exps` exponentials: the instructions of the shortest way round that does."""
    code, targets = _read(disassembled(cubin)[1])
    ends = [i for i, text in enumerate(code) if _name(text).startswith("BRA") and targets.get(i, i) < i]
    found = [_shortest(code, targets, targets[end], end, exps) for end in ends]
    return [count for count in found if count is not None]


def _read(sass: str) -> tuple[list[str], dict[int, int]]:
    """(instructions with their guards, {place: place it may jump to})"""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(code)
        if found := re.match(r"\s*/\*[0-9a-f]+\*/\s+\{?\s*((?:@!?U?P\w+\s+)?[A-Z][A-Z0-9_.]*\s*.*?);", line):
            code.append(found.group(1))
    named = {i: re.search(r"`\((\.[\w$]+)\)", text) for i, text in enumerate(code)}
    return code, {i: labels[m.group(1)] for i, m in named.items() if m and m.group(1) in labels}


def _name(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text)


def _next(code: list[str], targets: dict[int, int], i: int) -> list[int]:
    name = _name(code[i])
    always = name == code[i] and not re.match(r"BRA\S*\s+!?U?P\d", name)
    if name.startswith("EXIT"):
        return [] if always else [i + 1]
    if name.startswith("BRA"):
        return ([] if always else [i + 1]) + ([targets[i]] if i in targets else [])
    if name.startswith("BSYNC"):  # the lanes meet where the nearest BSSY above with the same barrier says
        barrier = name.split()[1]
        return [targets[next(k for k in range(i, -1, -1) if re.match(rf"BSSY\S*\s+{barrier}\b", _name(code[k])))]]
    return [i + 1]


def _shortest(code: list[str], targets: dict[int, int], begin: int, end: int, exps: int) -> int | None:
    """By Dijkstra over (place, a vector was loaded, exponentials so far)."""
    heap, seen = [(0, begin, False, 0)], set()
    while heap:
        count, i, loaded, taken = heapq.heappop(heap)
        if (i, loaded, taken) in seen or not begin <= i <= end:
            continue
        seen.add((i, loaded, taken))
        loaded |= bool(_WIDE_LOAD.match(_name(code[i])))
        taken = min(exps, taken + bool(_EXP.match(_name(code[i]))))
        if i == end:
            if loaded and taken == exps:
                return count + 1
            continue
        for k in _next(code, targets, i):
            if k != begin:
                heapq.heappush(heap, (count + 1, k, loaded, taken))
    return None
