"""State of random generators and optimizers in forms that JSON and safetensors keep bit for bit."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


def rng_state(generators: Mapping[str, torch.Generator] | None = None) -> dict[str, Any]:
    """State of every random generator as JSON values: Python, NumPy if loaded, torch on the CPU and on the current
    GPU, once CUDA is in use.

    generators: further torch generators by name, such as a sampler's own.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {
            "version": version,
            "words": _pack(words),
            "gauss": None if gauss is None else gauss.hex(),
        },
        "torch": _hex(torch.get_rng_state()),
        "generators": {name: _hex(g.get_state()) for name, g in (generators or {}).items()},
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        words = _pack(int(k) for k in keys)
        gauss_hex = float(cached).hex() if has_gauss else None
        state["numpy"] = {"kind": kind, "words": words, "position": int(position), "gauss": gauss_hex}
    if torch.cuda.is_initialized():  # other GPUs belong to other processes
        state["cuda"] = [_hex(torch.cuda.get_rng_state())]
    return state


def set_rng_state(state: Mapping[str, Any], generators: Mapping[str, torch.Generator] | None = None) -> None:
    """Put every generator back where `rng_state` found it.

    That of a GPU is left out where CUDA is not in use. Raises ValueError if `state` is not whole, holds more than one GPU, or names
    other generators; nothing is changed then.
    """
    mine = dict(generators or {})
    try:
        python, gauss = state["python"], state["python"]["gauss"]
        words = (*_unpack(python["words"]),)
        python_state = (python["version"], words, None if gauss is None else float.fromhex(gauss))
        torch_state = _tensor(state["torch"])
        saved = {name: _tensor(text) for name, text in state["generators"].items()}
        cuda = [_tensor(text) for text in state.get("cuda", [])]
        numpy_state = state.get("numpy")
        if numpy_state is not None:
            cached = numpy_state["gauss"]
            numpy_words = _unpack(numpy_state["words"])
            rest = (int(cached is not None), 0.0 if cached is None else float.fromhex(cached))
            numpy_state = (numpy_state["kind"], numpy_words, numpy_state["position"], *rest)
    except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise ValueError(f"set_rng_state: argument 'state' got an incomplete state: {error!r}") from None
    if set(saved) != set(mine):
        raise ValueError(f"set_rng_state: argument 'generators' got {sorted(mine)}, expected {sorted(saved)}")
    if len(cuda) > 1:
        raise ValueError(f"set_rng_state: argument 'state' got {len(cuda)} CUDA devices, expected at most 1")
    random.setstate(python_state)
    torch.set_rng_state(torch_state)
    for name, generator in mine.items():
        generator.set_state(saved[name])
    if numpy_state is not None:
        import numpy

        numpy.random.set_state(numpy_state)  # type: ignore[arg-type]
    if cuda and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(cuda[0])


def _pack(words: Any) -> str:
    values = list(words)
    return struct.pack(f"<{len(values)}I", *values).hex()


def _unpack(text: str) -> list[int]:
    raw = bytes.fromhex(text)
    return list(struct.unpack(f"<{len(raw) // 4}I", raw))


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _tensor(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


# Values of optimizer state that are not tensors, by the mark their key gets.
_SCALARS: dict[str, tuple[type, torch.dtype]] = {
    ":bool": (bool, torch.bool),
    ":int": (int, torch.int64),
    ":float": (float, torch.float64),
}


Names = Sequence[str] | Mapping[str, Parameter]


def optimizer_tensors(optimizer: Optimizer, names: Names) -> dict[str, Tensor]:
    """State of an optimizer as tensors called "parameter.key", step counters included.

    names: names of the optimizer's parameters, group after group, or a mapping name -> parameter. The
    tensors are the optimizer's own, not copies. Hyper-parameters of the groups are not part of it: they
    follow from the settings and the step. Raises ValueError for a parameter without a name or a name given
    twice, TypeError for state that is neither tensor nor number.
    """
    by_id = {id(p): name for name, p in _named("optimizer_tensors", optimizer, names).items()}
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            name = f"{by_id[id(parameter)]}.{key}"
            if isinstance(value, Tensor):
                tensors[name] = value
                continue
            if value is None:
                continue
            mark = next((m for m, (kind, _) in _SCALARS.items() if type(value) is kind), None)
            if mark is None:
                got = f"{type(value).__name__} for {name}"
                raise TypeError(f"optimizer_tensors: argument 'optimizer' got {got}, expected a tensor or number")
            tensors[name + mark] = torch.tensor(value, dtype=_SCALARS[mark][1])
    return tensors


def load_optimizer_tensors(optimizer: Optimizer, names: Names, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer exactly the state that `optimizer_tensors` took; what it had is dropped.

    Raises ValueError for a name of no parameter, or a moment whose shape is not the parameter's; nothing is
    changed then.
    """
    parameters = _named("load_optimizer_tensors", optimizer, names)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    loaded: dict[str, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(f"load_optimizer_tensors: argument 'tensors' got {full!r}, which is of no parameter")
        mark = next((m for m in _SCALARS if key.endswith(m)), None)
        if mark is not None:
            loaded.setdefault(name, {})[key.removesuffix(mark)] = tensor.item()
            continue
        if tensor.dim() and tensor.shape != parameter.shape:
            got = f"shape {tuple(tensor.shape)} for {full!r}"
            expected = tuple(parameter.shape)
            raise ValueError(f"load_optimizer_tensors: argument 'tensors' got {got}, expected {expected}")
        group = groups[id(parameter)]
        # Step counters live on the CPU unless the optimizer runs whole on the device.
        stays = key == "step" and not (group.get("capturable") or group.get("fused"))
        device = torch.device("cpu") if stays else parameter.device
        loaded.setdefault(name, {})[key] = tensor.detach().to(device, copy=True)
    optimizer.state.clear()
    for name, parameter in parameters.items():
        if name in loaded:
            optimizer.state[parameter] = loaded[name]


def _named(op: str, optimizer: Optimizer, names: Names) -> dict[str, Parameter]:
    """The optimizer's parameters in its order, by name."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(names, Mapping):
        by_id = {id(p): name for name, p in names.items()}
        if any(id(p) not in by_id for p in parameters):
            shape = next(tuple(p.shape) for p in parameters if id(p) not in by_id)
            raise ValueError(f"{op}: argument 'names' got none for a parameter of shape {shape}, expected one")
        return {by_id[id(p)]: p for p in parameters}
    if len(names) != len(parameters) or len(set(names)) != len(names):
        got = f"{len(names)} names, {len(set(names))} of them different"
        raise ValueError(f"{op}: argument 'names' got {got}, expected {len(parameters)} different names")
    return dict(zip(names, parameters, strict=True))
