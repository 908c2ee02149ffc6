"""One row of the op grid: a schema, a reference, and the backends that compute it.

Every op is registered once with torch.library, so that torch.compile, fake tensors, opcheck and autograd know it.
A call on plain tensors in eager mode goes to the backend directly: the dispatcher and its generic autograd wrapper cost
more than a small kernel (measured on 8 elements: 33 us through the dispatcher against 15 us directly, with gradient).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from rlhf_fast import _env, _native

NAMES = ("cuda", "triton", "cpp", "reference")
OPS: dict[str, Op] = {}

_library = torch.library.Library("rlhf_fast", "DEF")
_forced: str | None = None
_env_read = False


@dataclass(frozen=True)
class Backend:
    """One cell of the grid."""

    name: str
    device: str
    """torch device type, or "*" for every device."""
    fn: Callable[..., Any]
    missing: Callable[[], str | None] = lambda: None
    """Reason why it cannot be used on this machine, or None."""
    declines: Callable[..., str | None] | None = None
    """Of the arguments of a call: reason why it does not serve them, or None. A backward op declines what its forward does."""


def cpp(fn: Callable[..., Any], declines: Callable[..., str | None] | None = None) -> Backend:
    """The cell of a C++ CPU kernel."""
    return Backend("cpp", "cpu", fn, _native.missing, declines)


def cuda(module: str, function: str = "forward", declines: Callable[..., str | None] | None = None) -> Backend:
    """The cell of a CUDA kernel: a function of rlhf_fast.cuda.<module>, imported at its first call."""
    return Backend("cuda", "cuda", _late(f"rlhf_fast.cuda.{module}", function), _cuda_missing, declines)


def triton(module: str, function: str = "forward", declines: Callable[..., str | None] | None = None) -> Backend:
    """The cell of a Triton kernel: a function of rlhf_fast.kernels.<module>, imported with Triton at its first call."""
    return Backend("triton", "cuda", _late(f"rlhf_fast.kernels.{module}", function), _triton_missing, declines)


def no_doubles(*args: Any) -> str | None:
    """`declines` of kernels that compute in fp32."""
    if any(isinstance(x, Tensor) and x.dtype is torch.float64 for x in args):
        return "fp64 is left to the reference"
    return None


def _late(module: str, function: str) -> Callable[..., Any]:
    @functools.cache
    def found() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), function)

    return lambda *args: found()(*args)


def _cuda_missing() -> str | None:
    return importlib.import_module("rlhf_fast.cuda").missing()


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


class Op:
    """A registered op. Calling it picks the backend; `backward` makes it differentiable.

    A cell finds its tensors contiguous, from the checks of the public function or, below the dispatcher, from here; only the
    upstream gradients of a backward may have any strides. An op with `strided` takes any strides everywhere. A cell may
    return None for a result that nobody asked for; below the dispatcher it becomes an empty tensor, as the schema wants.

    `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)` follow torch.library.register_autograd; a backward must
    itself be made of ops, since torch.compile traces it. Inputs that are tensors come first in the schema.

    With `gradients_in_forward` the op is a loss that returns (loss, stats, gradients), the last one stacking the gradients of
    the differentiable inputs that are not None; it needs no backward of its own.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        backends: Sequence[Backend] = (),
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        differentiable: Sequence[int] = (),
        gradients_in_forward: bool = False,
        strided: bool = False,
    ) -> None:
        self.name = name
        self.reference = reference
        self._fake = fake
        self.backends = (*backends, Backend("reference", "*", reference))
        self._differentiable = tuple(differentiable)
        self._gradients_in_forward = gradients_in_forward
        self._strided = strided
        if gradients_in_forward:
            setup_context, backward = self._setup_scaling, _scale_gradients
        self._chosen: dict[str, tuple[Backend, ...]] = {}
        self.declined: dict[tuple[str, str], int] = {}
        """{(backend, reason): calls that went to the next backend}."""
        _library.define(f"{name}{schema}")
        _library.impl(name, self._below_autograd, "CompositeExplicitAutograd")
        torch.library.register_fake(f"rlhf_fast::{name}", fake, lib=_library)
        self._function: Any = None
        if backward is not None and setup_context is not None:
            torch.library.register_autograd(f"rlhf_fast::{name}", backward, setup_context=setup_context, lib=_library)
            self._function = _autograd_function(self, setup_context, backward)
        self._packet = getattr(torch.ops.rlhf_fast, name).default
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        first = args[0]
        if torch.compiler.is_compiling():
            return self._packet(*args)
        if not plain(first) or forward_ad._current_level >= 0:
            if self._transformed(args):
                return self._of_reference(args)
            return self._packet(*args)
        device = "cpu" if first.is_cpu else first.device.type  # device.type costs ten times as much
        backend = (self._chosen.get(device) or self._usable(device))[0]
        if backend.declines is not None:
            backend = self.cell(args)
        if self._function is not None and torch.is_grad_enabled():
            for i in self._differentiable:
                if args[i] is not None and args[i].requires_grad:
                    if backend.name == "reference":
                        return backend.fn(*args)
                    if self._gradients_in_forward:
                        loss, stats, grads = backend.fn(*args)
                        inputs = [args[k] for k in self._differentiable]
                        return (
                            _Attach.apply((loss, grads), *inputs),
                            stats,
                            None,
                        )  # the gradients belong to the backward
                    return self._function.apply(*args)
        return backend.fn(*args)

    def _transformed(self, args: Sequence[Any]) -> bool:
        """Whether a derivative of this call is looked for by other means than autograd's backward: torch.func, or forward mode."""
        active = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
        return active and self._function is not None and any(isinstance(x, Tensor) and _tracked(x) for x in args)

    def _of_reference(self, args: Sequence[Any]) -> Any:
        """The reference is made of operators that every transform knows. torch would refuse the op without naming it, and in forward
        mode take it for a constant."""
        if forced_backend() == "reference":
            return self.reference(*args)
        raise RuntimeError(
            f"{self.name}: the derivatives of torch.func and of forward mode are not available: use torch.autograd.grad, or "
            "use_backend('reference'), which has them"
        )

    def select(self, device: str) -> Backend:
        """The first available backend for the device type, or the forced one.

        Raises RuntimeError when the forced backend cannot serve this op on this device.
        """
        return (self._chosen.get(device) or self._usable(device))[0]

    def cell(self, args: Sequence[Any]) -> Backend:
        """The first available backend that serves these arguments, or the forced one.

        Raises RuntimeError when the forced backend is not available or declines them.
        """
        device = args[0].device.type
        usable = self._chosen.get(device) or self._usable(device)
        for backend in usable:
            reason = None if backend.declines is None else backend.declines(*args)
            if reason is None:
                return backend
            self.declined[backend.name, reason] = self.declined.get((backend.name, reason), 0) + 1
        raise RuntimeError(f"{self.name}: backend '{usable[-1].name}' was forced and declines this call: {reason}")

    def _usable(self, device: str) -> tuple[Backend, ...]:
        """The backends that are available for the device type, in order of priority."""
        if device == "meta":  # no data: shapes alone
            return (Backend("meta", "meta", self._fake),)
        forced = forced_backend()
        cells = [b for b in self.backends if b.device in (device, "*") and forced in (None, b.name)]
        reasons = {b.name: b.missing() for b in cells}
        usable = tuple(b for b in cells if reasons[b.name] is None)
        if not usable:
            why = "; ".join(filter(None, reasons.values())) or f"there is no such kernel for {device} tensors"
            raise RuntimeError(f"{self.name}: backend '{forced}' was forced and is not available: {why}")
        self._chosen[device] = usable
        return usable

    def _below_autograd(self, *args: Any) -> Any:
        if not self._strided:
            args = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in args)
        found = self.cell(args).fn(*args)
        if type(found) is tuple:
            return tuple(found[0].new_empty(0) if x is None else x for x in found)
        return found

    def _setup_scaling(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        _, stats, grads = output
        ctx.mark_non_differentiable(stats, grads)
        ctx.save_for_backward(grads)
        ctx.places = [i for i in self._differentiable if inputs[i] is not None]
        ctx.inputs = len(inputs)

    def cells(self) -> dict[str, list[tuple[str, bool, str | None]]]:
        """{device: [(backend, available, reason)]}, in order of priority."""
        grid: dict[str, list[tuple[str, bool, str | None]]] = {}
        devices = {b.device for b in self.backends if b.device != "*"} | {"cpu", "cuda"}
        for device in sorted(devices):
            for b in self.backends:
                if b.device in (device, "*"):
                    try:
                        reason = b.missing()
                    except _native.IsaError as error:
                        reason = str(error)
                    grid.setdefault(device, []).append((b.name, reason is None, reason))
        return grid


def plain(x: Tensor) -> bool:
    """A real tensor outside of every dispatch mode and function transform: no one needs to see the call."""
    kind = type(x)
    return (
        (kind is Tensor or kind is torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


SERVED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the C++ kernels that stand in for the layers of a model."""


def served(x: Tensor, op: str) -> bool:
    """Whether the C++ kernel of an op computes on this tensor as it is, in the place of a layer."""
    return (
        plain(x)
        and x.is_cpu
        and x.dtype in SERVED
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and OPS[op].select("cpu").name == "cpp"
    )


def _tracked(x: Tensor) -> bool:
    """Whether a torch.func transform or forward mode differentiates towards x, at any level of nesting."""
    functorch = torch._C._functorch
    while forward_ad.unpack_dual(x).tangent is None:
        if not functorch.is_functorch_wrapped_tensor(x):
            return False
        if functorch.is_gradtrackingtensor(x) and x.requires_grad:
            return True
        x = functorch.get_unwrapped(x)
    return True


def last_use(ctx: Any, grad: Tensor) -> bool:
    """Whether a backward may overwrite what its forward kept: no other backward is to come, and no one else has seen it."""
    return hasattr(ctx, "direct") and plain(grad) and not torch._C._autograd._get_current_graph_task_keep_graph()


def _scale_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the forward pass times the upstream gradient, at the places of their inputs."""
    return _at_places(ctx, ctx.saved_tensors[0] * grad)


def _at_places(ctx: Any, stacked: Tensor) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * ctx.inputs
    for i, each in zip(ctx.places, stacked.unbind(), strict=True):
        result[i] = each
    return tuple(result)


class _Attach(torch.autograd.Function):
    """Hangs gradients that are already there on a loss; cheaper than a Function that takes every argument of the op."""

    @staticmethod
    def forward(ctx: Any, found: tuple[Tensor, Tensor], *inputs: Tensor | None) -> Tensor:
        loss, grads = found
        ctx.save_for_backward(grads)
        ctx.places = [i for i, x in enumerate(inputs, 1) if x is not None]
        ctx.inputs = len(inputs) + 1
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch._C._autograd._get_current_graph_task_keep_graph() or torch.is_grad_enabled() or not plain(grad):
            return _scale_once(ctx, grad)
        # The last backward gets the memory of the forward pass, which nobody else can see. The upstream gradient of a loss that
        # backward() is called on is 1: nothing is left to do.
        (kept,) = ctx.saved_tensors
        return _at_places(ctx, kept if grad.is_cpu and grad.item() == 1.0 else kept.mul_(grad))


_scale_once = once_differentiable(_scale_gradients)


def _autograd_function(op: Op, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Any:
    def forward(ctx: Any, *args: Any) -> Any:
        output = op.cell(args).fn(*args)
        ctx.direct = True  # the public function drops the outputs that it does not return
        setup_context(ctx, args, output)
        return output

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(_first_derivative_only(op.name, backward)),
    }
    return type(f"{op.name}_function", (torch.autograd.Function,), members)


@contextlib.contextmanager
def grad_inside_op() -> Iterator[None]:
    """Grad mode that also holds where torch runs an op below its autograd layer, as compiled graphs do."""
    key = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for k in (key.AutogradFunctionality, key.AutogradOther, key.AutogradNestedTensor):
        excluded = excluded.remove(k)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _first_derivative_only(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward`, whose results raise when they are differentiated again.

    torch's once_differentiable raises only when an upstream gradient requires grad, and drops the second-order term in silence
    when just the saved inputs do.
    """
    message = f"{name}: the second derivative is not available; use_backend('reference') has it".encode()

    def first(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # create_graph=True turns it on
            return found
        delayed = torch._C._functions.DelayedError(message, len(found))  # type: ignore[attr-defined]
        return delayed(*(x if x is None else x.detach().requires_grad_() for x in found))  # type: ignore[arg-type]

    return first


def reference_backward(
    reference: Callable[..., Any], inputs: Sequence[Any], wanted: Sequence[int], grads: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients of `reference(*inputs)` towards inputs[i], i in wanted, by autograd: the oracle of a backward op.

    Outputs whose upstream gradient is None, and outputs that depend on no wanted input, are left out.
    """
    detached = list(inputs)
    with grad_inside_op():
        for i in wanted:
            detached[i] = inputs[i].detach().requires_grad_()
        outputs = reference(*detached)
        pairs = [
            (o, g.to(o.dtype))
            for o, g in zip(outputs if isinstance(outputs, tuple) else (outputs,), grads, strict=True)
            if g is not None and o is not None and o.requires_grad
        ]
        targets = [detached[i] for i in wanted]
        if not pairs:
            return tuple(torch.zeros_like(t) for t in targets)
        found = torch.autograd.grad(
            [o for o, _ in pairs], targets, [g for _, g in pairs], allow_unused=True, materialize_grads=True
        )
    return tuple(found)


def forced_backend() -> str | None:
    """Name of the backend forced by `use_backend` or RLHF_FAST_BACKEND, or None."""
    global _env_read, _forced
    if not _env_read:
        name = _env.get("BACKEND")
        _forced = None if name is None else _known(name, "RLHF_FAST_BACKEND")
        _env_read = True
    return _forced


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend ("cpp", "triton", "cuda", "reference") for every op, or None for the default order.

    Applies to the whole process, so that the threads of the autograd engine follow too.
    Raises ValueError for an unknown name; an op that lacks the backend raises RuntimeError when it is called.
    """
    global _forced
    before = forced_backend()
    _forced = None if name is None else _known(name, "use_backend")
    _forget()
    try:
        yield
    finally:
        _forced = before
        _forget()


def _known(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: unknown backend {name!r}, expected one of {', '.join(NAMES)}")
    return name


def _forget() -> None:
    for op in OPS.values():
        op._chosen.clear()


def backends() -> dict[str, dict[str, list[tuple[str, bool, str | None]]]]:
    """{op: {device: [(backend, available, reason)]}}, each list in order of priority."""
    return {name: op.cells() for name, op in OPS.items() if not name.endswith("_backward")}
