"""reward_loss, forward and backward, against eager PyTorch: `pytest bench --benchmark-enable`."""

from __future__ import annotations

import rlhf_fast
from rlhf_fast.reference.reward_loss import sample


def test_forward_and_backward_of_1024_pairs(against_eager):
    kwargs = sample(1024)
    leaves = [kwargs[k].requires_grad_() for k in ("chosen_scores", "rejected_scores")]

    def call():
        for leaf in leaves:
            leaf.grad = None
        out = rlhf_fast.reward_loss(**kwargs, center_coef=0.01)
        out.loss.backward()
        return (out.loss.detach(), out.stats.tensor, *(leaf.grad for leaf in leaves))

    against_eager(call)
