"""advantages (KL, shaping, GAE, returns, whitening) against the loop over T in eager PyTorch: `pytest bench --benchmark-enable`."""

from __future__ import annotations

import pytest

import rlhf_fast
from rlhf_fast.reference.advantages import sample


@pytest.mark.parametrize("shape", [(64, 1024), (256, 4096)], ids=str)
def test_forward(against_eager, shape):
    kwargs = sample(shape)
    against_eager(lambda: rlhf_fast.advantages(**kwargs, kl_coef=0.1, kl_kind="k3"), atol=1e-3)
