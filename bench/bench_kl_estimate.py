"""kl_estimate, forward and backward, against eager PyTorch: `pytest bench --benchmark-enable`."""

from __future__ import annotations

import pytest

import rlhf_fast
from rlhf_fast.reference.kl_estimate import sample


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_64_x_1024(against_eager, kind, backward):
    kwargs = sample((64, 1024))
    leaf = kwargs["logprobs"].requires_grad_(backward)

    def call():
        leaf.grad = None
        out = rlhf_fast.kl_estimate(**kwargs, kind=kind)
        if backward:
            out.backward(kwargs["ref_logprobs"])
        return (leaf.grad,) if backward else (out,)

    against_eager(call)
