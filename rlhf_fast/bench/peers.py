"""The libraries a user might run instead, loaded where they are installed: `pip install --no-deps -r bench/peers.txt`.

A peer that does not import is a reason in the table, never an error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

DISTRIBUTIONS = ("trl", "liger-kernel", "verl", "openrlhf", "rlox", "flash-attn")


def versions() -> dict[str, str]:
    """{distribution: installed version}."""
    return {name: found for name in DISTRIBUTIONS if (found := version(name)) is not None}


def version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def attempt(load: Callable[[], Any]) -> Any:
    """What `load` returns, or the reason as a string."""
    try:
        return load()
    except Exception as error:  # third-party imports fail in every way there is
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


@functools.cache
def trl_utils() -> ModuleType:
    """selective_log_softmax, entropy_from_logits."""
    return importlib.import_module("trl.trainer.utils")


@functools.cache
def trl_kernels() -> ModuleType:
    """selective_log_softmax_and_entropy in Triton, forward and backward."""
    return importlib.import_module("trl.kernels.logprob_entropy")


@functools.cache
def trl_chunked_head() -> Any:
    """autograd.Function of the fused language-model head."""
    return importlib.import_module("trl.kernels").ChunkedLogProbFunction


@functools.cache
def liger() -> ModuleType:
    """The chunked losses, plain PyTorch inside."""
    return importlib.import_module("liger_kernel.chunked_loss")


@functools.cache
def liger_grpo() -> ModuleType:
    """Its Triton kernels on logits."""
    return importlib.import_module("liger_kernel.ops.grpo_loss")


@functools.cache
def flash_cross_entropy() -> ModuleType:
    """The Triton cross-entropy that comes with flash-attn."""
    return importlib.import_module("flash_attn.ops.triton.cross_entropy")


@functools.cache
def verl() -> ModuleType:
    """GAE, policy loss, KL."""
    return importlib.import_module("verl.trainer.ppo.core_algos")


@functools.cache
def verl_functional() -> ModuleType:
    """Log-probs and entropy of logits."""
    return importlib.import_module("verl.utils.torch_functional")


@functools.cache
def _openrlhf_root() -> Path:
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'openrlhf'")
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def openrlhf(module: str) -> ModuleType:
    """One file of openrlhf by itself: the package's own imports want DeepSpeed and flash-attn, which these functions do not."""
    root = _openrlhf_root()
    for name in ("openrlhf", "openrlhf.models", "openrlhf.trainer", "openrlhf.trainer.ppo_utils"):
        if name not in sys.modules:
            package = ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            sys.modules[name] = package
    if importlib.util.find_spec("deepspeed") is None:  # imported at the top of a file, used by other functions in it
        empty = ModuleType("deepspeed")
        empty.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
        sys.modules["deepspeed"] = empty
    return importlib.import_module(f"openrlhf.{module}")


@functools.cache
def rlox() -> ModuleType:
    """GAE in Rust."""
    return importlib.import_module("rlox")
