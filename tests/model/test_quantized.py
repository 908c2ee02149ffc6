"""A base in 8 and 4 bits under fp32 adapters: the adapters' part is that of a plain base, rows and roles do not mix, and what cannot
be is refused. The rest needs bitsandbytes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from models import letter_tokenizer, save_tiny, tiny_llama

from rlhf_fast.config import (
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    PlanConfig,
    RunConfig,
    SFTConfig,
    load_config,
)
from rlhf_fast.model import SharedModel
from rlhf_fast.model.linear import features, is_quantized
from rlhf_fast.model.quantized import loading, weight_bytes
from rlhf_fast.plan import Planner
from rlhf_fast.rollout import generate
from rlhf_fast.train.sft import train_sft

here = importlib.util.find_spec("bitsandbytes") is not None
needs = pytest.mark.skipif(not here, reason="bitsandbytes is not installed")
KINDS = ["int8", "nf4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized")
    tiny_llama(hidden=64).save_pretrained(path)
    letter_tokenizer().save_pretrained(path)
    return path


def shared(folder, kind: str, **more) -> SharedModel:
    model = SharedModel.from_pretrained(folder, lora=LoraConfig(r=4), quantize=kind, **more)
    g = torch.Generator().manual_seed(0)
    for role in ("policy", "value", "reward"):
        for p in model.parameters_of(role).values():
            p.data = 0.3 * torch.randn(p.shape, generator=g)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 30, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :4] = False
    return ids, mask


@needs
@pytest.mark.parametrize("kind", KINDS)
def test_every_role_is_its_adapter_on_the_quantised_product(folder, kind):
    model = shared(folder, kind)
    layer = model.backbone.layers[1].self_attn.q_proj
    assert is_quantized(layer) and features(layer) == (64, 64) and not layer.weight.is_floating_point()
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    own, plain = layer(x), shared(folder, "none").backbone.layers[1].self_attn.q_proj(x)
    error = (own - plain).norm() / plain.norm()
    assert 0 < error < {"int8": 0.02, "nf4": 0.15}[kind], "close to the layer that was quantised, and not it"
    with model._plan.use(("policy", "reference", "value")):
        y = layer(x)
    for i, role in enumerate(("policy", "reference", "value")):
        pair, rows = layer.pairs.get(role), slice(2 * i, 2 * i + 2)
        update = 0 if pair is None else pair.scale * (x[rows] @ pair.lora_A.t() @ pair.lora_B.t())
        torch.testing.assert_close(y[rows], own[rows] + update)


@needs
@pytest.mark.parametrize("kind", KINDS)
def test_roles_in_one_pass_are_roles_alone_and_rows_do_not_mix(folder, kind):
    model = shared(folder, kind)
    ids, mask = batch()
    together = model(ids, mask, roles=("policy", "reference", "value"))
    for role in ("policy", "reference", "value"):
        alone = model(ids[1:2], mask[1:2], roles=(role,))[role].hidden
        torch.testing.assert_close(alone, together[role].hidden[1:2], rtol=1e-4, atol=1e-4)


@needs
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_get_the_gradient_of_their_loss(folder, kind, checkpointing):
    model = shared(folder, kind, gradient_checkpointing=checkpointing)
    ids, mask = batch()
    weight = torch.randn(int(mask.sum()), 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    loss = lambda: (model(ids, mask, roles=("policy",)).policy.hidden[mask].double() * weight).sum()
    loss().backward()
    named = model.parameters_of("policy")
    # The last layer: what comes before passes through activations that int8 rounds, whose slope is not that of the rounded ones.
    name = next(n for n in named if ".2.mlp.down_proj" in n and "lora_B" in n)
    p, step = named[name], 1e-2
    direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    slope = float((p.grad * direction).sum())
    with torch.no_grad():
        p += step * direction
        above = float(loss())
        p -= 2 * step * direction
        below = float(loss())
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=2e-2)
    assert all(torch.isfinite(q.grad).all() and bool(q.grad.any()) for q in named.values())


@needs
@pytest.mark.parametrize("kind", KINDS)
def test_it_samples_trains_and_gives_an_adapter_for_the_plain_base(folder, kind, tmp_path):
    model = shared(folder, kind)
    prompts = torch.full((2, 3), 5)
    found = generate(model, prompts, torch.ones_like(prompts, dtype=torch.bool), max_new_tokens=4, temperature=0.0)
    assert found.logprobs is not None and bool(found.logprobs.isfinite().all())
    (tmp_path / "data.jsonl").write_text('{"text": "a few words."}\n' * 4)
    config = SFTConfig(
        ModelConfig(str(folder), "float32", quantize=kind, lora=LoraConfig(r=4)),
        DataConfig(str(tmp_path / "data.jsonl")),
        RunConfig(str(tmp_path / "run")),
        batch_size=4,
        micro_batch_size=2,
        max_steps=2,
    )
    adapter = train_sft(config)
    trained = SharedModel.from_pretrained(folder, ("policy",), adapters={"policy": adapter})
    assert all(bool(p.any()) for n, p in trained.parameters_of("policy").items() if "lora_B" in n)
    with pytest.raises(ValueError, match="'fold' got the quantised module"):
        SharedModel.from_pretrained(folder, ("policy",), fold=adapter, quantize=kind)


@needs
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_the_bytes_of_a_quantised_weight(folder, kind):
    model = shared(folder, kind)
    model(*batch(), roles=("policy",))  # int8 takes its weight apart at the first product
    for layer in model.backbone.all_linears().values():
        if kind == "int8":
            parts = [layer.state.CB, layer.state.SCB]
        else:
            state = layer.weight.quant_state
            parts = [layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        assert weight_bytes(kind, layer.out_features, layer.in_features) == sum(p.nbytes for p in parts)


@needs
def test_a_width_that_bitsandbytes_gets_wrong_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"int8 or none on a CPU for .*q_proj of 32 features, no multiple of 64"):
        SharedModel.from_pretrained(save_tiny(tmp_path), quantize="nf4")


@needs
def test_nothing_is_asked_of_a_hub():
    code = """
import sys, types
asked = []
sys.modules["kernels"] = kernels = types.ModuleType("kernels")
kernels.get_kernel = lambda *names, **_: asked.append(names)
from rlhf_fast.model.quantized import loading
import torch
loading("load", "nf4", torch.float32)
assert "bitsandbytes" in sys.modules and not asked and sys.modules["kernels"] is kernels
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_plan_counts_a_quantised_base(folder):
    of = lambda kind: Planner(PlanConfig(str(folder), trainer="sft", dtype="float32", quantize=kind)).at(1)
    plain, eight, four = of("none"), of("int8"), of("nf4")
    layers = SharedModel.from_pretrained(folder, ("policy",)).backbone.all_linears().values()
    numbers = sum(layer.weight.numel() for layer in layers)
    rows = sum(layer.out_features for layer in layers)
    assert plain.always["base weights"] - eight.always["base weights"] == 3 * numbers - 4 * rows
    tables = 4 * (16 + 256 + 1) * len(layers)
    assert (
        0
        < four.always["base weights"] - (eight.always["base weights"] - numbers // 2 - 4 * rows) - tables
        < numbers // 32
    )
    assert four.always["widest layer, dequantised"] == 128 * 64 * 4


def test_what_cannot_be_is_refused(folder, monkeypatch):
    with pytest.raises(ValueError, match="'quantize' got 'fp5'"):
        SharedModel.from_pretrained(folder, quantize="fp5")
    with pytest.raises(ConfigError, match="nothing beside quantize = nf4"):
        load_config(ModelConfig, None, ["--path", "x", "--quantize", "nf4", "--shard"])
    with pytest.raises(ConfigError, match="nothing beside quantize = int8"):
        load_config(ModelConfig, None, ["--path", "x", "--quantize", "int8", "--fold", "y"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"none without bitsandbytes: pip install 'rlhf-fast\[quant\]'"):
        loading("SharedModel.from_pretrained", "nf4", torch.float32)
