"""Adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

A value or reward head lies in the same file under PEFT's key `base_model.model.score.*`. Plain
PEFT skips keys that its model does not have, so such a folder loads there as well.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rlhf_fast.model.lora import LowRank

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20

_PREFIX = "base_model.model."
_HEAD_PREFIX = _PREFIX + "score."
_FACTOR_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

_HEAD_NAMES = frozenset({"score", "classifier"})  # what PEFT notes for a sequence classifier, such as a reward model

# Fields that change what an adapter computes, with the values that leave it a plain low-rank update.
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, True),  # only how PEFT reads the base weight; the factors are the same
    "init_lora_weights": (
        True,
        False,
        None,
        "gaussian",
        "orthogonal",
        "eva",
    ),  # the others also change the base
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"),
}
_READ_HERE = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "lora_dropout")
# Which modules were adapted is read from the tensors; the rest describes provenance or training only.
_WITHOUT_EFFECT = (
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "runtime_config",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
)


_Kind = type | tuple[type, ...]
_NUMBER_KINDS: tuple[tuple[str, _Kind], ...] = (("r", int), ("lora_alpha", (int, float)))
_PATTERN_KINDS: tuple[tuple[str, _Kind], ...] = (("rank_pattern", int), ("alpha_pattern", (int, float)))


@dataclass(frozen=True)
class AdapterFile:
    """A read adapter folder: the update of each module by its name in the base, and the scalar head."""

    folder: Path
    weights: dict[str, LowRank]
    head: dict[str, Tensor] = field(default_factory=dict)  # "weight" (1, H) and "bias" (1,), or empty


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter saved here or by PEFT; fp32 tensors on the CPU.

    Raises ValueError, naming the file and the field or tensor, for a missing or damaged file, for a
    pickle file (never opened), and for a PEFT feature beyond LoRA with per-module rank and alpha and rsLoRA
    scaling.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = sorted(p.name for p in folder.glob("adapter_model*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"})
        why = f"; {pickled[0]} is a pickle file, which is never opened" if pickled else ""
        raise ValueError(f"read_adapter: no {WEIGHTS_FILE} in {folder}{why}")
    factors: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for key, tensor in _read_tensors(path).items():
        match = _FACTOR_KEY.fullmatch(key)
        if key in (_HEAD_PREFIX + "weight", _HEAD_PREFIX + "bias"):
            head[key.removeprefix(_HEAD_PREFIX)] = tensor
        elif match:
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
        else:
            raise ValueError(f"{path}: tensor {key!r} is no LoRA factor of a linear layer and no 'score' head")
    weights = {module: _low_rank(path, module, pair, config) for module, pair in factors.items()}
    if not weights and not head:
        raise ValueError(f"{path}: holds no tensor")
    if head:
        _check_head(path, head)
    return AdapterFile(folder, weights, head)


def write_adapter(
    folder: str | os.PathLike[str],
    weights: Mapping[str, LowRank],
    modules: Iterable[str],
    *,
    head: Mapping[str, Tensor] | None = None,
    base_name: str | None = None,
    conv1d: bool = False,
    dropout: float = 0.0,
) -> None:
    """Write a folder that PEFT and `read_adapter` load. Each file is replaced as a whole (temp + rename).

    modules: the names of all linear layers of the base's decoder, to describe the adapted ones by suffixes
    where those say exactly the same, and by full names otherwise.
    conv1d: the adapted layers are Conv1D, whose weights are stored as (in, out).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_HEAD_PREFIX}{name}": tensor for name, tensor in (head or {}).items()}
    for module, update in weights.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = update.a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = update.b
    rank, alpha, rank_pattern, alpha_pattern = _patterns(weights)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": _describe(list(weights), list(modules)),
        "fan_in_fan_out": conv1d,
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    data = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in tensors.items()}
    _replace(folder / WEIGHTS_FILE, save(data, metadata={"format": "pt"}))
    _replace(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def concatenate(updates: Sequence[Mapping[str, LowRank]]) -> dict[str, LowRank]:
    """The sum of several adapters as one of summed rank: A = [A1; A2], B = [s1 B1, s2 B2], scale 1.

    Modules of a smaller rank are padded with zeros: one rank for all is what every loader understands.
    """
    modules = list(dict.fromkeys(module for weights in updates for module in weights))
    parts = {module: [w[module] for w in updates if module in w] for module in modules}
    rank = max((sum(p.a.shape[0] for p in part) for part in parts.values()), default=0)
    joined = {}
    for module, part in parts.items():
        a = torch.cat([p.a.float() for p in part])
        b = torch.cat([p.scale * p.b.float() for p in part], dim=1)
        missing = rank - a.shape[0]
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        joined[module] = LowRank(a, torch.nn.functional.pad(b, (0, missing)), 1.0)
    return joined


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"read_adapter: no {CONFIG_FILE} in {folder}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds a {type(config).__name__}, expected an object")
    for name, value in config.items():
        if name in _READ_HERE or name in _WITHOUT_EFFECT:
            continue
        plain = _PLAIN_VALUES.get(name, (None, False, [], {}))
        if name == "modules_to_save" and isinstance(value, list) and _HEAD_NAMES.issuperset(map(str, value)):
            continue
        if not any(type(value) is type(p) and value == p for p in plain):
            raise ValueError(f"{path}: field {name!r} is {value!r}, which is not supported (plain LoRA only)")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: field 'peft_type' is missing, expected 'LORA'")
    for name, kind in _PATTERN_KINDS:
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict) or not all(_is_number(v, kind) for v in pattern.values()):
            raise ValueError(f"{path}: field {name!r} is {pattern!r}, expected numbers above 0 by module name")
    for name, kind in _NUMBER_KINDS:
        if not _is_number(config.get(name), kind):
            raise ValueError(f"{path}: field {name!r} is {config.get(name)!r}, expected a number above 0")
    return config


