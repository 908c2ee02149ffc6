"""group_advantages against eager PyTorch: `pytest bench --benchmark-enable`."""

from __future__ import annotations

import pytest
import torch

import rlhf_fast
from rlhf_fast.reference.group_advantages import sample


@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce++"])
def test_512_groups_of_8_in_any_order(against_eager, kind):
    kwargs = sample(4096)
    kwargs["group_ids"] = torch.arange(512).repeat(8)[torch.randperm(4096)]
    against_eager(lambda: (rlhf_fast.group_advantages(**kwargs, kind=kind),))
