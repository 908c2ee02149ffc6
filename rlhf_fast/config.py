"""Typed settings of every command, from YAML and `--dotted.name value` overrides, checked as one tree."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import tyro
import yaml

from rlhf_fast import _check
from rlhf_fast._config_tree import (
    ConfigError,
    Dumper,
    Tree,
    build,
    defaults,
    merge,
    read_overrides,
    read_yaml,
)
from rlhf_fast.model.lora import LoraConfig
from rlhf_fast.settings.common import (
    DataConfig,
    GenerationConfig,
    KLConfig,
    LabelDataConfig,
    ModelConfig,
    OptimConfig,
    PairDataConfig,
    ProcessConfig,
    PromptDataConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    VLLMConfig,
    is_callable_spec,
    is_url,
)
from rlhf_fast.settings.offline import KTOConfig, PreferenceConfig, PreferenceLossConfig, RewardConfig, SFTConfig
from rlhf_fast.settings.online import (
    GROUP_ADVANTAGES,
    GroupConfig,
    GroupKLConfig,
    GroupUpdateConfig,
    OnlineDPOConfig,
    OnlineDPOUpdateConfig,
    PPOConfig,
    PPOUpdateConfig,
    RaftConfig,
    RaftUpdateConfig,
)
from rlhf_fast.settings.tools import EvaluateConfig, PlanConfig, RayConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
D = TypeVar("D", bound="DataclassInstance")

__all__ = [
    "GROUP_ADVANTAGES",
    "ConfigError",
    "DataConfig",
    "EvaluateConfig",
    "GenerationConfig",
    "GroupConfig",
    "GroupKLConfig",
    "GroupUpdateConfig",
    "KLConfig",
    "KTOConfig",
    "LabelDataConfig",
    "LoraConfig",
    "ModelConfig",
    "OnlineDPOConfig",
    "OnlineDPOUpdateConfig",
    "OptimConfig",
    "PPOConfig",
    "PPOUpdateConfig",
    "PairDataConfig",
    "PlanConfig",
    "PreferenceConfig",
    "PreferenceLossConfig",
    "ProcessConfig",
    "PromptDataConfig",
    "RaftConfig",
    "RaftUpdateConfig",
    "RayConfig",
    "RewardConfig",
    "RewardSource",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "VLLMConfig",
    "config_hash",
    "config_help",
    "is_callable_spec",
    "is_url",
    "load_config",
    "resolve_device",
    "resolve_dtype",
    "to_yaml",
    "validate",
]

# Settings that name code or a server. A file that was handed over must not choose what runs, nor where completions go: only the
# command line may.
_CODE_KEYS = ("reward.source", "reward.mix", "judges", "rollout.vllm.server")
_PROGRAM_KEYS = ("rollout.vllm.python", "rollout.vllm.arguments")
# Settings that move, show or guard a run without changing its numbers.
_UNHASHED_KEYS = {
    "model": {"shard", "offload"},
    "optim": {"offload"},
    "run": {f.name for f in dataclasses.fields(RunConfig)} - {"seed"},
    "reward": {"workers", "timeout", "retries", "call_size", "max_unscorable"},
    "rollout": {"vllm"},
    "rollout.process": {"threads", "timeout"},
}


def resolve_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """Dtype of ModelConfig.dtype on a device ("cpu" or "cuda").

    "auto" is bfloat16 on CUDA and on CPUs with AVX512-BF16 or AMX, elsewhere float32: without those
    instructions a bfloat16 product on a CPU is several times slower than a float32 one. Raises ValueError.
    """
    if name == "auto":
        if device == "cpu":
            has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            native = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
        else:
            native = True
        return torch.bfloat16 if native else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"resolve_dtype: name must be auto, float32 or bfloat16, got {name!r}")
    return getattr(torch, name)


def resolve_device(owner: str, name: str) -> torch.device:
    """Where RunConfig.device or ProcessConfig.device (the owner) puts a model in this process.

    "auto" is "cuda" where there is a CUDA device, else "cpu". "cuda" without a number is the GPU of the local rank under torchrun
    (LOCAL_RANK modulo the visible devices), the first one elsewhere. Raises ValueError for a device that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise _check.error(ValueError, owner, "device", repr(name), "auto or cpu where PyTorch sees no CUDA device")
    number = int(name.partition(":")[2] or int(os.environ.get("LOCAL_RANK") or 0) % count)
    if number >= count:
        devices = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise _check.error(ValueError, owner, "device", repr(name), f"auto, cpu, cuda or {devices}")
    return torch.device("cuda", number)


def load_config(
    cls: type[T], yaml_path: str | Path | None, overrides: Sequence[str] = (), *, allow_code: bool = False
) -> T:
    """Settings of type `cls`: an override beats the YAML file, the file beats the default.

    overrides: `--optim.lr 1e-5`, `--optim.lr=1e-5`, `--optim.betas 0.9 0.99`, `--run.resume`,
    `--run.no-resume`, `--data.fields text=review`. allow_code: let the file name Python callables and reward servers,
    which otherwise only an override may. Raises ConfigError.
    """
    file = Tree() if yaml_path is None else read_yaml(Path(yaml_path))
    values = merge(defaults(cls), file, cls)
    if not allow_code:
        _refuse_code(file)
    places = dict(file.places)
    for override in read_overrides(cls, overrides):
        values = merge(values, override, cls)
        places.update(override.places)
    return build(cls, values, places)


def _refuse_code(file: Tree) -> None:
    for key in (*_CODE_KEYS, *_PROGRAM_KEYS):
        value: Any = file.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        for source in [value] if isinstance(value, str) else value or ():
            if isinstance(source, str) and (key in _PROGRAM_KEYS or is_callable_spec(source) or is_url(source)):
                what = "a server to send completions to" if is_url(source) else "code to run"
                raise ConfigError(
                    f"{file.places[key]}{key}: got {source!r}, but a settings file may not name {what}; "
                    f"give it on the command line as --{key}"
                )


def validate(config: D) -> D:
    """The same settings with every type and range checked, as if read from a file. Raises ConfigError."""
    return build(type(config), dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """YAML text that `load_config` reads back to an equal object."""
    return yaml.dump(_plain(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def config_hash(config: Any) -> str:
    """SHA-256 (hex) of the settings that can change a run's numbers; of `run` only the seed counts."""
    tree = _plain(validate(config))
    for section, keys in _UNHASHED_KEYS.items():
        owner = tree
        for part in section.split("."):
            owner = owner.get(part, {})
        for key in keys:
            owner.pop(key, None)
    text = json.dumps([type(config).__name__, tree], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def config_help(cls: type, prog: str, description: str | None = None) -> str:
    """Help text with every override, its meaning and its default."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(cls, prog=prog, description=description or cls.__doc__, args=["--help"])
    return text.getvalue()


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))
