"""Compilers for tests of the build: they answer what they are asked and write their command line to the output file."""

from __future__ import annotations

import sys
from pathlib import Path

NVCC = """
words = sys.argv[1:]
if "--version" in words: print("Cuda compilation tools, release 12.4, V12.4.131")
elif "--list-gpu-arch" in words: print("compute_50 compute_75 compute_80 compute_86 compute_89 compute_90")
elif "--dryrun" in words: print("#$ _HERE_=" + str(pathlib.Path(__file__).parent))
elif FAILS: sys.exit("nvcc error: cicc died")
else: pathlib.Path(words[words.index("-o") + 1]).write_text(" ".join(words))
"""
FATBINARY = """
(out,) = [w.partition("=")[2] for w in sys.argv if w.startswith("--create=")]
pathlib.Path(out).write_text(chr(10).join(sys.argv[1:]))
"""
CXX = """
words = sys.argv[1:]
if "-o" in words: pathlib.Path(words[words.index("-o") + 1]).write_text(" ".join(words))
"""


def cuda_home(folder: Path, fails: bool = False) -> Path:
    """A toolkit 12.4: nvcc, which may fail to compile, and fatbinary."""
    _program(folder / "bin" / "nvcc", f"FAILS = {fails}" + NVCC)
    _program(folder / "bin" / "fatbinary", FATBINARY)
    return folder


def cxx(folder: Path) -> Path:
    """A C++ compiler."""
    return _program(folder / "bin" / "c++", CXX)


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport pathlib, sys\n{text}")
    path.chmod(0o755)
    return path
