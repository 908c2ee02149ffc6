"""ppo_loss with every gradient and statistic, against the same in eager PyTorch: `pytest bench --benchmark-enable`."""

from __future__ import annotations

import pytest

import rlhf_fast
from rlhf_fast.reference.ppo_loss import sample

POLICY = ("logprobs", "old_logprobs", "advantages", "mask")


@pytest.mark.parametrize("terms", ["policy", "policy, value, entropy, KL"])
@pytest.mark.parametrize("shape", [(64, 1024), (256, 4096)], ids=str)
def test_forward_and_backward(against_eager, shape, terms):
    kwargs = sample(shape)
    options = {"entropy_coef": 0.01, "kl_coef": 0.1}
    if terms == "policy":
        kwargs, options = {k: kwargs[k] for k in POLICY}, {}
    leaves = [kwargs[k].requires_grad_() for k in ("logprobs", "entropy", "values") if k in kwargs]

    def call():
        for leaf in leaves:
            leaf.grad = None
        out = rlhf_fast.ppo_loss(**kwargs, **options)
        out.loss.backward()
        return (out.loss.detach(), out.stats.tensor, *(leaf.grad for leaf in leaves))

    against_eager(call)
