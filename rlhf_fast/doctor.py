"""`rlhf-fast doctor`: versions, devices, instruction sets, and the grid of kernels with the reason of each empty cell."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import torch

from rlhf_fast import __version__, _env, _native, backends, cuda

PACKAGES = (
    "transformers",
    "safetensors",
    "peft",
    "triton",
    "flash-attn",
    "vllm",
    "pydantic",
    "tyro",
    "tensorboard",
    "gguf",
)


def report() -> str:
    """The text of `rlhf-fast doctor`."""
    lines = [f"rlhf_fast {__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    lines += ["", "versions", f"  {'torch':<14}{torch.__version__}"]
    for name in PACKAGES:
        lines.append(f"  {name:<14}{_version(name)}")
    lines += [
        "",
        "devices",
        f"  cpu           {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    ]
    lines += _gpus()
    lines += ["", "C++ kernels", *_native_lines()]
    lines += ["", "CUDA kernels", *(f"  {line}" for line in cuda.report())]
    settings = [f"RLHF_FAST_{name}={value}" for name in _env.VARIABLES if (value := _env.get(name)) is not None]
    lines += ["", "environment", *(f"  {s}" for s in settings or ["no RLHF_FAST_ variable is set"])]
    lines += ["", "ops (the first available backend runs)", *grid()]
    return "\n".join(lines)


def grid() -> list[str]:
    """One line per op and device: `gae  cpu   cpp, reference`, then why a backend is missing."""
    table = backends()
    width = max(map(len, table))
    lines = []
    for op, devices in sorted(table.items()):
        for i, (device, cells) in enumerate(devices.items()):
            usable = ", ".join(name for name, available, _ in cells if available)
            lines.append(f"  {op if i == 0 else '':<{width}}  {device:<5} {usable}")
            for name, available, reason in cells:
                if not available:
                    lines.append(f"  {'':<{width}}  {'':<5} {name} is missing: {reason}")
    return lines


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "this PyTorch is built for the CPU alone" if built is None else "no usable driver or device was found"
        return [f"  cuda          none: {why}"]
    return [
        f"  cuda:{i}        {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
        for p in [torch.cuda.get_device_properties(i)]
    ]


def _native_lines() -> list[str]:
    try:
        module, reason = _native.load()
    except _native.IsaError as error:
        return [f"  error         {error}"]
    if module is None:
        return [f"  missing       {reason}"]
    rows = [f"  in use        {module.isa()}"]
    for name, supported in module.isas():
        rows.append(f"  {name:<14}{'supported' if supported else 'this processor lacks it'}")
    return rows


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report."""
    if arguments:
        print("usage: rlhf-fast doctor")
        return 0 if arguments[0] in ("-h", "--help") else 2
    print(report())
    return 0
