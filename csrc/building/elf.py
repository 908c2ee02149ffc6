"""What a compiled module asks of the system that loads it, by readelf and nm."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

NEEDED = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "ld-linux-x86-64.so.2"}
"""Libraries that a module may be linked to. Before glibc 2.34 dlopen was in libdl.so.2."""
NEEDED |= {"libdl.so.2", "libpthread.so.0"}

CEILINGS = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)}
"""The newest symbols of manylinux_2_34 (PEP 600), the oldest standard that a build on Debian 12 fits."""


def needed(module: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "-dW", module)))


def newest_symbols(module: Path) -> dict[str, tuple[int, ...]]:
    """{family: newest version}: {"GLIBC": (2, 34), ...}."""
    newest: dict[str, tuple[int, ...]] = {}
    for family, version in re.findall(r"Name: ([A-Z]+)_([\d.]+)", _run("readelf", "-VW", module)):
        newest[family] = max(newest.get(family, (0,)), tuple(map(int, version.split("."))))
    return newest


def undefined(module: Path) -> list[str]:
    """Mangled names of the symbols that others have to bring."""
    return [line.split()[-1].partition("@")[0] for line in _run("nm", "-D", "--undefined-only", module).splitlines()]


def _run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
