"""One-line patches: TRL, verl, OpenRLHF and slime compute their losses with our ops.

The other files here are the only ones that know a framework, and none of them is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

from rlhf_fast import _check
from rlhf_fast.integrations._patch import Table, status
from rlhf_fast.integrations._patch import install as _install
from rlhf_fast.integrations._patch import install_on_import as _install_on_import
from rlhf_fast.integrations._patch import uninstall as _uninstall

__all__ = ["FRAMEWORKS", "Table", "patch", "patch_on_import", "sockets", "status", "unpatch"]

FRAMEWORKS = ("trl", "verl", "openrlhf", "slime")


def patch(
    framework: str,
    *,
    half_precision: bool = False,
    modules: Mapping[str, ModuleType] | None = None,
    quiet: bool = False,
) -> Table:
    """Let a framework compute its losses with our ops. Undone by `unpatch`; calling it again changes nothing.

    Every function of the framework's table is replaced in the module that defines it and wherever a module of the framework
    imported it by name. At the first call of every kind (dtype, device, options, with or without gradients) ours and the
    original run on copies of the inputs, values and gradients are compared, and on a disagreement the original is put back
    with a warning. What ours does not serve goes to the original call by call; `status` counts both and names the reasons.

    Args:
        framework: "trl", "verl", "openrlhf" or "slime".
        half_precision: True also serves bf16 and fp16 calls that the framework computes in that precision. Ours computes them in
            fp32 and rounds once: closer to the truth, but other bits. False leaves them to the framework.
        modules: {home module: module} for copies that were loaded under another name, such as by a file path.
        quiet: True prints no table.

    Returns:
        Table of the replaced symbols; str(table) is what is printed.

    Raises:
        ValueError: unknown framework.
        ImportError: nothing of the framework can be imported; names each reason. Warns when its version has not been tried.
    """
    table = _install(_table("patch", framework), modules, half_precision)
    if not quiet:
        print(table)
    return table


def patch_on_import(framework: str, *, half_precision: bool = False) -> None:
    """`patch` for processes that do not hold the framework yet, such as the workers of Ray: each of its modules is patched right after
    its first import, and nothing is imported for it. `unpatch` ends it.

    Raises ValueError for an unknown framework.
    """
    _install_on_import(_table("patch_on_import", framework), half_precision)


def unpatch(framework: str) -> Table:
    """Put every original back. Returns the last counts.

    Raises ValueError for an unknown framework.
    """
    _check.choice("unpatch", "framework", framework, FRAMEWORKS)
    return _uninstall(framework)


def sockets(framework: str) -> dict[str, list[str]]:
    """{module of the framework: names that `patch` replaces in it}. Imports nothing of the framework.

    Raises ValueError for an unknown framework.
    """
    found: dict[str, list[str]] = {}
    for socket in _table("sockets", framework).sockets:
        found.setdefault(socket.home, []).append(socket.name)
    return found


def _table(op: str, framework: str):  # type: ignore[no-untyped-def]
    _check.choice(op, "framework", framework, FRAMEWORKS)
    return importlib.import_module(f"rlhf_fast.integrations.{framework}").FRAMEWORK
