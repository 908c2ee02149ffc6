"""A device that is not the CPU, on any machine: its tensors are CPU tensors inside, and refuse to meet those of the host.

The rules are those of CUDA: an op takes tensors of one device, but for numbers (0-dim) and for indices, which may lie on the host.
`install` is for a process of its own: it gives PyTorch's spare backend a name for good.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default)


class Elsewhere(Tensor):
    """A tensor of the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, **layout, dtype=inner.dtype, device=f"{NAME}:0")  # type: ignore[attr-defined]
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(function, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """torch.tensor copies its numbers where no dispatch mode looks."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if function is not torch.tensor or "device" not in given:
            return function(*args, **given)
        device = given.pop("device")
        return function(*args, **given).to(device)


def _call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, Elsewhere)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted).type
    if not ours and wanted != NAME:
        return function(*args, **kwargs)
    _check(function, args, tensors, ours)
    wrappers = {id(x.inner): x for x in ours}
    given_args, given = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs))
    if wanted == NAME:
        given["device"] = torch.device("cpu")
    if function is _aten._to_copy.default:
        here = wanted == NAME or wanted is None
        found = given_args[0].to(given.get("dtype") or given_args[0].dtype, copy=True)
    else:
        here = isinstance(args[0], Elsewhere) if function is _aten.copy_.default else wanted in (NAME, None)
        found = function(*given_args, **given)
    if not here:
        return found
    # What an op writes to stays the tensor it was.
    return tree_map_only(Tensor, lambda x: wrappers.get(id(x)) if id(x) in wrappers else Elsewhere(x), found)


def _check(function: Any, args: Any, tensors: list[Tensor], ours: list[Tensor]) -> None:
    if function in _COPIES or not ours:
        return
    if function in _INDEXED and isinstance(args[0], Elsewhere):
        tensors = [args[0], *args[2:3]]
    strange = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
    if strange:
        shapes = ", ".join(str(tuple(x.shape)) for x in strange)
        raise RuntimeError(f"{function}: expected all tensors on {NAME}, got host tensors of shape {shapes}")


def install() -> torch.device:
    """The device, for this process from now on."""
    _setup_privateuseone_for_python_backend(NAME)
    torch.get_device_module(NAME).get_amp_supported_dtype = list  # gradient checkpointing asks
    torch.__future__.set_swap_module_params_on_conversion(True)  # as on CUDA, tied weights stay one parameter
    _Factories().__enter__()
    _Literals().__enter__()
    return torch.device(NAME, 0)
