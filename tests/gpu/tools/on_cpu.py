"""The cells of a GPU backend on CPU tensors: through the public functions, with autograd, unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import rlhf_fast
from rlhf_fast._op import OPS


@contextmanager
def on_cpu(name: str) -> Iterator[None]:
    """Inside, every op that has a cell of the backend `name` runs it on CPU tensors, and no other: what it declines raises.

    Ops without such a cell keep the ones they have. The caller sees to it that the kernels can run there: Triton's interpreter,
    or a driver that executes what the compiler made.
    """
    before = {op: op.backends for op in OPS.values()}
    with rlhf_fast.use_backend(None):  # forgets what was chosen, on entry and on exit
        for op, cells in before.items():
            found = tuple(replace(cell, device="cpu", missing=lambda: None) for cell in cells if cell.name == name)
            op.backends = found or cells
            op._chosen.clear()
        try:
            yield
        finally:
            for op, cells in before.items():
                op.backends = cells
                op._chosen.clear()
