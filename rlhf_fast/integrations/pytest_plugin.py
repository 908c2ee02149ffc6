"""Runs a framework's own tests with its patch active, and prints which calls reached our code:

    pytest -p rlhf_fast.integrations.pytest_plugin --patch=trl tests/test_utils.py

The framework is patched before its tests are collected, so that they import the replacements by name; copies of its modules that
the tests load by file path, and the names that the tests take from them, are patched after it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_fast.integrations import FRAMEWORKS, patch, sockets, status
from rlhf_fast.integrations._patch import follow


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--patch", choices=FRAMEWORKS, help="framework whose losses rlhf_fast replaces")


def pytest_configure(config: pytest.Config) -> None:
    _patch(config, {})


def pytest_collection_finish(session: pytest.Session) -> None:
    framework = session.config.getoption("--patch")
    if framework is None:
        return
    copies: dict[str, ModuleType] = {}
    for home in sockets(framework):
        ending = Path(*home.split(".")).with_suffix(".py").parts
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name != home and file and Path(file).parts[-len(ending) :] == ending:
                copies[home] = module
    if copies:
        _patch(session.config, copies)
        for module in {id(m): m for m in (getattr(item, "module", None) for item in session.items) if m}.values():
            follow(framework, vars(module))


def _patch(config: pytest.Config, copies: dict[str, ModuleType]) -> None:
    framework = config.getoption("--patch")
    if framework is not None:
        try:
            patch(framework, modules=copies, quiet=True)
        except ImportError as error:  # its tests may bring modules of their own
            config.issue_config_time_warning(pytest.PytestWarning(str(error)), stacklevel=2)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    table = status()
    if table:
        terminalreporter.section("calls that reached rlhf_fast")
        terminalreporter.write_line(str(table))
