"""The per-token kernels as compiled code: the same bits wherever a tensor lies, packed or padded, alone or in a batch, again and again."""

from __future__ import annotations

import pytest
import torch
from gpu.tools.cases import packed_answers
from gpu.tools.driver import install
from gpu.tools.on_cpu import on_cpu
from rlhf_fast.kernels import ppo_loss as ppo_kernels

import rlhf_fast
from rlhf_fast._counters import counters_for
from rlhf_fast.reference import (
    advantages,
    cached_attention,
    dpo_loss,
    gae,
    lora_linear,
    ppo_loss,
    reward_loss,
    sample_tokens,
    whiten,
)

ARCHS = [80, 90]


def unaligned(kwargs):
    """Copies that begin 4 bytes (masks: one) past the alignment that Triton looks for."""
    copies = {}
    for k, v in kwargs.items():
        room = torch.empty(v.numel() + 1, dtype=v.dtype)
        copies[k] = room[1:].view(v.shape).copy_(v)
    return copies


def loss(call, **kwargs):
    out = call(**kwargs)
    return out.loss, out.stats.tensor


CALLS = {
    "gae": (lambda **k: rlhf_fast.gae(**k), gae.sample((3, 600))),
    "advantages": (lambda **k: rlhf_fast.advantages(**k, kl_coef=0.1, kl_kind="k3"), advantages.sample((3, 600))),
    "whiten": (lambda **k: (rlhf_fast.whiten(**k),), whiten.sample((9, 1000))),
    "ppo_loss": (lambda **k: loss(rlhf_fast.ppo_loss, **k, entropy_coef=0.01, kl_coef=0.1), ppo_loss.sample((3, 400))),
    "gspo": (
        lambda **k: loss(rlhf_fast.policy_loss, recipe="gspo", **k, entropy_coef=0.01, kl_coef=0.1),
        {k: v for k, v in ppo_loss.sample((3, 700)).items() if "values" not in k and k != "returns"},
    ),
    "reward_loss": (lambda **k: loss(rlhf_fast.reward_loss, **k), reward_loss.sample(2500)),
    "dpo_loss": (lambda **k: rlhf_fast.dpo_loss(**k), dpo_loss.sample((3, 1100))),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", CALLS)
def test_the_address_of_a_tensor_does_not_show_in_a_sum(op, arch):
    call, kwargs = CALLS[op]
    with install(arch), on_cpu("triton"):
        aligned, moved = call(**kwargs), call(**unaligned(kwargs))
    assert all(torch.equal(a, b) for a, b in zip(aligned, moved, strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("gap", ["carry", "decay"])
def test_a_row_is_the_same_packed_padded_and_alone(gap, arch):
    kwargs = advantages.sample((4, 300))
    lengths = torch.tensor([300, 0, 257, 31])
    inside = torch.arange(300)[None] < lengths[:, None]
    kwargs["mask"] &= inside
    call = lambda **k: rlhf_fast.advantages(**k, kl_coef=0.1, whiten=False, gap=gap)
    with install(arch), on_cpu("triton"):
        padded = call(**kwargs)
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        packed = call(**{k: v[inside] if v.dim() == 2 else v for k, v in kwargs.items()}, cu_seqlens=bounds)
        alone = call(**{k: v[2:3] for k, v in kwargs.items()})
    assert all(torch.equal(a[inside], b) for a, b in zip(padded, packed, strict=True))
    assert all(torch.equal(a[2:3], b) for a, b in zip(padded, alone, strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("average", [False, True])
def test_a_pair_of_answers_is_the_same_packed_padded_and_alone(average, arch):
    lengths = [1100, 0, 1025, 31], [2, 1104, 0, 700]
    kwargs = {k: v for k, v in dpo_loss.sample((4, 1100)).items() if "mask" not in k}
    call = lambda **k: rlhf_fast.dpo_loss(**k, average=average, normalizer=3.0)
    inside = [
        torch.arange(kwargs[f"{side}_logprobs"].shape[1])[None] < torch.tensor(n)[:, None]
        for side, n in zip(("chosen", "rejected"), lengths, strict=True)
    ]
    padded_inputs = {**kwargs, "chosen_mask": inside[0], "rejected_mask": inside[1]}
    with install(arch) as driver, on_cpu("triton"):
        padded = with_gradients(call, padded_inputs)
        packed = with_gradients(call, packed_answers(kwargs, *lengths))
        alone = with_gradients(call, {k: v[2:3] for k, v in padded_inputs.items()})
    assert all(torch.equal(a, b) for a, b in zip(padded[:3], packed[:3], strict=True))
    assert all(torch.equal(a[real], b) for a, b, real in zip(padded[3:], packed[3:], inside, strict=True))
    assert all(torch.equal(a[2:3], b) for a, b in zip(padded[1:], alone[1:], strict=True))
    assert all(launch.findings == [] for launch in driver.launches)


def with_gradients(call, kwargs):
    leaves = [kwargs[k].clone().requires_grad_() for k in ("chosen_logprobs", "rejected_logprobs")]
    out = call(**{**kwargs, "chosen_logprobs": leaves[0], "rejected_logprobs": leaves[1]})
    return [x.detach() for x in (*out, *torch.autograd.grad(out.loss, leaves))]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_passes_through_its_adapter_alike_alone_and_beside_others(arch, dtype):
    kwargs = lora_linear.sample(120, 130, 70, (40, 9), dtype=dtype, bias=False)
    kwargs["weight"].zero_()  # the product with it is PyTorch's, and adds nothing here
    a, b = kwargs["lora_a"][40:], kwargs["lora_b"][:, 40:]
    with install(arch), on_cpu("triton"):
        whole = rlhf_fast.lora_linear(**kwargs)
        for rows in (slice(80, 120), slice(101, 120), slice(119, 120)):
            part = {"x": kwargs["x"][rows], "lora_a": a, "lora_b": b, "scale": kwargs["scale"][1]}
            assert torch.equal(rlhf_fast.lora_linear(weight=kwargs["weight"], **part), whole[rows])
    assert not whole[40:80].any()  # rows without an adapter


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("vocab", [2048, 2051, 5000])
def test_a_row_of_logits_gives_its_token_alike_alone_and_beside_others_at_any_address(vocab, arch):
    x = sample_tokens.sample((4,), vocab, dtype=torch.bfloat16)
    moved = torch.nn.functional.pad(x["logits"], (1, 4))[:, 1:-4]
    with install(arch) as driver, on_cpu("triton"):
        whole = rlhf_fast.sample_tokens(**x)
        assert all(torch.equal(a, b) for a, b in zip(whole, rlhf_fast.sample_tokens(moved, x["uniform"]), strict=True))
        for i in range(4):
            alone = rlhf_fast.sample_tokens(moved[i : i + 1], x["uniform"][i : i + 1])
            assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, whole, strict=True))
    assert all(launch.findings == [] for launch in driver.launches)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_attends_alike_alone_and_beside_others_at_any_address_and_in_any_room(dtype, arch):
    kwargs = cached_attention.sample(3, 6, 2, 32, prompt_length=300, room=40, dtype=dtype)
    moved = dict(kwargs)
    for name in ("keys", "values", "prefix_keys", "prefix_values"):
        moved[name] = torch.nn.functional.pad(kwargs[name], (1, 2, 0, 270))[..., 1:-2]
    per_token = ("query", "rows", "lengths", "prefix_rows", "prefix_start", "prefix_stop")
    with install(arch) as driver, on_cpu("triton"):
        whole = rlhf_fast.cached_attention(**kwargs)
        for i in range(3):
            alone = {k: v[i : i + 1] if k in per_token else v for k, v in moved.items()}
            assert torch.equal(rlhf_fast.cached_attention(**alone), whole[i : i + 1])
    assert all(launch.findings == [] for launch in driver.launches)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_loss_leaves_its_counters_as_it_found_them(arch, monkeypatch):
    """A captured graph replays with the counters that the run before has left."""
    counters = torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr(ppo_kernels, "counters_for", lambda x: counters)
    kwargs = ppo_loss.sample((5, 900))
    with install(arch) as driver, on_cpu("triton"):
        first, again = (loss(rlhf_fast.ppo_loss, **kwargs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not counters.any() and all(launch.findings == [] for launch in driver.launches)


def test_counters_of_a_cpu_tensor_are_zeros_of_its_own():
    x = torch.zeros(3)
    a, b = counters_for(x), counters_for(x)
    assert not a.any() and a.data_ptr() != b.data_ptr()