def _is_number(value: Any, kind: Any) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value > 0


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as safetensors: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: tensor {key!r} ({tensor.dtype}) is not finite floating point")
    return {key: tensor.float() for key, tensor in tensors.items()}


def _low_rank(path: Path, module: str, pair: dict[str, Tensor], config: dict[str, Any]) -> LowRank:
    """One module's update with PEFT's scale: alpha / r, or alpha / sqrt(r) with use_rslora."""
    if pair.keys() != {"A", "B"}:
        raise ValueError(f"{path}: module {module!r} has lora_{'A' if 'A' in pair else 'B'} but not its partner")
    a, b = pair["A"], pair["B"]
    rank = _matching(config.get("rank_pattern"), module, config["r"])
    alpha = _matching(config.get("alpha_pattern"), module, config["lora_alpha"])
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{path}: module {module!r} has factors {tuple(a.shape)} and {tuple(b.shape)},"
            f" expected ({rank}, in) and (out, {rank})"
        )
    return LowRank(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _matching(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The first entry whose key, a regular expression, matches the end of the module's name (PEFT's rule)."""
    for key, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise ValueError(f"read_adapter: pattern {key!r} is no regular expression: {error}") from error
    return default


def _check_head(path: Path, head: dict[str, Tensor]) -> None:
    weight = head.get("weight")
    if weight is None or weight.dim() != 2 or weight.shape[0] != 1:
        got = None if weight is None else tuple(weight.shape)
        raise ValueError(f"{path}: the head's weight 'score.weight' is {got}, expected (1, hidden size)")
    bias = head.setdefault("bias", torch.zeros(1))
    if tuple(bias.shape) != (1,):
        raise ValueError(f"{path}: the head's bias 'score.bias' is {tuple(bias.shape)}, expected (1,)")


def _patterns(weights: Mapping[str, LowRank]) -> tuple[int, float, dict[str, int], dict[str, float]]:
    """The most frequent rank and alpha, and the modules that differ from them."""
    ranks = {module: update.a.shape[0] for module, update in weights.items()}
    alphas = {module: update.scale * ranks[module] for module, update in weights.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 1.0
    other_ranks = {module: r for module, r in ranks.items() if r != rank}
    return rank, alpha, other_ranks, {module: value for module, value in alphas.items() if value != alpha}


def _describe(adapted: list[str], modules: list[str]) -> list[str]:
    suffixes = sorted({name.rpartition(".")[2] for name in adapted})
    covered = {name for name in modules if name.rpartition(".")[2] in suffixes}
    return suffixes if covered == set(adapted) else sorted(adapted)


def _replace(path: Path, data: bytes) -> None:
    """Write beside the target, flush to disk, rename over it: a reader sees the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
