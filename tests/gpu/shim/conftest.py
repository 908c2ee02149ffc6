from __future__ import annotations

import pytest
from gpu.shim.build import compiler
from gpu.shim.cells import cuda_cells


@pytest.fixture
def cuda():
    """The CUDA cells serve CPU tensors."""
    if compiler() is None:
        pytest.skip("needs g++ to build the CUDA kernels for the CPU")
    with cuda_cells() as library:
        yield library
