"""What torch.compile makes of a formulation, counted on tensors without data at shapes too large to run.

Forward and backward are compiled by inductor down to the text of its program, and that program then runs on fake tensors under the
same counting as everything else: its allocations and its library calls are operators, and a kernel counts by the loads and stores in
its text. No data, no GPU and no Triton are needed. The tensors say they are on the CPU, but inductor is told to serve it with its
Triton back end, so fusions, loops and buffers are those of a GPU as far as they do not depend on one: nothing is autotuned, and a
reduction over few rows is split for as many processors as this machine has cores.

A kernel reads each buffer once and writes each buffer once: a second pass over an input, and the reading back of what a kernel
stored for a second loop of its own, are taken to hit a cache. So the count is a lower bound, as elsewhere.

The text is taken from `GraphLowering.save_output_code`, a hook for inductor's own tests (torch 2.13).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from rlhf_fast.bench.cases.common import backward, leaf
from rlhf_fast.bench.traffic import Count, Traffic

SETTINGS = {
    "cpu_backend": "triton",
    "cpp.fallback_scatter_reduce_sum": False,  # atomic additions in a kernel, as on a GPU
    "fx_graph_cache": False,
    "compile_threads": 1,
}

_ACCESS = re.compile(r"tl\.(load|store|atomic_\w+)\((\w*_ptr\d*) \+ (?=\()")
_SIGNATURE = re.compile(r"^def \w+\((.*)\):$", re.M)


def count(
    name: str,
    shape: str,
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    minimum: int,
    trained: Sequence[int] = (),
) -> Count:
    """Of `function(*inputs)` compiled, and of its backward towards inputs[i], i in trained; of the inputs only shape, stride and
    dtype matter. Raises what inductor raises."""
    from torch._inductor import config
    from torch._subclasses.fake_tensor import FakeTensorMode

    traffic = Traffic()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(config.patch(SETTINGS))
        # It goes into the text of a kernel, and asks Triton for a driver.
        stack.enter_context(patch("torch.utils._triton.triton_hash_with_backend", return_value=""))
        fake = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in inputs]
        for i in trained:
            fake[i] = leaf(fake[i])
        torch.compiler.reset()
        compiled = torch.compile(function, dynamic=False, fullgraph=True, backend=partial(_backend, traffic))
        with torch.set_grad_enabled(bool(trained)):
            results = compiled(*fake)
        results = (results,) if isinstance(results, Tensor) else results
        if trained:
            backward(results, [torch.empty_like(r) for r in results])
    moved = traffic.read + traffic.written
    return Count(name, shape, moved, traffic.launches, traffic.peak, minimum, traffic.flops)


class _Compiled(BaseException):  # no Exception: inductor would wrap it
    """The program is written, and is not to be loaded."""


def _backend(traffic: Traffic, graph: Any, inputs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx

    program: Any = partial(_program, traffic)
    return compile_fx(graph, inputs, inner_compile=program)


def _program(traffic: Traffic, graph: Any, inputs: Any, **options: Any) -> Callable[[list[Any]], Any]:
    """Stands where inductor compiles one graph: the program it would run, made to run on fake tensors under `traffic`."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering

    texts: list[str] = []

    def written(text: str) -> None:
        texts.append(re.sub(r"^import triton.*$", "", text, flags=re.M))
        raise _Compiled

    with patch.object(GraphLowering, "save_output_code", written), suppress(_Compiled):
        compile_fx_inner(graph, inputs, **options)
    with patch.object(AsyncCompile, "triton", lambda _, name, text, **__: Kernel(traffic, text)):
        names = vars(PyCodeCache.load(texts[0]))
    names["empty_strided_cpu"] = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    names["reinterpret_tensor"] = lambda x, size, stride, start=0: x.as_strided(
        size, stride, x.storage_offset() + start
    )
    names["assert_size_stride"] = names["assert_alignment"] = lambda *_: None

    def run(args: list[Any]) -> Any:
        with traffic:
            return names["call"](args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class Kernel:
    """A Triton kernel by its text, whose launches are counted instead of run."""

    def __init__(self, traffic: Traffic, text: str) -> None:
        signature = _SIGNATURE.search(text)
        if signature is None:
            raise ValueError("bench: a kernel of inductor without a signature")
        self._traffic = traffic
        self._names = [p.strip() for p in signature[1].split(",") if "constexpr" not in p]
        self._accesses = [(m[1], m[2], _parenthesis(text, m.end())) for m in _ACCESS.finditer(text)]

    def run(self, *args: Any, **_: Any) -> None:
        """One launch; tensors and numbers of steps in the order of the signature."""
        given = dict(zip(self._names, args, strict=True))
        steps = {name.removesuffix("numel"): n for name, n in given.items() if name.endswith("numel")}
        own = {pointer for kind, pointer, _ in self._accesses if kind == "store" and pointer.startswith("out_ptr")}
        elements: dict[tuple[str, bool], int] = defaultdict(int)
        for kind, pointer, index in self._accesses:
            # Through a loaded index any element may be met, but at most one per step.
            reach = math.prod(n for s, n in steps.items() if re.search(rf"\b(tmp|{s})(\d|index)", index))
            if kind != "load":
                elements[pointer, True] += reach
            if kind != "store" and pointer not in own:
                elements[pointer, False] += reach
        moved = {True: 0, False: 0}
        for (pointer, written), n in elements.items():
            x: Tensor = given[pointer]
            moved[written] += min(n, x.numel()) * x.element_size()
        self._traffic.add(moved[False], moved[True])


def _parenthesis(text: str, start: int) -> str:
    """From the one that opens at `start` to where it closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return text[start : i + 1]
    raise ValueError("bench: a kernel of inductor with an open parenthesis")
