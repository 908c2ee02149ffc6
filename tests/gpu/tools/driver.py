"""A Triton driver that needs no GPU: kernel[grid](cpu tensors) goes through Triton's own JIT for the chosen target.

    with install(90) as driver:                  # an NVIDIA compute capability, or "gfx942" of AMD
        rlhf_fast.gae(rewards, values)           # inside on_cpu("triton")
    driver.launches[-1]                          # ptx.Result of the last launch: the PTX was executed on the CPU
    driver.compiled                              # every kernel and specialisation that was asked for

Argument specialisation, caching and compilation are Triton's; only the launch is ours. `execute=False` compiles and launches
nothing, and so does a target of AMD. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
import triton
from gpu.tools.ptx import PTX, Result
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
"""Largest shared memory of a block in bytes, by compute capability (CUDA C++ programming guide, technical specifications)."""

AMD_SHARED = 65_536


@dataclass
class Compiled:
    """One kernel for one target, one set of constants and one specialisation of its arguments."""

    name: str
    """module.function"""
    target: GPUTarget
    constants: dict[str, Any]
    signature: dict[str, str]
    """Types of the run-time arguments; D: a multiple of 16."""
    num_warps: int
    shared: int
    """Bytes of dynamic shared memory."""
    asm: dict[str, str | bytes]
    """"ptx" and "cubin", or "amdgcn"."""

    def __str__(self) -> str:
        """One line: the constants that are neither False nor None, and the run-time types; x5: five of them."""
        constants = [
            k if v is True else f"{k}={v}" for k, v in self.constants.items() if v is not None and v is not False
        ]
        left_out = [f"-{k}" for k, v in self.constants.items() if v is None]
        types = [f"{k} x{n}" if (n := len(list(run))) > 1 else k for k, run in groupby(self.signature.values())]
        return f"{self.name}[{' '.join(constants + left_out)}]({', '.join(types)}), {self.num_warps} warps"


class Driver(DriverBase):
    def __init__(self, arch: int | str, execute: bool) -> None:
        self.target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
        self.execute = execute and self.target.backend == "cuda"
        self.launches: list[Result] = []
        self.compiled: dict[str, Compiled] = {}
        """By Triton's hash, in the order of first launch."""
        self.damage: Callable[[Compiled, str], str] | None = None
        """What to change in the PTX of a kernel before it is executed."""
        shared = SHARED.get(arch, 101_376) if isinstance(arch, int) else AMD_SHARED
        properties = {
            "max_shared_mem": shared,
            "max_num_regs": 65_536,
            "multiprocessor_count": 132,
            "warpSize": self.target.warp_size,
        }
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, binary, shared, device: (
                name,
                name,
                0,
                0,
                1024,
            ),  # registers, spills, threads at most
            unload_module=lambda module: None,
        )

    def __enter__(self) -> Self:
        self._before = triton.runtime.driver._active
        triton.runtime.driver.set_active(self)
        self._poison = _Poison()
        self._poison.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._poison.__exit__(*exc)
        triton.runtime.driver._active = self._before

    # ---- what Triton asks of a driver

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device number, so every target has its own."""
        return int("".join(c for c in str(self.target.arch) if c.isdigit()))

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise RuntimeError("no C++ launcher is made")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("a kernel wants to time configurations at run time; they come from a checked-in table")

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Any:
        """The function that Triton keeps with the compiled kernel; it may outlive this driver."""
        names, kinds = source.fn.arg_names, list(source.signature.values())
        state: dict[str, Any] = {}

        def launch(
            x: int, y: int, z: int, stream: int, fn: Any, packed: Any, info: Any, enter: Any, leave: Any, *args: Any
        ) -> None:
            driver = triton.runtime.driver.active
            if not state:
                state["compiled"] = _compiled(source, metadata)
            driver.compiled.setdefault(metadata.hash, state["compiled"])
            if not driver.execute:
                return
            if "ptx" not in state:
                state["ptx"] = PTX(str(state["compiled"].asm["ptx"]))
            ptx = state["ptx"]
            if driver.damage is not None:
                ptx = PTX(driver.damage(state["compiled"], str(state["compiled"].asm["ptx"])))
            flat = zip(_flat(zip(names, args, strict=True)), _flat(zip(names, kinds, strict=True)), strict=True)
            given = [(name, _plain(arg)) for (name, arg), (_, kind) in flat if kind != "constexpr"]
            block = (32 * metadata.num_warps,)
            result = ptx.launch(
                (x, y, z), block, [arg for _, arg in given], metadata.shared, names=[name for name, _ in given]
            )
            driver.launches.append(result)

        return launch


def install(arch: int | str = 90, execute: bool = True) -> Driver:
    """The driver, to be entered."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("install: an interpreted function cannot be compiled; unset TRITON_INTERPRET")
    return Driver(arch, execute)


def _plain(value: Any) -> Any:
    return getattr(value, "base", value) if not isinstance(value, Tensor) else value  # Triton's reinterpret()


def _flat(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """With the elements of tuples one by one, as parameters of their own."""
    for name, value in named:
        if isinstance(value, tuple):
            yield from _flat((f"{name}[{i}]", x) for i, x in enumerate(value))
        else:
            yield name, value


def _compiled(source: Any, metadata: Any) -> Compiled:
    files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json")
    asm: dict[str, str | bytes] = {}
    for path in map(Path, files.values()):
        kind = path.suffix[1:]
        if kind in ("ptx", "amdgcn"):
            asm[kind] = path.read_text()
        elif kind == "cubin":
            asm[kind] = path.read_bytes()
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    divisible = {names[path[0]] for path, attrs in source.attrs.items() if ["tt.divisibility", 16] in attrs}
    kinds = _flat(source.signature.items())
    signature = {name: kind + "D" * (name in divisible) for name, kind in kinds if kind != "constexpr"}
    module = source.fn.module.rpartition(".")[2]
    return Compiled(
        f"{module}.{metadata.name}", metadata.target, constants, signature, metadata.num_warps, metadata.shared, asm
    )


class _Poison(TorchDispatchMode):
    """torch.empty* holds NaN or 0x5a5a..., so that elements nobody writes are seen."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            str(func).startswith(("aten.empty", "aten.new_empty"))
            and isinstance(out, Tensor)
            and out.device.type == "cpu"
        ):
            poison(out)
        return out


def poison(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype is torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(int.from_bytes(b"\x5a" * tensor.element_size(), "little"))
