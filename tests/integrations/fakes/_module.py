"""How a stand-in gets into sys.modules, and what several of them share."""

from __future__ import annotations

import sys
import types

import torch
import torch.nn.functional as F


def module(name, **members):
    """A module in sys.modules, and an attribute of its parent; its members are defined in it."""
    made = types.ModuleType(name)
    for key, value in members.items():
        if callable(value) and str(getattr(value, "__module__", "")).startswith(__package__):
            value.__module__ = name
        setattr(made, key, value)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            module(parent)
        setattr(sys.modules[parent], child, made)
    return made


def log_softmax_rows(logits, labels):
    return torch.stack(
        [F.log_softmax(x, -1).gather(-1, i[..., None])[..., 0] for x, i in zip(logits, labels, strict=True)]
    )
