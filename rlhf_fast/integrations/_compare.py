"""Two calls with the same inputs: how they leave no trace, and how their results and gradients are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)

TOLERANCE = {
    torch.float64: (1e-6, 1e-6),
    torch.float32: (2e-5, 1e-4),
    torch.float16: (4e-3, 1e-2),
    torch.bfloat16: (2e-2, 5e-2),
}
"""{coarsest dtype of the inputs: (values, gradients)}. Values: of 1 + the largest magnitude of the output. Gradients: of the
norm. The half-precision rows are the rounding of the frameworks, which compute in those dtypes; fp64 has room for the 1e-8 that
verl adds to its denominators."""


class Unsupported(Exception):
    """Raised by a replacement for a call it does not serve; the call goes to the original, and the reason is kept."""


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors_in(y)
    elif isinstance(x, dict):
        yield from tensors_in(list(x.values()))


def plain(tensors: Sequence[Tensor]) -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Unsupported("inside of a function transform")
    for x in tensors:
        if (type(x) is not Tensor and type(x) is not torch.nn.Parameter) or x.is_nested:
            raise Unsupported(f"an argument is a {'nested tensor' if x.is_nested else type(x).__name__}")
        if hasattr(x, "ds_id"):
            raise Unsupported("an argument is a parameter of DeepSpeed, which ZeRO-3 partitions before the backward")


def wants_gradients(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class Recorded(NamedTuple):
    """One call on stand-ins for the inputs."""

    results: list[tuple[str, Any]]
    """Tensors, numbers and what else the call returned, each with its place."""
    inputs: list[Tensor]
    """Leaves that gradients can be asked for, in the order of the arguments."""


def recorded(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wants: bool,
    cuda: Sequence[int],
    *,
    copies: bool,
) -> Recorded:
    """Call a function without a trace in the graph or in the random numbers of the CPU and of the devices in `cuda`; nor in the
    inputs, when it gets copies."""
    # The hooks of a checkpoint around the caller count what its forward saves: these tensors are not among them.
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        torch.set_grad_enabled(wants),
        torch.random.fork_rng(devices=cuda),
    ):
        leaves: dict[int, tuple[Tensor, Tensor]] = {}
        args, kwargs = _detached((args, kwargs), leaves, wants, copies)
        results = list(_leaves(function(*args, **kwargs)))
    return Recorded(results, [leaf for leaf, _ in leaves.values() if leaf.requires_grad])


def _detached(x: Any, leaves: dict[int, tuple[Tensor, Tensor]], wants: bool, copies: bool) -> Any:
    """The same structure around detached tensors, or copies of them (some originals work in place), in a graph of their own.

    Fills {id: (leaf that a gradient can be asked for, what stands in for the tensor)}.
    """
    if isinstance(x, Tensor):
        if id(x) not in leaves:
            leaf = x.detach()
            leaf = leaf.requires_grad_() if wants and x.requires_grad else leaf
            leaves[id(x)] = leaf, leaf.clone() if copies else leaf
        return leaves[id(x)][1]
    if type(x) in (list, tuple):
        return type(x)(_detached(y, leaves, wants, copies) for y in x)
    if type(x) is dict:
        return {k: _detached(y, leaves, wants, copies) for k, y in x.items()}
    return x


def _leaves(x: Any, path: str = "result") -> Iterator[tuple[str, Any]]:
    if isinstance(x, (list, tuple)):
        for i, y in enumerate(x):
            yield from _leaves(y, f"{path}[{i}]")
    elif isinstance(x, Mapping):
        for k in sorted(x):
            yield from _leaves(x[k], f"{path}[{k!r}]")
    else:
        yield path, x


def compare(
    ours: Recorded, theirs: Recorded, counted: Tensor | None, constant: Sequence[int], dtypes: Sequence[torch.dtype]
) -> str | None:
    """The first disagreement, or None.

    Results of the shape of `counted` (bool) are compared where it is True; the gradients of the results numbered in `constant`
    are not. Raises Unsupported where the original gives NaN or infinity and ours does not.
    """
    floats = [d for d in dtypes if d in TOLERANCE] or [torch.float32]
    values, gradients = TOLERANCE[max(floats, key=lambda d: torch.finfo(d).eps)]
    if [path for path, _ in ours.results] != [path for path, _ in theirs.results]:
        return f"{len(ours.results)} results instead of {len(theirs.results)}"
    upstream: list[tuple[Tensor, Tensor, Tensor]] = []
    for i, ((path, a), (_, b)) in enumerate(zip(ours.results, theirs.results, strict=True)):
        if not isinstance(b, Tensor):
            problem = _different(a, b, values)
        elif not isinstance(a, Tensor) or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            problem = f"is {_named(a)}, the original's {_named(b)}"
        elif a.requires_grad != b.requires_grad and i not in constant:
            problem = f"{'has' if a.requires_grad else 'lacks'} a gradient, unlike the original's"
        else:
            real = counted if counted is not None and counted.shape == b.shape else None
            problem = _far(a, b, real, values)
            if a.requires_grad and b.requires_grad and i not in constant:
                weight = torch.arange(b.numel(), device=b.device).cos().reshape(b.shape).to(b.dtype)
                upstream.append((a, b, weight if real is None else weight.where(real, 0.0)))
        if problem is not None:
            return f"{path} {problem}"
    return _gradients(upstream, ours.inputs, theirs.inputs, gradients) if upstream else None


def _gradients(
    upstream: Sequence[tuple[Tensor, Tensor, Tensor]], ours: list[Tensor], theirs: list[Tensor], tolerance: float
) -> str | None:
    """Compares what (result of ours, result of theirs, weight) send back to the inputs."""
    weights = [w for _, _, w in upstream]
    floor = 1e-6 * float(torch.stack([w.double().norm() for w in weights]).norm())
    left = torch.autograd.grad([a for a, _, _ in upstream], ours, weights, allow_unused=True)
    right = torch.autograd.grad([b for _, b, _ in upstream], theirs, weights, allow_unused=True)
    for n, (a, b) in enumerate(zip(left, right, strict=True)):
        if a is None and b is None:
            continue
        b = torch.zeros_like(a) if b is None else b
        a = torch.zeros_like(b) if a is None else a
        if a.dtype != b.dtype:
            return f"has gradient {n} in {a.dtype}, the original's in {b.dtype}"
        _comparable(a, b)
        norm, error = float(b.double().norm()), float((a.double() - b.double()).norm())
        if not error <= tolerance * norm + floor:
            return f"has gradient {n} {error:.3g} away (norm {norm:.3g}, tolerance {tolerance:g})"
    return None


def _different(a: Any, b: Any, tolerance: float) -> str | None:
    if isinstance(a, float) and isinstance(b, float):
        return _far(torch.tensor(a), torch.tensor(b), None, tolerance)
    return None if a == b else f"is {_named(a)}, the original's {_named(b)}"


def _far(a: Tensor, b: Tensor, real: Tensor | None, tolerance: float) -> str | None:
    a, b = a.detach(), b.detach()
    if real is not None:
        a, b = a[real], b[real]
    if not b.numel():
        return None
    if not b.is_floating_point():
        return None if torch.equal(a, b) else "differs from the original's"
    _comparable(a, b)
    a, b = a.double(), b.double()
    error = (a - b).abs().where((a != b) & ~(a.isnan() & b.isnan()), 0.0).max()  # equal infinities are equal
    scale = 1 + b.abs().where(b.isfinite(), 0.0).max()
    if bool(error <= tolerance * scale):
        return None
    return f"is up to {float(error):.3g} away (tolerance {float(tolerance * scale):.3g})"


def _comparable(a: Tensor, b: Tensor) -> None:
    if bool((b.isnan() & ~a.isnan()).any()):
        raise Unsupported("not checked yet: the original gives NaN, ours does not")
    if bool((b.isinf() & a.isfinite()).any()):
        raise Unsupported("not checked yet: the original overflows, ours does not")


def _named(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else repr(x)


def any_half(tensors: Sequence[Tensor]) -> bool:
    """Some tensor is in half precision, so what PyTorch computes from it is rounded at every step."""
    return any(x.dtype in HALF for x in tensors)


def never(tensors: Sequence[Tensor]) -> bool:
    """The original computes in fp32 whatever it is given."""
    return False


def as_mask(mask: Tensor) -> Tensor:
    """A mask of a framework as bool. Raises Unsupported when its floats are weights."""
    if mask.dtype is torch.bool:
        return mask
    real = mask != 0
    if mask.is_floating_point() and not bool((mask == real).all()):
        raise Unsupported("the mask holds weights other than 0 and 1")
    return real


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """dtype of arithmetic between the tensors."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None))


def constants(**tensors: Tensor | None) -> None:
    """Raises Unsupported when a tensor that is a constant to ours has a gradient."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise Unsupported(f"{name} has a gradient")
