from __future__ import annotations

import pytest
import torch

from rlhf_fast.ops import ppo_loss

Z = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logprobs": torch.zeros(2, 4)}, r"'old_logprobs' got shape \(2, 4\), expected \(2, 3\)"),
        ({"logprobs": torch.zeros(2, 3, dtype=torch.int8)}, "'logprobs' got torch.int8"),
        ({"advantages": torch.zeros(3)}, r"'advantages' got shape \(3,\), expected \(2, 3\)"),
        ({"mask": None}, "'mask' got None"),
        ({"mask": Z}, "'mask' got torch.float32, expected torch.bool"),
        ({"clip": -0.1}, "'clip' got -0.1"),
        ({"clip": 0.0}, "'clip' got 0.0"),
        ({"clip": (0.2, float("nan"))}, "'clip' got nan"),
        ({"clip": (0.1, 0.2, 0.3)}, "'clip' got .* a pair"),
        ({"clip": (1.5, 0.2)}, r"'clip' got 1.5, expected a finite number in \(0.0, 1.0\]"),
        ({"dual_clip": 1.0}, "'dual_clip' got 1.0"),
        ({"value_clip": 0.0}, "'value_clip' got 0.0"),
        ({"value_coef": -1.0}, "'value_coef' got -1.0"),
        ({"kl_coef": 0.1}, "'ref_logprobs' got None, expected a tensor with kl_coef=0.1"),
        ({"kl_coef": -0.1, "ref_logprobs": Z}, "'kl_coef' got -0.1"),
        ({"kl_kind": "k5"}, "'kl_kind' got 'k5'"),
        ({"entropy_coef": 0.1}, "'entropy' got None, expected a tensor with entropy_coef=0.1"),
        ({"values": Z}, "'returns' got NoneType"),
        ({"returns": Z}, "'values' got NoneType"),
        ({"old_values": Z}, "'values' got None, expected a tensor with old_values"),
        ({"reduction": "mean"}, "'reduction' got 'mean', expected one of 'token-mean'"),
        ({"normalizer": 0.0}, "'normalizer' got 0.0"),
        ({"normalizer": torch.ones(2)}, r"'normalizer' got shape \(2,\), expected a number or a 0-d tensor"),
        ({"dialect": "klingon"}, "'dialect' got 'klingon', expected one of 'rlhf_fast'"),
        ({"cu_seqlens": torch.tensor([0, 6])}, r"'logprobs' got shape \(2, 3\), expected \(N,\) with cu_seqlens"),
        ({"old_logprobs": torch.zeros(2, 3, device="meta")}, "'old_logprobs' got device meta"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    kwargs = {"logprobs": Z, "old_logprobs": Z, "advantages": Z, "mask": torch.ones(2, 3, dtype=torch.bool), **change}
    with pytest.raises((ValueError, TypeError), match="ppo_loss: argument " + message):
        ppo_loss(**kwargs)


def test_flat_input_without_cu_seqlens_has_no_sequences():
    flat = torch.zeros(6)
    assert ppo_loss(flat, flat, flat, torch.ones(6, dtype=torch.bool)).loss == 0
    with pytest.raises(ValueError, match="cu_seqlens for seq-mean-token-mean"):
        ppo_loss(flat, flat, flat, torch.ones(6, dtype=torch.bool), reduction="seq-mean-token-mean")
