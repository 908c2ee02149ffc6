"""A packed forward says what the padded one says, and flash-attn is told exactly where the sequences end."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from model.tiny import FAMILIES, VOCABULARY, disturb, tiny_base
from tolerances import FLOOR
from transformers import PreTrainedModel

import rlhf_fast
from rlhf_fast.batch import cu_seqlens, pack, pad
from rlhf_fast.model import ROLES, LoraConfig, SharedModel, backbone, packing

LORA = LoraConfig(r=4, alpha=8.0)
# Two orders of the same fp32 sums, through three layers, on numbers of order 1.
CLOSE = 32 * FLOOR[torch.float32]
CLOSE_BF16 = 8 * FLOOR[torch.bfloat16]
LENGTHS = (5, 1, 9, 3)
APART = ("falcon", "bloom")
"""Architectures whose masks do not follow the positions: they are refused."""
PACKS = tuple(f for f in FAMILIES if f not in APART)


def shared(family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> SharedModel:
    return disturb(SharedModel(tiny_base(family).to(dtype), lora=LORA, **options))


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = CLOSE) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def batch(lengths=LENGTHS):
    """(ids (B, T), mask (B, T), ids (N,), cu_seqlens)."""
    generator = torch.Generator().manual_seed(5)
    ids, mask = pad([torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths])
    return ids, mask, *pack(ids, mask)


def compare(model: SharedModel, tolerance: float = CLOSE) -> None:
    ids, mask, flat, bounds = batch()
    expected, got = model(ids, mask), model(flat, cu_seqlens=bounds)
    for role in ROLES:
        assert got[role].hidden.shape == (len(flat), 32)
        close(got[role].hidden, expected[role].hidden[mask], tolerance)
    close(got.policy.logits, expected.policy.logits[mask], tolerance)
    close(got.value.values, expected.value.values[mask], tolerance)
    close(got.reward.token_scores, expected.reward.token_scores[mask], tolerance)
    assert got.reward.scores.shape == (len(LENGTHS),)
    close(got.reward.scores, expected.reward.scores, tolerance)


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("family", PACKS)
def test_packed_equals_padded_for_every_role(family, layers):
    model = shared(family, shared_layers=layers)
    compare(model)
    own = model.base.config._attn_implementation
    assert model.packed_attention[0] == (packing.SPLIT if own == "sdpa" else own)
    assert "the model is on device cpu" in model.packed_attention[1]


@pytest.mark.parametrize("layers, checkpointing", [(0, False), (1, False), (1, True)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_packed_gradients_are_those_of_the_padded_batch(family, layers, checkpointing):
    ids, mask, flat, bounds = batch()
    model = shared(family, shared_layers=layers, gradient_checkpointing=checkpointing)
    found = []
    for out, keep in ((model(ids, mask), mask), (model(flat, cu_seqlens=bounds), slice(None))):
        assert not out.reference.hidden.requires_grad
        loss = out.policy.logits.log_softmax(-1)[..., 7][keep].mean() + out.value.values[keep].square().mean()
        (loss + out.reward.scores.sigmoid().log().sum()).backward()
        found.append(
            {(r, n): p.grad.clone() for r in ROLES for n, p in model.parameters_of(r).items() if p.grad is not None}
        )
        model.zero_grad(set_to_none=True)
    assert found[0].keys() == found[1].keys() and {r for r, _ in found[0]} == {"policy", "value", "reward"}
    for name, gradient in found[0].items():
        close(found[1][name], gradient)


@torch.no_grad()
def test_the_trunk_of_a_packed_batch_is_reused():
    _, _, flat, bounds = batch()
    model = shared(shared_layers=2)
    trunk = model.trunk(flat, cu_seqlens=bounds)
    assert trunk.shape == (len(flat), 32)
    again, fresh = model(flat, trunk=trunk, cu_seqlens=bounds), model(flat, cu_seqlens=bounds)
    assert all(torch.equal(again[role].hidden, fresh[role].hidden) for role in ROLES)


@torch.no_grad()
def test_no_sequence_sees_another_one():
    """Not even in the last bit, whatever its neighbours hold."""
    _, _, flat, bounds = batch()
    model = shared()
    start, end = bounds[2:4].tolist()
    before = model(flat, cu_seqlens=bounds)
    other = flat.clone()
    other[:start], other[end:] = 4, 5
    after = model(other, cu_seqlens=bounds)
    for role in ROLES:
        assert torch.equal(after[role].hidden[start:end], before[role].hidden[start:end])
        assert not torch.equal(after[role].hidden[:start], before[role].hidden[:start])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_sequence_and_sequences_of_one_token(dtype):
    model = shared()
    ids, mask, flat, bounds = batch((7,))
    close(model(flat, cu_seqlens=bounds.to(dtype)).policy.hidden, model(ids, mask).policy.hidden[0])
    ids, mask, flat, bounds = batch((1, 1, 1))
    close(model(flat, cu_seqlens=bounds.to(dtype)).reward.scores, model(ids, mask).reward.scores)


@pytest.mark.parametrize("family", APART)
def test_architectures_whose_sequences_would_see_each_other_are_refused(family):
    _, _, flat, bounds = batch()
    with pytest.raises(ValueError, match="'cu_seqlens' got boundaries, expected None: packed sequences of"):
        shared(family)(flat, cu_seqlens=bounds)


def test_the_proof_finds_attention_across_a_border(monkeypatch):
    """Positions that do not restart are what transformers would take for one sequence."""
    _, _, flat, bounds = batch()
    plain = packing.Packing.arguments

    def one_sequence(self, copies, implementation):
        told = plain(self, copies, implementation)
        return told | {"position_ids": torch.arange(self.positions.shape[1]).expand(copies, -1)}

    monkeypatch.setattr(packing.Packing, "arguments", one_sequence)
    model = shared()
    model.base.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="would see each other with eager attention"):
        model(flat, cu_seqlens=bounds)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_ids": torch.ones(2, 9, dtype=torch.int64)}, r"'input_ids' got shape \(2, 9\), expected \(N,\)"),
        ({"input_ids": torch.ones(0, dtype=torch.int64)}, r"'input_ids' got shape \(0,\)"),
        ({"input_ids": torch.full((18,), VOCABULARY)}, rf"got {VOCABULARY} at position 0, expected ids in \[0, 97\)"),
        ({"attention_mask": torch.ones(18, dtype=torch.bool)}, "'attention_mask' got a tensor, expected None"),
        ({"cu_seqlens": torch.tensor([0, 5, 5, 18])}, "boundaries from 0 to 18 with a token between any two"),
        ({"cu_seqlens": torch.tensor([0, 5, 17])}, "rising boundaries from 0 to 18"),
        ({"cu_seqlens": torch.tensor([[0, 18]])}, r"\(sequences \+ 1,\)"),
        ({"trunk": torch.ones(1, 18, 32)}, r"'trunk' got shape \(1, 18, 32\), expected \(18, 32\)"),
    ],
)
def test_wrong_packed_arguments_are_named(changes, message):
    _, _, flat, bounds = batch()
    arguments = {"input_ids": flat, "cu_seqlens": bounds, **changes}
    with pytest.raises(ValueError, match=message):
        shared(shared_layers=1)(**arguments)


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 4, 100])
def test_a_sliding_window_holds_within_each_sequence(window):
    ids, mask, flat, bounds = batch()
    model = shared("mistral")
    model.base.config.sliding_window = window
    assert model.packed_attention[0] == packing.SPLIT
    close(model(flat, cu_seqlens=bounds).policy.hidden, model(ids, mask).policy.hidden[mask])


@torch.no_grad()
def test_attention_costs_its_sequences_and_not_their_square(monkeypatch):
    sizes, bounded = [], []
    plain, op = packing.sdpa_attention_forward, packing.varlen_attention

    def counted(module, query, key, *rest, **options):
        sizes.append((query.shape[2], key.shape[2]))
        return plain(module, query, key, *rest, **options)

    def one_pass(query, key, value, cu_seqlens, *rest):
        bounded.append(cu_seqlens.tolist())
        return op(query, key, value, cu_seqlens, *rest)

    monkeypatch.setattr(packing, "sdpa_attention_forward", counted)
    monkeypatch.setattr(packing, "varlen_attention", one_pass)
    _, _, flat, bounds = batch()
    model = shared()
    got = model(flat, roles=("policy",), cu_seqlens=bounds).policy.hidden
    assert not sizes and bounded[-3:] == [bounds.tolist()] * 3, "our op in each of three layers"
    with torch.no_grad():
        model(flat, cu_seqlens=bounds)
    rows = range(len(model.roles))
    assert bounded[-1] == [0, *(row * len(flat) + b for row in rows for b in bounds.tolist()[1:])]
    with rlhf_fast.use_backend("reference"):
        other = model(flat, roles=("policy",), cu_seqlens=bounds).policy.hidden
    assert set(sizes) == {(n, n) for n in LENGTHS}
    torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)


class Varlen:
    """flash_attn_varlen_func by its definition; keeps what it was told."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __call__(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
    ):
        told = {n: x for n, x in locals().items() if n != "self"}
        self.calls.append(told)
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        parts = []
        for a, b in pairwise(cu_seqlens_q.tolist()):
            scores = torch.einsum("ihd,jhd->hij", q[a:b].float(), k[a:b].float()) * softmax_scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            back = torch.arange(b - a)[:, None] - torch.arange(b - a)  # how far the key lies behind the query
            seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
            seen &= back <= window_size[0] if window_size[0] >= 0 else True
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            parts.append(torch.einsum("hij,jhd->ihd", weights, v[a:b].float()).to(q.dtype))
        return torch.cat(parts)


