from __future__ import annotations

import sys
import warnings

import pytest
from integrations import fakes

from rlhf_fast.integrations import _patch

ROOTS = ("trl", "verl", "openrlhf", "slime", "megatron")


def _of_frameworks():
    return [name for name in sys.modules if name.partition(".")[0] in ROOTS]


@pytest.fixture(autouse=True)
def no_trace():
    """Every test starts without a framework and without a patch; what was imported before comes back."""
    before = {name: sys.modules.pop(name) for name in _of_frameworks()}
    yield
    for name in list(_patch._active):
        _patch.uninstall(name)
    for name in _of_frameworks():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def framework():
    """Puts a stand-in into sys.modules: framework("verl", ...) -> a getter of its members by dotted path."""

    def make(name, *args, **kwargs):
        fakes.MAKERS[name](*args, **kwargs)

        def get(path):
            module, _, member = path.rpartition(".")
            while module not in sys.modules:
                module, _, more = module.rpartition(".")
                member = f"{more}.{member}"
            found = sys.modules[module]
            for each in member.split("."):
                found = getattr(found, each)
            return found

        return get

    return make


@pytest.fixture(autouse=True)
def no_warnings():
    """A warning is a rejected function, so it fails the test that does not expect it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
