"""Runs Triton kernels on CPU tensors in Triton's interpreter, with exact arithmetic and every access checked.

    with Sanitizer(order="shuffle", seed=1) as s:
        out = rlhf_fast.gae(rewards, values)      # or kernel[grid](x, y, out, ...)
    s.check()                                     # raises AssertionError with every finding
    s.launches[-1]                                # bytes, sectors and operations of the last launch
    s.unwritten(out)                              # elements of a tensor that nobody wrote

TRITON_INTERPRET=1 must be set before Triton is first imported. Kinds of findings:

    oob, outside-view      an access outside of the storage; in the storage, outside of the tensor (a gap between rows)
    misaligned, itemsize   not a multiple of the element's size; another size than the tensor's elements
    uninit-read            the element was never written (torch.empty* is poisoned and followed)
    duplicate              several lanes of one store write one element
    race                   two programs touch an element, one of them writes, and no atomic orders them
    hazard                 two threads of one program do, with no tl.debug_barrier() between
    float-atomic           a floating sum by atomics
    bf16-reduce            a reduction that accumulates in bf16
    int32-wrap             32-bit arithmetic that wraps
    narrow-offset          the program's number is multiplied in 32 bits, which wraps on a large grid
    hint                   a wrong tl.multiple_of or tl.max_contiguous

Masked-off lanes of a load without `other=` hold a poison, NaN and numbers in turn, and so do refused lanes. Limits: shadow memory takes about
fifty bytes an element; all programs run, so grids must be small; accesses of the same lane of two tiles of one size are
taken to be the same thread's.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from gpu.tools import builder
from gpu.tools.shadow import Launch, Memory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ORDERS = ("forward", "reverse", "shuffle")
_NOT_THE_KERNEL = (os.path.dirname(triton.__file__), os.path.dirname(__file__))


@dataclass
class Finding:
    kind: str
    where: str
    """file:line (function) of the kernel."""
    message: str
    program: int
    """The first that did it."""
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}: {self.message} [program {self.program}] (x{self.count})"


class Sanitizer:
    """order: of the programs of a launch, "forward", "reverse" or "shuffle" by the seed.

    tf32: tl.dot rounds fp32 operands as the compiled kernel does. reductions_order: a reduction or scan across a tile orders
    memory like tl.debug_barrier(), as it happens to do where a tile spans several warps. track_empty: torch.empty* is poisoned and
    followed, by a dispatch mode under which ops go through torch's dispatcher; False leaves calls as they are.
    """

    _active: Sanitizer | None = None

    def __init__(
        self,
        order: str = "forward",
        seed: int = 0,
        *,
        tf32: bool = True,
        reductions_order: bool = False,
        track_empty: bool = True,
        max_findings: int = 50,
    ) -> None:
        if not triton.knobs.runtime.interpret:
            raise RuntimeError("Sanitizer: set TRITON_INTERPRET=1 before triton is imported")
        if order not in ORDERS:
            raise ValueError(f"Sanitizer: argument 'order' got {order!r}, expected one of {', '.join(ORDERS)}")
        self.order, self.seed, self.tf32, self.max_findings = order, seed, tf32, max_findings
        self.findings: list[Finding] = []
        self.launches: list[Launch] = []
        self.memory = Memory(self._report, reductions_order)
        self._tracking = _Tracking(self.memory) if track_empty else nullcontext()

    def kinds(self) -> list[str]:
        return sorted({finding.kind for finding in self.findings})

    def check(self, ignore: Sequence[str] = ()) -> None:
        found = [str(finding) for finding in self.findings if finding.kind not in ignore]
        if found:
            raise AssertionError("\n".join(found))

    def hide(self, tensor: Tensor, where: Tensor) -> None:
        """Reading the elements (or rows) of `tensor` where the bool tensor `where` holds is an "uninit-read" from here on."""
        self.memory.hidden(tensor, where)

    def unwritten(self, tensor: Tensor) -> int:
        """Elements that neither a kernel nor the host has written."""
        return self.memory.unwritten(tensor)

    def _report(self, kind: str, message: str) -> None:
        where = _kernel_line()
        for finding in self.findings:
            if (finding.kind, finding.where) == (kind, where):
                finding.count += 1
                return
        if len(self.findings) < self.max_findings:
            self.findings.append(Finding(kind, where, message, self.memory.program - 1))

    def __enter__(self) -> Self:
        if Sanitizer._active is not None:
            raise RuntimeError("Sanitizer: another one is active")
        Sanitizer._active = self
        replaced = [
            *builder.patches(self.memory, self._report, self.tf32),
            (interpreter.GridExecutor, "__call__", lambda executor, *a, **k: self._launch(executor, a, k)),
            # tl.device_assert is on; the stock overflow asserts are off: they would distort the operation counts.
            (
                interpreter.interpreter_builder,
                "options",
                interpreter.InterpreterOptions(debug=True, sanitize_overflow=False),
            ),
        ]
        self._before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        for owner, name, value in replaced:
            setattr(owner, name, value)
        self._tracking.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._tracking.__exit__(*exc)
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)
        Sanitizer._active = None

    def _launch(self, executor: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        names = inspect.getfullargspec(executor.fn)
        kwargs = {k: v for k, v in kwargs.items() if k in names.args or k in names.kwonlyargs}
        for hook in executor.pre_run_hooks:
            hook(*args, **kwargs)
        bound = inspect.getcallargs(executor.fn, *args, **kwargs)
        grid = tuple(executor.grid(bound) if callable(executor.grid) else executor.grid)
        grid = (*grid, *(1,) * (3 - len(grid)))
        launch = Launch(executor.fn.__name__, grid)
        self.launches.append(launch)
        self.memory.begin_launch(launch)
        scope = interpreter._patch_lang(_EveryLanguageModule)
        try:
            values = {k: v if k in executor.constexprs else self._argument(k, v) for k, v in bound.items()}
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for number in self._programs(int(np.prod(grid))):
                self.memory.begin_program(number + 1)
                x, y, z = (int(i) for i in np.unravel_index(number, grid, order="F"))
                interpreter.interpreter_builder.set_grid_idx(x, y, z)
                executor.fn(**values)
        finally:
            scope.restore()

    def _programs(self, count: int) -> list[int]:
        order = np.arange(count)
        if self.order == "reverse":
            order = order[::-1]
        elif self.order == "shuffle":
            np.random.default_rng(self.seed).shuffle(order)
        return order.tolist()

    def _argument(self, name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            parts = (self._argument(f"{name}[{i}]", x) for i, x in enumerate(value))
            return interpreter._tuple_create(value, parts)
        converted = interpreter._implicit_cvt(value)
        if hasattr(value, "data_ptr"):
            converted.handle.attr[builder.ORIGIN] = self.memory.add_region(name, interpreter._unwrap_tensor(value))
        return converted


class _EveryLanguageModule:
    """Stands for a kernel that sees both modules that the interpreter patches."""

    tl, core = tl, tl.core


_EveryLanguageModule.__globals__ = {"tl": tl, "core": tl.core}  # type: ignore[attr-defined]


class _Tracking(TorchDispatchMode):
    """Poisons torch.empty* and follows which tensors the host has written."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if str(func).startswith(("aten.empty", "aten.new_empty")):
            if isinstance(out, Tensor) and out.device.type == "cpu" and out.numel():
                self._memory.poisoned(out)
            return out
        for position, declared in enumerate(func._schema.arguments):
            if declared.alias_info is not None and declared.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(declared.name)
                for x in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(x, Tensor) and x.device.type == "cpu" and x.numel():
                        self._memory.written_by_host(x)
        return out


def _kernel_line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((*_NOT_THE_KERNEL, "<")):
            return f"{Path(name).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "?"
