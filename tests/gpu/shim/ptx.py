"""What nvcc makes of the kernels, executed: the real launchers hand their launches to the PTX machine."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu.shim.build import CSRC, KERNELS, Shim, shim
from gpu.tools.ptx import PTX
from gpu.tools.ptx_memory import Result
from torch import Tensor


def nvcc() -> str | None:
    """The compiler of CUDA_HOME, of the path or of the usual place, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


@functools.cache
def text_of(file: str, arch: int, csrc: Path = CSRC) -> str:
    """PTX of <csrc>/cuda/<file>.cu."""
    compiler = nvcc()
    assert compiler is not None
    command = [compiler, "-std=c++17", "-O3", f"-arch=compute_{arch}", f"-I{csrc}", "-ptx", "-o", "-"]
    done = subprocess.run([*command, str(csrc / "cuda" / f"{file}.cu")], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@functools.cache
def program(name: str, arch: int, csrc: Path = CSRC) -> PTX:
    """The kernel `name`, of the file with the longest name that it begins with."""
    files = [path.stem for path in KERNELS if name.startswith(path.stem)]
    return PTX(text_of(max(files, key=len), arch, csrc), name)


class Machine:
    """Stands in for the shim: kernels of `csrc` are compiled for `arch` and executed. results: one per launch."""

    def __init__(self, arch: int, library: Shim, csrc: Path) -> None:
        self.arch, self.library, self.csrc = arch, library, csrc
        self.results: list[Result] = []
        self.configure = library.configure
        self._regions: dict[str, Tensor] = {}
        self._error: BaseException | None = None

    def kernel(self, name: str) -> Callable[..., None]:
        def call(*fields: Any) -> None:
            self._regions = {f"{name}[{i}]": x for i, x in enumerate(fields) if isinstance(x, Tensor) and x.numel()}
            try:
                self.library.kernel(name)(*fields)
            except RuntimeError:
                raise self._error or RuntimeError(name) from None

        return call

    def launch(self, name: bytes, blocks: int, threads: int, address: int) -> int:
        try:
            kernel = program(name.decode(), self.arch, self.csrc)
            ((_, size),) = kernel.kernel.parameters.values()
            argument = ctypes.string_at(address, size)
            self.results.append(kernel.launch((blocks,), (threads,), [argument], regions=self._regions))
            return 0
        except BaseException as error:  # cannot pass through the launcher
            self._error = error
            return 1


@contextmanager
def machine(arch: int, csrc: Path = CSRC) -> Iterator[Machine]:
    """Inside, the library's launches are executed as compiled code."""
    library = shim()
    found = Machine(arch, library, csrc)
    library.hook(found.launch)
    try:
        yield found
    finally:
        library.hook(None)
