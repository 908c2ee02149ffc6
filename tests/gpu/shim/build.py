"""The CUDA kernels and their launchers as host programs: one shared library for Python, and executables for the sanitizers."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
LAUNCHERS = [path.with_suffix(".cpp") for path in KERNELS]


def compiler() -> str | None:
    """g++, whose ThreadSanitizer knows fibers, or None."""
    return shutil.which("g++")


def compile_program(
    folder: Path, sources: Sequence[Path], flags: Sequence[str], csrc: Path = CSRC, name: str = "program"
) -> Path:
    """An executable, or with -shared a library, of CUDA and C++ sources. Raises RuntimeError with what the compiler says."""
    include = ["-std=c++17", "-Wall", "-Wno-unknown-pragmas", f"-I{csrc}", f"-I{HERE}"]
    objects = []
    for source in sources:
        target = folder / f"{source.stem}{source.suffix[1:]}.o"
        _run(["g++", *include, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        objects.append(str(target))
    _run(["g++", *flags, *objects, "-o", str(folder / name)])
    return folder / name


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


class Field(ctypes.Structure):
    _fields_ = (("integer", ctypes.c_int64), ("real", ctypes.c_double))


def _field(x: Any) -> Field:
    if x is None:
        return Field(0, 0.0)
    if isinstance(x, Tensor):
        return Field(x.data_ptr(), 0.0)
    if isinstance(x, float):
        return Field(0, x)
    return Field(int(x), float(x))


class Shim:
    """The library, called as rlhf_fast.cuda is."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.rlhf_fast_call.restype = ctypes.c_int64

    def kernel(self, name: str) -> Callable[..., None]:
        def call(*fields: Any) -> None:
            array = (Field * len(fields))(*map(_field, fields))
            code = self._library.rlhf_fast_call(name.encode(), array, len(fields))
            if code:
                raise RuntimeError(f"{name}: error {code} with {len(fields)} fields")

        return call

    def configure(self, seed: int = 1, multiprocessors: int = 4) -> int:
        """Seed of the order of warps and blocks, and what the launchers believe of the device; launches so far."""
        return self._library.rlhf_fast_shim(seed, multiprocessors)

    def hook(self, launch: Callable[[bytes, int, int, int], int] | None) -> None:
        """Launches go to launch(name, blocks, threads, address of the argument struct), or to the shim again."""
        self._hook = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p)(
            launch or 0
        )
        self._library.rlhf_fast_hook(self._hook)


@functools.cache
def shim() -> Shim:
    """Built once per process."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf_fast_shim_"))
    sources = [*KERNELS, *LAUNCHERS, HERE / "library.cpp"]
    return Shim(compile_program(folder, sources, ["-O2", "-fPIC", "-shared"], name="shim.so"))
