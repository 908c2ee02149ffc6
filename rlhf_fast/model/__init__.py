"""One frozen base model, several roles: LoRA adapters, scalar heads, adapter files.

Names are imported on first use, so reading `LoraConfig` does not import transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_fast.model.adapters import AdapterFile, read_adapter, write_adapter
    from rlhf_fast.model.heads import ScalarHead
    from rlhf_fast.model.lora import LoraConfig
    from rlhf_fast.model.outputs import RoleOutput, SharedOutput
    from rlhf_fast.model.shared import ROLES, SharedModel

_HOME = {
    "AdapterFile": "adapters",
    "LoraConfig": "lora",
    "ROLES": "shared",
    "RoleOutput": "outputs",
    "ScalarHead": "heads",
    "SharedModel": "shared",
    "SharedOutput": "outputs",
    "read_adapter": "adapters",
    "write_adapter": "adapters",
}

__all__ = [
    "ROLES",
    "AdapterFile",
    "LoraConfig",
    "RoleOutput",
    "ScalarHead",
    "SharedModel",
    "SharedOutput",
    "read_adapter",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
