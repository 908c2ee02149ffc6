"""Argument checks of the public ops, in one wording: op, argument, got, expected."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlhf_fast.reference.token_logprobs import refused_id, refused_temperature

_FP32 = torch.float32
_HERE = "its full_tensor(), or its to_local() with process_group where an op takes one for a vocabulary cut over ranks"

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def error(kind: type[Exception], op: str, argument: str, got: object, expected: object) -> Exception:
    """Build (not raise) the exception that every check of the package uses."""
    return kind(f"{op}: argument '{argument}' got {got}, expected {expected}")


def tensor(op: str, argument: str, x: object) -> Tensor:
    """`x` is a tensor whose numbers are all here: a kernel would read the memory behind a DTensor, which holds a part or none."""
    if type(x) is Tensor or type(x) is torch.nn.Parameter:
        return x
    if not isinstance(x, Tensor):
        raise error(TypeError, op, argument, type(x).__name__, "a torch.Tensor")
    module = sys.modules.get("torch.distributed.tensor")  # without it there is no DTensor
    if module is not None and isinstance(x, module.DTensor):
        raise error(TypeError, op, argument, "a DTensor", _HERE)
    return x


def floating(op: str, argument: str, x: object) -> None:
    """`x` is a float tensor of a supported dtype."""
    x = tensor(op, argument, x)
    if x.dtype not in FLOATS:
        raise error(TypeError, op, argument, x.dtype, f"one of {_names(FLOATS)}")


def integer(op: str, argument: str, x: object) -> None:
    """`x` is an integer tensor (token ids, group ids, cu_seqlens)."""
    x = tensor(op, argument, x)
    if x.dtype not in INTS:
        raise error(TypeError, op, argument, x.dtype, f"one of {_names(INTS)}")


def boolean(op: str, argument: str, x: object) -> None:
    """`x` is a mask: bool (or an integer tensor of zeros and ones)."""
    x = tensor(op, argument, x)
    if x.dtype is not torch.bool and x.dtype not in INTS:
        raise error(TypeError, op, argument, x.dtype, "torch.bool (True = real token)")


def shape(op: str, argument: str, x: Tensor, expected: Sequence[int], like: str) -> None:
    """`x` has exactly the shape `expected`, which is the shape of `like`."""
    if tuple(x.shape) != tuple(expected):
        raise error(ValueError, op, argument, f"shape {tuple(x.shape)}", f"{tuple(expected)} (the shape of {like})")


def device(op: str, argument: str, x: Tensor, other: Tensor, like: str) -> None:
    """`x` lives where `other` lives."""
    if x.device != other.device:
        raise error(ValueError, op, argument, f"device {x.device}", f"{other.device} (the device of {like})")


def like(op: str, argument: str, x: object, other: Tensor, name: str) -> None:
    """`x` is a float tensor with the shape and the device of `other`."""
    alike(op, other, name, {argument: x})


def alike(op: str, other: Tensor, name: str, tensors: Mapping[str, object]) -> bool:
    """Every one of `tensors` is float and has the shape and the device of `other`.

    Returns whether all of them, and `other`, are fp32 and contiguous: what the kernels take as it is.
    """
    expected, place, on_cpu = other.shape, other.device, other.is_cpu  # is_cpu: a third of the cost of device
    ready = other.dtype is _FP32 and other.is_contiguous()
    for x in tensors.values():
        if (
            type(x) is not Tensor
            or x.dtype is not _FP32
            or x.shape != expected
            or not (x.is_cpu if on_cpu else x.device == place)
        ):
            break
        ready = ready and x.is_contiguous()
    else:
        return ready
    for argument, x in tensors.items():
        floating(op, argument, x)
        shape(op, argument, x, expected, name)  # type: ignore[arg-type]
        device(op, argument, x, other, name)  # type: ignore[arg-type]
    return False


def mask_like(op: str, x: Tensor | None, other: Tensor, name: str, argument: str = "mask") -> Tensor | None:
    """Checked mask with the shape of `other`, bool and contiguous; None stays None (every position is real)."""
    if x is None:
        return None
    near = other.is_cpu and x.is_cpu if type(x) is Tensor else False  # is_cpu is a third of the cost of device
    if near and x.dtype is torch.bool and x.shape == other.shape:
        return x if x.is_contiguous() else x.contiguous()
    boolean(op, argument, x)
    if x.shape != other.shape:
        shape(op, argument, x, other.shape, name)
    if x.device != other.device:
        device(op, argument, x, other, name)
    return (x if x.dtype is torch.bool else x != 0).contiguous()


def number(
    op: str, argument: str, x: object, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> float:
    """A finite real number in [low, high] (or (low, high] with open_low), as float."""
    if type(x) is float and low <= x <= high and x - x == 0.0 and not (open_low and x == low):
        return x
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise error(TypeError, op, argument, f"{x!r} of type {type(x).__name__}", "a number")
    if not math.isfinite(x) or x < low or x > high or (open_low and x == low):
        bracket = "(" if open_low else "["
        raise error(ValueError, op, argument, repr(x), f"a finite number in {bracket}{low}, {high}]")
    return float(x)


def choice(op: str, argument: str, x: object, options: Sequence[str]) -> None:
    """`x` is one of the named options."""
    if x not in options:
        raise error(ValueError, op, argument, repr(x), f"one of {', '.join(map(repr, options))}")


def cu_seqlens(op: str, x: Tensor, tokens: int, other: Tensor) -> Tensor:
    """Checked boundaries (S+1,) of S packed sequences over `tokens` tokens, as contiguous int64.

    The values are read when they lie on the CPU; on an accelerator that would stop the queue, so there
    only the shape is checked and the kernels clamp. A single boundary is the end of no sequence, and of no token.
    """
    integer(op, "cu_seqlens", x)
    if x.dim() != 1 or x.numel() < 1 or (x.numel() == 1 and tokens > 0):
        raise error(
            ValueError,
            op,
            "cu_seqlens",
            f"shape {tuple(x.shape)}",
            f"(sequences + 1,) of sequences over {tokens} tokens",
        )
    device(op, "cu_seqlens", x, other, "the packed tensor")
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor:
        bounds = x.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
            raise error(ValueError, op, "cu_seqlens", bounds[:8], f"rising boundaries from 0 to {tokens}")
    return x.to(torch.int64).contiguous()


def token_rows(op: str, token_ids: Tensor, temperature: Tensor | None, mask: Tensor | None, vocab: int) -> None:
    """Raises for the first real row whose token id or temperature is out of range."""
    bad = (token_ids < 0) | (token_ids >= vocab)
    if temperature is not None:
        bad |= ~((temperature > 0) & temperature.isfinite())
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        token_id = int(token_ids.flatten()[row])
        if not 0 <= token_id < vocab:
            raise ValueError(refused_id(op, row, token_id, vocab))
        raise ValueError(
            refused_temperature(op, row, float("nan" if temperature is None else temperature.flatten()[row]))
        )


def wide(x: Tensor) -> Tensor:
    """fp32 (or fp64 for fp64) and contiguous: what the kernels on per-token tensors take."""
    if x.dtype is not torch.float64 and x.dtype is not torch.float32:
        x = x.float()
    return x.contiguous()


def common_wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in one dtype, contiguous: fp64 when any is fp64, otherwise fp32."""
    dtype, ready = torch.float32, True
    for x in tensors:
        if x is not None:
            if x.dtype is torch.float64:
                dtype, ready = torch.float64, False
            elif x.dtype is not torch.float32 or not x.is_contiguous():
                ready = False
    if ready:
        return tensors
    return tuple(x if x is None else (x if x.dtype is dtype else x.to(dtype)).contiguous() for x in tensors)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
