"""Triton's interpreter with the arithmetic of the compiled kernel and with every access checked.

The stock interpreter (3.9.0) computes bf16 on its bit patterns, truncates fp32 -> bf16, gives masked-off lanes a 0 that no GPU
promises, and dereferences any address. The replacements here are methods of InterpreterBuilder and of the classes beside
it; `patches` lists them and the sanitizer puts them in for as long as it is active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from gpu.tools import numerics
from gpu.tools.shadow import Memory
from numpy.typing import NDArray

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle

ORIGIN = "origin"
"""Attribute of a handle of pointers: number of the argument they were made from."""

NARROW = "narrow"
"""Attribute of a handle of 32-bit integers that grow with the program's number."""

# Operations whose result points where their operands point, or grows as they do: name, positions of the operands.
_CARRYING = {
    "create_broadcast": (0,),
    "create_expand_dims": (0,),
    "create_splat": (1,),
    "create_unsplat": (0,),
    "create_reshape": (0,),
    "create_trans": (0,),
    "create_bitcast": (0,),
    "create_int_to_ptr": (0,),
    "create_ptr_to_int": (0,),
    "create_addptr": (0,),
    "create_select": (1, 2),
    "create_join": (0, 1),
    "create_cat": (0, 1),
}


def patches(memory: Memory, report: Callable[[str, str], None], round_tf32: bool) -> list[tuple[Any, str, Any]]:
    """(class or module, attribute, replacement) for one sanitizer."""
    arithmetic, access = _Arithmetic(memory, report, round_tf32), _Access(memory, report)
    found: list[tuple[Any, str, Any]] = [
        (Builder, name, _carries(getattr(Builder, name), at)) for name, at in _CARRYING.items()
    ]
    for owner in (arithmetic, access):
        found += [(Builder, name, getattr(owner, name)) for name in dir(owner) if not name.startswith("_")]
    # A bound method on a class is not bound again: the builder itself is not passed. It has no state that matters here.
    language = interpreter._patch_lang_core
    found += [
        (interpreter.ReduceOps, "generic_reduce", _tree_reduce),
        (interpreter.ScanOps, "generic_scan", _doubling_scan),
        (interpreter.ReduceOps, "apply_impl", _in_f32(interpreter.ReduceOps.apply_impl, memory, report)),
        (interpreter.ScanOps, "apply_impl", _in_f32(interpreter.ScanOps.apply_impl, memory, report)),
        (
            interpreter,
            "_patch_lang_core",
            lambda lang, scope: (language(lang, scope), _check_hints(lang, scope, report)),
        ),
        # The language is patched once a launch; the stock interpreter does so again at every call of a device function.
        (interpreter.InterpretedFunction, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)),
    ]
    return found


def _carries(stock: Callable[..., Any], operands: tuple[int, ...]) -> Callable[..., Any]:
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = stock(self, *args, **kwargs)
        for name in (ORIGIN, NARROW):
            found = {args[i].attr[name] for i in operands if i < len(args) and name in getattr(args[i], "attr", {})}
            if len(found) == 1:
                out.attr[name] = found.pop()
        return out

    return replacement


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _f32(handle: Any) -> NDArray:
    """The data, bf16 as fp32."""
    return numerics.bf16_to_f32(handle.data) if _is_bf16(handle) else handle.data


def _bf16(values: NDArray) -> Any:
    return Handle(numerics.f32_to_bf16(values), tl.bfloat16)