@pytest.fixture
def flash(monkeypatch) -> Varlen:
    """A machine where flash-attn is installed and every device can run it."""
    varlen = Varlen()
    module, paddings = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    module.flash_attn_varlen_func = varlen
    module.flash_attn_func = module.flash_attn_with_kvcache = lambda *_, **__: pytest.fail("not the varlen function")
    paddings.pad_input = paddings.unpad_input = lambda *_, **__: pytest.fail("padded")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", paddings)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setattr(packing, "flash_missing", lambda base: None)
    return varlen


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "qwen3_moe"])
def test_flash_attn_gives_the_padded_results(family, layers, flash):
    model = shared(family, shared_layers=layers)
    own = model.base.config._attn_implementation
    compare(model)
    assert flash.calls and model.base.config._attn_implementation == own
    assert model.packed_attention == ("flash_attention_2", None)


@torch.no_grad()
def test_flash_attn_serves_conv1d_models_in_bf16(flash):
    compare(shared("gpt2", torch.bfloat16), CLOSE_BF16)
    assert flash.calls and all(call["q"].dtype is torch.bfloat16 for call in flash.calls)


@torch.no_grad()
def test_flash_attn_is_told_the_borders_of_every_copy(flash):
    _, _, flat, bounds = batch()
    model = shared("gemma2", roles=("policy", "reference", "value"))
    model(flat, cu_seqlens=bounds)
    flash.calls.clear()  # those of the proof
    model(flat, cu_seqlens=bounds, roles=("policy", "value"))
    assert len(flash.calls) == 3
    expected = torch.cat([bounds, len(flat) + bounds[1:]])
    for i, call in enumerate(flash.calls):
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            assert call[name].dtype is torch.int32 and torch.equal(call[name], expected)
            assert call[name].is_contiguous()
        for name in ("max_seqlen_q", "max_seqlen_k"):
            assert type(call[name]) is int and call[name] == max(LENGTHS)
        assert call["causal"] is True and call["dropout_p"] == 0.0
        assert call["q"].shape == (2 * len(flat), 4, 8) and call["k"].shape == call["v"].shape == (2 * len(flat), 2, 8)
        assert call["softmax_scale"] == 8**-0.5 and call["softcap"] == 50.0
        assert call["window_size"] == ((3, 3) if i % 2 == 0 else (-1, -1))  # every other layer of Gemma 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_run_through_flash_attn(flash, checkpointing):
    """A layer that is computed again in the backward attends as it did, though the pass is over."""
    ids, mask, flat, bounds = batch()
    model = shared(roles=("policy",), gradient_checkpointing=checkpointing)
    found = []
    for out, keep in ((model(ids, mask), mask), (model(flat, cu_seqlens=bounds), slice(None))):
        calls = len(flash.calls)
        out.policy.logits.log_softmax(-1)[..., 7][keep].mean().backward()
        again = len(flash.calls) - calls
        assert model.base.config._attn_implementation == "sdpa"
        found.append({n: p.grad.clone() for n, p in model.parameters_of("policy").items()})
        model.zero_grad(set_to_none=True)
    assert again == (3 if checkpointing else 0)
    for name, gradient in found[0].items():
        close(found[1][name], gradient)


