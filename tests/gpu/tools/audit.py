"""Audits compiled kernels: registers, spills, shared memory, occupancy, widths of loads, instructions of the hottest loop.

NVIDIA: cuobjdump and nvdisasm, which ship inside the triton package, read the cubin. AMD: the assembly's own comments.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import triton
from gpu.tools.driver import Compiled

SM = {
    80: (65_536, 167_936, 64, 32),
    86: (65_536, 102_400, 48, 16),
    89: (65_536, 102_400, 48, 24),
    90: (65_536, 233_472, 64, 32),
    100: (65_536, 233_472, 64, 32),
    103: (65_536, 233_472, 64, 32),
    120: (65_536, 102_400, 48, 24),
}
"""Registers, bytes of shared memory, warps and blocks of one multiprocessor (CUDA C++ programming guide, compute capabilities)."""

RESERVED_SHARED = 1024
"""Bytes per block that the system takes from compute capability 8.0 on."""

_CLASSES = {
    "exp": r"MUFU\.EX2",
    "special": "MUFU",
    "barrier": r"BAR\b",
    "shuffle": "SHFL",
    "load": "LDG",
    "store": "STG",
    "shared": "LDS|STS|LDSM|STSM",
}


@dataclass
class Audit:
    """Numbers of one compiled kernel. Of AMD: registers are VGPRs, a wave is a warp, and the loop is not looked at."""

    registers: int
    spills: int
    """Bytes of stack and local memory per thread; of AMD, of scratch memory. Nothing but spilled registers needs any."""
    shared: int
    """Bytes per block, static and dynamic."""
    occupancy: float
    """Warps that fit on a multiprocessor, as a share of the most."""
    wide: float
    """Share of the loaded bytes that come in 128-bit accesses or wider, of the hottest loop or else the kernel; 1.0 without loads."""
    loop_instructions: int
    loop_exps: int
    loop_bytes: int
    """Bytes that one thread loads in one round of the hottest loop; 0: there is no loop that loads."""

    def per_element(self, size: int) -> tuple[float, float]:
        """(instructions, exps) per element of `size` bytes in the hottest loop, of one thread; 0 without a loop that loads."""
        elements = self.loop_bytes / size
        return (self.loop_instructions / elements, self.loop_exps / elements) if elements else (0.0, 0.0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def audit(kernel: Compiled) -> Audit:
    if kernel.target.backend == "hip":
        return audit_amd(str(kernel.asm["amdgcn"]))
    cubin = kernel.asm["cubin"]
    assert isinstance(cubin, bytes)
    return audit_cubin(cubin, kernel.target.arch, 32 * kernel.num_warps, kernel.shared)


def audit_cubin(cubin: bytes, capability: int, threads: int, dynamic_shared: int = 0) -> Audit:
    """dynamic_shared: bytes of the launch, which the cubin does not record."""
    usage, sass = disassembled(cubin)

    def used(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", usage)
        if found is None:
            raise ValueError(f"no {name} in the resource usage: {usage[:200]}")
        return int(found.group(1))

    code, loops = instructions(sass)
    hottest = max((code[a:b] for a, b in loops if _loads(code[a:b])), key=_loaded_bytes, default=[])
    looked_at = hottest or code
    widths = _load_widths(looked_at)
    classes = classified(hottest)
    shared = used("SHARED") + dynamic_shared
    return Audit(
        registers=used("REG"),
        spills=used("STACK") + used("LOCAL"),
        shared=shared,
        occupancy=occupancy(capability, used("REG"), shared, threads),
        wide=sum(n for bits, n in widths.items() if bits >= 128) / sum(widths.values()) if widths else 1.0,
        loop_instructions=len(hottest),
        loop_exps=classes["exp"],
        loop_bytes=_loaded_bytes(hottest),
    )


def audit_amd(assembly: str) -> Audit:
    def number(pattern: str) -> int:
        found = re.search(pattern, assembly)
        if found is None:
            raise ValueError(f"no {pattern} in the assembly")
        return int(found.group(1))

    widths: Counter[int] = Counter()
    for name, count in Counter(re.findall(r"\b(?:global|buffer|flat)_load_(\w+)", assembly)).items():
        bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}.get(
            name, 16 if "short" in name or "16" in name else 8
        )
        widths[bits] += count * bits
    return Audit(
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        spills=number(r"\.private_segment_fixed_size:\s+(\d+)"),
        shared=number(r"\.group_segment_fixed_size:\s+(\d+)"),
        occupancy=number(r";\s*Occupancy:\s+(\d+)") / 8,
        wide=sum(n for bits, n in widths.items() if bits >= 128) / sum(widths.values()) if widths else 1.0,
        loop_instructions=0,
        loop_exps=0,
        loop_bytes=0,
    )


def occupancy(capability: int, registers: int, shared: int, threads: int) -> float:
    all_registers, all_shared, all_warps, blocks = SM[capability]
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 16) * 32 // 256) * 256  # allocated in units of 256
    fits = min(
        all_registers // per_warp // 4 * 4 // warps,  # four schedulers, each with its own quarter
        all_shared // (shared + RESERVED_SHARED),
        all_warps // warps,
        blocks,
    )
    return fits * warps / all_warps


def disassembled(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS)"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: Any, flag: str) -> str:
            return subprocess.run([tool.path, flag, file.name], capture_output=True, text=True, check=True).stdout

        return run(triton.knobs.nvidia.cuobjdump, "-res-usage"), run(triton.knobs.nvidia.nvdisasm, "-c")


def instructions(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """(instructions with their operands, innermost loops as ranges)"""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            labels[label.group(1)] = len(code)
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*\s*.*?);", line)
        if found:
            code.append(found.group(1))
    loops = []
    for i, text in enumerate(code):
        target = re.search(r"`\((\.[\w$]+)\)", text)
        if text.startswith("BRA") and target and labels.get(target.group(1), len(code)) <= i:
            loops.append((labels[target.group(1)], i + 1))
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return code, [(a, b) for a, b in inner if b - a > 3]  # an endless branch to itself ends every kernel


def classified(code: list[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for text in code:
        for name, pattern in _CLASSES.items():
            found[name] += bool(re.match(pattern, text))
    return found


def _loads(code: list[str]) -> bool:
    return any(text.startswith("LDG") for text in code)


def _load_widths(code: list[str]) -> Counter[int]:
    """Bytes that a thread loads from global memory, by the width in bits."""
    widths: Counter[int] = Counter()
    for text in code:
        if text.startswith("LDG"):
            width = re.search(r"\.(256|128|64|[US]?16|[US]8)\b", text.split()[0])
            bits = int(width.group(1).strip("US")) if width else 32
            widths[bits] += bits // 8
    return widths


def _loaded_bytes(code: list[str]) -> int:
    return sum(_load_widths(code).values())
