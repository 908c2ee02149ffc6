"""whiten against eager PyTorch: `pytest bench --benchmark-enable`."""

from __future__ import annotations

import pytest

import rlhf_fast
from rlhf_fast.reference.whiten import sample


@pytest.mark.parametrize("shape", [(64, 1024), (256, 4096)], ids=str)
def test_forward(against_eager, shape):
    kwargs = sample(shape)
    against_eager(lambda: (rlhf_fast.whiten(**kwargs),))