def test_a_flash_attn_that_ignores_the_borders_is_refused(flash, monkeypatch):
    plain = Varlen.__call__

    def careless(self, q, k, v, cu_seqlens_q, cu_seqlens_k, **rest):
        whole = torch.tensor([0, len(q)], dtype=torch.int32)
        return plain(self, q, k, v, whole, whole, **rest)

    careless.__signature__ = __import__("inspect").signature(plain)
    monkeypatch.setattr(Varlen, "__call__", careless)
    _, _, flat, bounds = batch()
    with pytest.raises(ValueError, match="would see each other with flash_attention_2 attention"):
        shared()(flat, cu_seqlens=bounds)


@torch.no_grad()
def test_a_model_without_flash_attention_says_why(flash, monkeypatch):
    def refuses(self, *_, **__):
        raise ValueError("LlamaForCausalLM does not support\nFlash Attention 2 yet")

    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", refuses)
    model = shared()
    compare(model)
    assert not flash.calls
    assert model.packed_attention == (
        packing.SPLIT,
        "transformers: LlamaForCausalLM does not support Flash Attention 2 yet",
    )


class Elsewhere:
    """A model as far as the choice of its attention asks, on a device of our choosing."""

    def __init__(self, device: str = "cuda:0", dtype: torch.dtype = torch.bfloat16, width: int = 128) -> None:
        self.weight = type("weight", (), {"device": torch.device(device), "dtype": dtype})()
        self.config = type("config", (), {"head_dim": width, "get_text_config": lambda self: self})()

    def get_input_embeddings(self):
        return self


