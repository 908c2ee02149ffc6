"""Tests of compiled Triton kernels. They run beside the ordinary tests; an interpreted function cannot be compiled."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise pytest.UsageError("tests/gpu/compiled needs a process without TRITON_INTERPRET")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What the user's cache holds must not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield
