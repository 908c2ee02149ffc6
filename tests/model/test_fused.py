"""Layers of a base that compute by our ops: which ones, that nothing else about them changes, and when they do not."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from models import tiny_llama
from parity import assert_parity
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rlhf_fast
from rlhf_fast.model import SharedModel
from rlhf_fast.model.fused import fuse, fused
from rlhf_fast.model.linear import RowPlan

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "initializer_range": 0.3,
}
# Norms: two a layer and the last; Qwen3 has two more of heads, Gemma 2 two more of the layer; its gate is a GELU. OLMo's norms have
# no weight, GPT-2 has none of the three.
FOUND = {
    "Llama": (lambda: tiny_llama(), {"rms_norm": 7, "silu_mul": 3, "rotary": 3}),
    "Mistral": (lambda: MistralForCausalLM(MistralConfig(**SMALL)), {"rms_norm": 5, "silu_mul": 2, "rotary": 2}),
    "Qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)), {"rms_norm": 9, "silu_mul": 2, "rotary": 2}),
    "Gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)), {"rms_norm": 9, "rotary": 2}),
    "OLMo": (
        lambda: OlmoForCausalLM(OlmoConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, clip_qkv=None)),
        {"silu_mul": 2, "rotary": 2},
    ),
    "GPT2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)), {}),
}


def always():
    """The plan of a pass."""
    plan = RowPlan()
    plan.roles = ("",)
    return plan


def made(name, dtype=torch.float32):
    base = FOUND[name][0]().eval().to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 1:  # norms that are all 1 would hide what is done to them
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return base.requires_grad_(False)


def hidden(base, ids, upstream=None):
    """Final hidden states, and the gradient of the embeddings' output."""
    seen = []
    handle = base.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.detach().requires_grad_()) or seen[-1]
    )
    try:
        y = base.get_decoder()(ids).last_hidden_state
    finally:
        handle.remove()
    return y.detach(), torch.autograd.grad(y, seen[0], torch.ones_like(y) if upstream is None else upstream)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_computes_the_model_itself(name, dtype):
    ids = torch.randint(0, 30, (2, 9))
    base = made(name, dtype)
    ours = copy.deepcopy(base)
    fuse(ours.get_decoder(), always())
    assert Counter(op for _, op in fused(ours)) == FOUND[name][1]
    plain, got, truth = (hidden(model, ids) for model in (base, ours, made(name, dtype).double()))
    for what, a, b, c in zip(("hidden", "gradient"), got, truth, plain, strict=True):
        # Two layers of roundings at other places: each result may be twice as far off as the model's own, as a share of the largest.
        assert_parity(a, b, c, what, scale=4 * float(b.abs().max()))


def test_objects_names_weights_and_classes_stay():
    base = made("Llama")
    before = {name: (module, type(module)) for name, module in base.named_modules()}
    state = {name: x.clone() for name, x in base.state_dict().items()}
    fuse(base.get_decoder(), always())
    changed = {name for name, _ in fused(base)}
    for name, module in base.named_modules():
        kept, kind = before[name]
        assert module is kept and isinstance(module, kind) and (type(module) is not kind) == (name in changed)
    assert all(torch.equal(x, state[name]) for name, x in base.state_dict().items()) and len(state) == len(
        base.state_dict()
    )
    kinds = [type(module) for module in base.modules()]
    fuse(base.get_decoder(), always())  # once more does nothing
    assert kinds == [type(module) for module in base.modules()]
    assert not list(fused(tiny_llama())), "another model of the class is as it was"


class NotQuite(nn.Module):
    def __init__(self, formula):
        super().__init__()
        self.weight, self.eps, self.formula = nn.Parameter(torch.rand(16) + 0.5), 1e-5, formula

    def forward(self, x):
        return self.formula(x, self.weight, self.eps)


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, w, e: w * (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + e),
        lambda x, w, e: w * x / (x.norm(dim=-1, keepdim=True) + e),
        lambda x, w, e: w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 10 * e),
        lambda x, w, e: (w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + e), None),
        lambda x, w, e: x[0] * x[1] * x[2],
    ],
)
def test_a_norm_of_another_formula_is_left_alone(formula):
    layer = nn.Sequential(NotQuite(formula))
    fuse(layer.requires_grad_(False), always())
    assert not list(fused(layer))
    right = nn.Sequential(NotQuite(lambda x, w, e: w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + e)))
    fuse(right.requires_grad_(False), always())
    assert list(fused(right)) == [("0", "rms_norm")]


class Gated(nn.Module):
    def __init__(self, formula):
        super().__init__()
        self.c, self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(8, 12)
        self.formula = formula

    def forward(self, x):
        return self.formula(self, x)


@pytest.mark.parametrize(
    ("formula", "names"),
    [
        (lambda m, x: m.c(nn.functional.silu(m.a(x)) * m.b(x)), ("a", "b", "c")),
        (lambda m, x: m.c(m.a(x) * nn.functional.silu(m.b(x))), ("b", "a", "c")),
        (lambda m, x: m.c(nn.functional.gelu(m.a(x)) * m.b(x)), None),
        (lambda m, x: 2 * m.c(nn.functional.silu(m.a(x)) * m.b(x)), None),
        (lambda m, x: m.c(nn.functional.silu(m.a(x)) * m.b(2 * x)), None),
        (lambda m, x: m.c(nn.functional.silu(m.a(x))), None),
    ],
)
def test_a_gate_is_found_by_what_it_computes(formula, names):
    layer = nn.Sequential(Gated(formula)).requires_grad_(False)
    x = torch.randn(3, 8)
    expected = layer(x)
    fuse(layer, always())
    assert getattr(layer[0], "fused_names", None) == names and bool(list(fused(layer))) == (names is not None)
    torch.testing.assert_close(layer(x), expected)


def test_where_the_ops_do_not_apply_layers_compute_as_before(monkeypatch):
    base = made("Llama")
    ids = torch.randint(0, 30, (2, 9))
    plain = copy.deepcopy(base)
    fuse(base.get_decoder(), always())
    with rlhf_fast.use_backend("reference"):
        assert torch.equal(hidden(base, ids)[0], hidden(plain, ids)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(base.model(ids).last_hidden_state, plain.model(ids).last_hidden_state)
    assert torch.equal(base.double().model(ids).last_hidden_state, plain.double().model(ids).last_hidden_state)
    meta = copy.deepcopy(base).to("meta")
    assert meta.model(ids.to("meta")).last_hidden_state.shape == (2, 9, 32)
    base.float(), plain.float()
    base.model.norm.weight.requires_grad_()
    base.model(ids).last_hidden_state.sum().backward()
    assert base.model.norm.weight.grad is not None


def test_outside_of_a_pass_the_base_is_the_plain_model():
    ids = torch.randint(0, 30, (2, 9))
    plain, ours, plan = made("Llama"), made("Llama"), RowPlan()
    fuse(ours.get_decoder(), plan)
    assert all(torch.equal(a, b) for a, b in zip(hidden(ours, ids), hidden(plain, ids), strict=True))
    with plan.use(("policy",)):
        assert not torch.equal(hidden(ours, ids)[0], hidden(plain, ids)[0])


def test_on_another_device_nothing_is_tried():
    with torch.device("meta"):
        base = LlamaForCausalLM(tiny_llama().config)
    fuse(base.get_decoder(), always())
    assert not list(fused(base))


def test_a_shared_model_runs_by_them_checkpointed_or_not():
    ids = torch.randint(0, 30, (2, 9))
    found = []
    for checkpointing in (False, True):
        model = SharedModel(tiny_llama(), ("policy",), gradient_checkpointing=checkpointing)
        assert len(list(fused(model.base))) == 13
        model(ids, torch.ones_like(ids, dtype=torch.bool)).policy.hidden.square().sum().backward()
        found.append({name: p.grad for name, p in model.parameters_of("policy").items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], g) for name, g in found[1].items() if g is not None)
