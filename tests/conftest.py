from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # parity.py and tolerances.py, under importlib import mode


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def native():
    """The compiled module; its absence fails the test, since the suite is for a build with kernels."""
    from rlhf_fast import _native

    module, reason = _native.load()
    assert module is not None, reason
    return module


@pytest.fixture
def each_isa(native):
    """Yields a function that runs a callable once per instruction set of this processor: [(isa, result)]."""
    before = native.isa()

    def run(call):
        results = []
        for name, supported in native.isas():
            if supported:
                native.select_isa(name)
                assert native.isa() == name
                results.append((name, call()))
        return results

    yield run
    native.select_isa(before)