@pytest.mark.parametrize(
    "base, installed, capability, reason",
    [
        (Elsewhere(), True, (9, 0), None),
        (Elsewhere(dtype=torch.float16), True, (8, 0), None),
        (Elsewhere("cpu"), True, (9, 0), "the model is on device cpu, flash-attn runs on cuda"),
        (Elsewhere(), False, (9, 0), r"flash-attn is not installed: pip install 'rlhf-fast\[flash\]'"),
        (Elsewhere(dtype=torch.float32), True, (9, 0), "the model computes in torch.float32, flash-attn in bfloat16"),
        (Elsewhere(), True, (7, 5), "the device has compute capability 7.5, flash-attn needs 8.0"),
        (Elsewhere(width=512), True, (9, 0), "attention heads are 512 wide, those of flash-attn at most 256"),
    ],
)
def test_when_flash_attn_is_chosen(base, installed, capability, reason, monkeypatch):
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = packing.flash_missing(base)
    assert found is None if reason is None else __import__("re").search(reason, found)


def test_boundaries_of_a_mask_are_what_the_model_takes():
    _, mask, _, bounds = batch()
    assert torch.equal(bounds, cu_seqlens(mask)) and bounds.tolist() == [0, 5, 6, 15, 18]
    assert backbone.Packing is packing.Packing
