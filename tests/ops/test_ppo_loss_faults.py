from __future__ import annotations

import pytest
import torch

from rlhf_fast import use_backend
from rlhf_fast.ops import advantages, gae, ppo_loss
from rlhf_fast.reference._reduce import REDUCTIONS

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


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_sequence_of_no_token_has_a_loss_of_0(backend, reduction):
    empty = torch.zeros(0, requires_grad=True)
    with use_backend(backend):
        out = ppo_loss(
            empty, empty.detach(), empty.detach(), torch.zeros(0, dtype=torch.bool), cu_seqlens=torch.tensor([0]),
            reduction=reduction,
        )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0 and empty.grad.shape == (0,) and not any(out.stats.values())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_single_boundary_is_refused_where_there_are_tokens_on_devices_too_whose_numbers_are_not_read(device):
    flat, mask = torch.zeros(5, device=device), torch.ones(5, dtype=torch.bool, device=device)
    bounds, scores = torch.tensor([0], device=device), torch.zeros(0, device=device)
    calls = [
        lambda: ppo_loss(flat, flat, flat, mask, cu_seqlens=bounds, reduction="seq-mean-token-mean"),
        lambda: gae(flat, flat, mask, cu_seqlens=bounds),
        lambda: advantages(scores, flat, mask, cu_seqlens=bounds),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"'cu_seqlens' got shape \(1,\), expected .* of sequences over 5 tokens"):
            call()