class _Arithmetic:
    """Each public method replaces the builder's of the same name."""

    def __init__(self, memory: Memory, report: Callable[[str, str], None], round_tf32: bool) -> None:
        self._memory, self._report, self._round_tf32 = memory, report, round_tf32
        self._stock = interpreter.interpreter_builder
        names = (
            "binary_op",
            "unary_op",
            "cast_impl",
            "create_fma",
            "create_dot",
            "create_fp_to_fp",
            "create_get_program_id",
        )
        self._methods = {name: getattr(Builder, name) for name in names}

    def _count(self, name: str, elements: int) -> None:
        self._memory.launch.ops[name] += elements

    def _as_before(self, name: str, *args: Any) -> Any:
        with np.errstate(all="ignore"):
            return self._methods[name](self._stock, *args)

    def binary_op(self, left: Any, right: Any, op: Any) -> Any:
        self._count(op.__name__, max(np.size(left.data), np.size(right.data)))
        if _is_bf16(left) or _is_bf16(right):
            with np.errstate(all="ignore"):
                out = op(_f32(left), _f32(right))
            return Handle(out, tl.bfloat16) if out.dtype == np.bool_ else _bf16(out)
        out = self._as_before("binary_op", left, right, op)
        if op in (np.add, np.multiply, np.subtract) and left.data.dtype == right.data.dtype == np.int32:
            self._watch_width(left, right, op, out)
            exact = op(left.data.astype(np.int64), right.data.astype(np.int64))
            if exact.size and (exact.max() >= 2**31 or exact.min() < -(2**31)):
                worst = int(exact.reshape(-1)[np.abs(exact).argmax()])
                self._report("int32-wrap", f"{op.__name__} gives {worst}")
        return out

    def _watch_width(self, left: Any, right: Any, op: Any, out: Any) -> None:
        """A small grid does not wrap, but the same kernel on a large one may."""
        if NARROW in left.attr or NARROW in right.attr:
            out.attr[NARROW] = True
            if op is np.multiply:
                self._report("narrow-offset", "a product of the program's number in 32 bits: .to(tl.int64) first")

    def create_get_program_id(self, axis: int) -> Any:
        out = self._as_before("create_get_program_id", axis)
        out.attr[NARROW] = True
        return out

    def unary_op(self, x: Any, op: Any) -> Any:
        self._count(op.__name__, x.data.size)
        if _is_bf16(x):
            with np.errstate(all="ignore"):
                return _bf16(op(_f32(x)))
        return self._as_before("unary_op", x, op)

    def create_rsqrt(self, x: Any) -> Any:
        return self.unary_op(x, rsqrt)

    def cast_impl(self, source: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and not _is_bf16(source):
            return _bf16(source.data.astype(np.float32))
        if _is_bf16(source) and to.scalar != tl.bfloat16:
            wide = Handle(_f32(source), tl.float32)
            return wide if to.scalar == tl.float32 else self._as_before("cast_impl", wide, to)
        return self._as_before("cast_impl", source, to)

    def create_fp_to_fp(self, source: Any, to: Any, rounding: Any) -> Any:
        widths = (source.dtype.scalar.primitive_bitwidth, to.scalar.primitive_bitwidth)
        toward_zero = "RTZ" in str(rounding).upper()
        if min(widths) >= 16 and not toward_zero:
            return self.cast_impl(source, to)
        return self._as_before("create_fp_to_fp", source, to, rounding)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        self._count("fma", z.data.size)
        if _is_bf16(z):
            return _bf16(_f32(x).astype(np.float64) * _f32(y) + _f32(z))
        return self._as_before("create_fma", x, y, z)

    def create_dot(self, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        left, right = _f32(a), _f32(b)
        self._count("dot_flop", 2 * int(np.prod(left.shape)) * right.shape[-1])
        if _is_bf16(a) or _is_bf16(b):
            product = np.matmul(left.astype(np.float32), right.astype(np.float32))
            return Handle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)
        name = str(precision).upper()
        if self._round_tf32 and left.dtype == np.float32 and "TF32" in name and "X3" not in name:
            a, b = (Handle(numerics.tf32(x.data), tl.float32) for x in (a, b))
        return self._as_before("create_dot", a, b, d, precision, imprecise)


class _Access:
    """Each public method replaces the builder's of the same name."""

    def __init__(self, memory: Memory, report: Callable[[str, str], None]) -> None:
        self._memory, self._report = memory, report
        self._stock = interpreter.interpreter_builder
        self._rmw, self._cas = Builder.create_atomic_rmw, Builder.create_atomic_cas

    def _locate(self, what: str, pointers: Any, mask: NDArray) -> Any:
        itemsize = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        return self._memory.locate(what, pointers.data, mask, pointers.attr.get(ORIGIN), itemsize)

    def create_masked_load(
        self, pointers: Any, mask: Any, other: Any, cache_policy: Any = None, is_volatile: bool = False
    ) -> Any:
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        access = self._locate("load", pointers, mask.data)
        self._memory.load(access)
        undefined = numerics.poison(access.safe.shape, dtype, kind == tl.bfloat16)
        fill = undefined if other is None else np.broadcast_to(other.data, access.safe.shape)
        refused = mask.data & ~access.safe
        if refused.any():
            fill = np.where(refused, undefined, fill)
        loaded = interpreter._interpreter.load(pointers.data, access.safe, np.ascontiguousarray(fill), dtype)
        return Handle(loaded, kind)

    def create_masked_store(self, pointers: Any, value: Any, mask: Any, cache_policy: Any = None) -> Any:
        access = self._locate("store", pointers, mask.data)
        self._memory.store(access)
        return interpreter._interpreter.store(pointers.data, value.data, access.safe)

    def create_load(self, pointers: Any, cache_policy: Any = None, is_volatile: bool = False) -> Any:
        return self.create_masked_load(pointers, _all(pointers), None)

    def create_store(self, pointers: Any, value: Any, cache_policy: Any = None) -> Any:
        return self.create_masked_store(pointers, value, _all(pointers))

    def _atomic(self, pointers: Any, mask: NDArray, order: Any) -> Any:
        access = self._locate("atomic", pointers, mask)
        name = str(order).upper()
        both = "ACQUIRE_RELEASE" in name
        self._memory.atomic(access, both or name.endswith("ACQUIRE"), both or name.endswith("RELEASE"))
        return access

    def create_atomic_rmw(self, op: Any, pointers: Any, value: Any, mask: Any, order: Any, scope: Any) -> Any:
        if "FADD" in str(op).upper():
            self._report("float-atomic", "a floating sum by atomics depends on the order of the programs")
        access = self._atomic(pointers, mask.data, order)
        return self._rmw(self._stock, op, pointers, value, Handle(access.safe, tl.int1), order, scope)

    def create_atomic_cas(self, pointers: Any, expected: Any, value: Any, order: Any, scope: Any) -> Any:
        access = self._atomic(pointers, np.ones(pointers.data.shape, bool), order)
        if not access.safe.all():
            return Handle(numerics.poison(pointers.data.shape, expected.data.dtype), expected.dtype.scalar)
        return self._cas(self._stock, pointers, expected, value, order, scope)

    def create_barrier(self) -> None:
        self._memory.barrier()


def _all(pointers: Any) -> Any:
    return Handle(np.ones(pointers.data.shape, bool), tl.int1)


def rsqrt(x: NDArray) -> NDArray:
    return 1 / np.sqrt(x)


# ---- reductions and scans


def _in_f32(stock: Callable[..., Any], memory: Memory, report: Callable[[str, str], None]) -> Callable[..., Any]:
    """bf16 is reported, reduced in fp32 and rounded: the GPU would accumulate in bf16."""

    def replacement(self: Any, inputs: tuple[Any, ...]) -> Any:
        memory.reduction()
        narrow = [_is_bf16(x.handle) for x in inputs]
        if not any(narrow):
            return stock(self, inputs)
        report("bf16-reduce", "a reduction or scan of bf16 accumulates in bf16 on a GPU: cast to float32 first")
        wide = tuple(_tensor(_f32(x.handle), tl.float32) if n else x for x, n in zip(inputs, narrow, strict=True))
        out = stock(self, wide)
        out = out if isinstance(out, (list, tuple)) else (out,)
        rounded = [numerics.f32_to_bf16(x.handle.data) if n else None for x, n in zip(out, narrow, strict=False)]
        return [
            x if bits is None else _tensor(bits, tl.bfloat16, x.type.is_block())
            for x, bits in zip(out, rounded, strict=True)
        ]

    return replacement


def _tensor(data: NDArray, kind: Any, block: bool = True) -> Any:
    return tl.tensor(Handle(data, kind), tl.block_type(kind, list(data.shape)) if block else kind)


def _combined(function: Any, left: list[NDArray], right: list[NDArray], kinds: list[Any]) -> list[NDArray]:
    """The user's combine function on whole tiles."""
    args = [_tensor(x, kind) for part in (left, right) for x, kind in zip(part, kinds, strict=True)]
    out = function.fn(*args)
    out = out if isinstance(out, tuple) else (out,)
    return [np.broadcast_to(x.handle.data, left[0].shape) for x in out]


def _tree_reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Neighbours are combined until one is left, so a combine function that does not commute sees them in order."""
    kinds = [x.handle.dtype.scalar for x in inputs]
    data = [x.handle.data for x in inputs]
    dimensions = data[0].ndim
    if self.axis is None:
        data = [x.reshape(-1) for x in data]
    data = [np.moveaxis(x, 0 if self.axis is None else self.axis, -1) for x in data]
    while data[0].shape[-1] > 1:
        data = _combined(self.combine_fn, [x[..., 0::2] for x in data], [x[..., 1::2] for x in data], kinds)
    data = [x[..., 0] for x in data]
    if self.keep_dims:
        data = [x.reshape((1,) * dimensions) if self.axis is None else np.expand_dims(x, self.axis) for x in data]
    return [self.to_tensor(x if x.ndim else x.item(), kind) for x, kind in zip(data, kinds, strict=True)]


def _doubling_scan(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Inclusive scan in log2(n) steps over whole tiles (Hillis and Steele 1986, doi 10.1145/7902.7903)."""
    kinds = [x.handle.dtype.scalar for x in inputs]
    data = [np.moveaxis(x.handle.data, self.axis, -1) for x in inputs]
    place = np.arange(data[0].shape[-1])
    step = 1
    while step < place.size:
        before = [np.roll(x, step, -1) for x in data]
        both = _combined(self.combine_fn, before, data, kinds)
        data = [np.where(place >= step, new, old) for new, old in zip(both, data, strict=True)]
        step *= 2
    return [
        self.to_tensor(np.ascontiguousarray(np.moveaxis(x, -1, self.axis)), kind)
        for x, kind in zip(data, kinds, strict=True)
    ]


# ---- hints


def _check_hints(language: Any, scope: Any, report: Callable[[str, str], None]) -> None:
    """A wrong tl.multiple_of or tl.max_contiguous becomes a misaligned or shifted vector access on the GPU."""

    def multiple_of(x: Any, values: Any) -> Any:
        if isinstance(x, tl.tensor):
            first, factor = int(x.handle.data.reshape(-1)[0]), _numbers(values)[0]
            if first % factor:
                report("hint", f"multiple_of({factor}), and the value is {first}")
        return x

    def max_contiguous(x: Any, values: Any) -> Any:
        if isinstance(x, tl.tensor) and x.handle.data.ndim:
            data, run = x.handle.data.astype(np.int64), _numbers(values)[-1]
            whole = data.shape[-1] // run * run
            steps = np.diff(data[..., :whole].reshape(*data.shape[:-1], -1, run), axis=-1)
            unit = x.handle.get_element_ty().primitive_bitwidth // 8 if x.dtype.is_ptr() else 1
            if (steps != unit).any():
                report("hint", f"max_contiguous({run}), and the values are not consecutive")
        return x

    scope.set_attr(language, "multiple_of", multiple_of)
    scope.set_attr(language, "max_contiguous", max_contiguous)


def _numbers(values: Any) -> list[int]:
    values = values if isinstance(values, (list, tuple)) else [values]
    return [v.value if isinstance(v, tl.constexpr) else v for v in values]
