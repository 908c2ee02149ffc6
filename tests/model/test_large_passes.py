"""Passes that keep nothing and are large go in parts, which say what the whole says."""

from __future__ import annotations

import pytest
import torch
from model.tiny import disturb, tiny_base, tiny_batch
from tolerances import FLOOR

from rlhf_fast.model import ROLES, LoraConfig, SharedModel, backbone

CLOSE = 32 * FLOOR[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 1])
def test_a_large_pass_that_keeps_nothing_goes_in_parts(monkeypatch, layers):
    ids, mask = tiny_batch()
    model = disturb(SharedModel(tiny_base("llama"), lora=LoraConfig(r=4), shared_layers=layers))
    whole, trunk = model(ids, mask), model.trunk(ids, mask) if layers else None
    monkeypatch.setattr(backbone, "PASS_TOKENS", 2 * ids.shape[1])
    sizes = []
    handle = model.backbone.layers[-1].register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    parts = model(ids, mask, trunk=trunk)
    handle.remove()
    assert sum(sizes) == len(ROLES) * len(ids) and max(sizes) < sum(sizes)
    for role in ROLES:
        torch.testing.assert_close(parts[role].hidden[mask], whole[role].hidden[mask], rtol=CLOSE, atol=CLOSE)
    if layers:
        torch.testing.assert_close(model.trunk(ids, mask)[mask], trunk[mask], rtol=CLOSE, atol=CLOSE)
