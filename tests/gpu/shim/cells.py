"""The CUDA cells on CPU tensors: the real Python cells, host launchers and kernels, over the shim."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from gpu.shim.build import shim

import rlhf_fast
from rlhf_fast._op import OPS


def _poisoned(function):
    """`function`, whose result holds NaN (77 for integers): what a kernel leaves unwritten shows."""

    def call(*args, **kwargs):
        x = function(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 77) if x.numel() else x

    return call


@contextmanager
def cuda_cells(seed: int = 1, multiprocessors: int = 4, library: Any = None) -> Iterator[Any]:
    """Inside, the CUDA cells come first for CPU tensors; fp64 goes on to the next, and use_backend works as ever.

    seed: of the order of warps and blocks. multiprocessors: of the device that the launchers see. library: what runs the kernels;
    None: the shim.
    """
    library = library or shim()
    library.configure(seed, multiprocessors)
    common = importlib.import_module("rlhf_fast.cuda.common")
    with ExitStack() as stack:
        stack.enter_context(patch.object(common.cuda, "kernel", library.kernel, create=True))
        stack.enter_context(patch.object(common, "stream_of", lambda x: 0))
        stack.enter_context(patch.object(torch, "empty_like", _poisoned(torch.empty_like)))
        stack.enter_context(patch.object(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty)))
        stack.enter_context(rlhf_fast.use_backend(None))  # forgets what was chosen, on entry and on exit
        for op in OPS.values():
            cells = [replace(c, device="cpu", missing=lambda: None) if c.name == "cuda" else c for c in op.backends]
            stack.enter_context(patch.object(op, "backends", tuple(cells)))
            op._chosen.clear()
        before = library.configure(seed, multiprocessors)
        yield library
        assert library.configure() > before, "no CUDA kernel was launched"
