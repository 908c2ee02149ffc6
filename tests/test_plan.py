"""The plan of a run's memory: its passes on shapes are those on data, and its arithmetic is that of the trainers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import save_tiny, tiny_llama

from rlhf_fast.cli import main as cli
from rlhf_fast.config import ConfigError, PlanConfig, load_config
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.ops._lm_head import CHUNK_BYTES
from rlhf_fast.plan import GPUS, LiveBytes, plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("plan")))


def settings(folder: str, **changes) -> PlanConfig:
    base = PlanConfig(
        folder,
        dtype="float32",
        lora=LoraConfig(r=4),
        batch_size=16,
        micro_batch_size=3,
        prompt_tokens=9,
        response_tokens=8,
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_on_shapes_allocates_what_the_pass_on_data_does(folder, checkpointing):
    found = plan(settings(folder, trainer="sft", gradient_checkpointing=checkpointing))
    model = SharedModel(tiny_llama(), ("policy",), LoraConfig(r=4), gradient_checkpointing=checkpointing)
    ids = torch.zeros(3, 17, dtype=torch.int64)
    with LiveBytes() as live, model.as_role("policy"):
        hidden = model.backbone.hidden(ids, torch.ones_like(ids, dtype=torch.bool), None, wrap_of(model, ids))
        hidden.backward(torch.zeros_like(hidden))
    assert found.phases["update of policy"] - CHUNK_BYTES == pytest.approx(live.peak, rel=0.1)


def wrap_of(model, ids):
    return model._recomputed(ids) if model.gradient_checkpointing else None


def test_weights_adapters_and_optimizer_are_counted_to_the_byte(folder):
    found = plan(settings(folder))
    base = tiny_llama()
    model = SharedModel(base, lora=LoraConfig(r=4))
    sizes = {role: sum(p.nbytes for p in model.parameters_of(role).values()) for role in model.roles}
    weights = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in (*base.parameters(), *base.buffers())
    }
    assert found.always["base weights"] == sum(weights.values())
    assert found.always["adapters and heads"] == sum(sizes.values())
    assert found.always["gradients"] == sizes["policy"] + sizes["value"]
    assert found.always["Adam's moments"] == 2 * found.always["gradients"]


@pytest.mark.parametrize("gpu", [None, "h100"])
def test_a_rollout_holds_every_key_once_and_on_a_cpu_the_packed_weights(folder, gpu):
    base = tiny_llama()
    config = base.config
    width = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * 4
    layers = [m.weight for m in base.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    packed = sum(w.nbytes for w in (*layers, base.lm_head.weight)) if gpu is None else 0
    rest = packed + 16 * config.vocab_size * 8
    assert plan(settings(folder, gpu=gpu)).phases["rollout"] == per_token * 16 * 17 + rest
    grouped = plan(settings(folder, trainer="grpo", group_size=8, gpu=gpu)).phases["rollout"]
    assert grouped == per_token * (2 * 9 + 16 * 8) + rest, "a prompt's keys serve all of its samples"


def test_what_a_setting_saves(folder):
    plain = plan(settings(folder))
    assert set(plain.phases) == {"rollout", "scoring", "update of policy", "update of value"}
    shared = plan(settings(folder, shared_layers=2))
    assert shared.phases["update of policy"] < plain.phases["update of policy"]
    assert shared.always["adapters and heads"] < plain.always["adapters and heads"]
    assert shared.always["outputs of the shared layers"] == 16 * 17 * 32 * 4
    leaner = plan(settings(folder, gradient_checkpointing=True))
    assert leaner.phases["update of policy"] < plain.phases["update of policy"]
    narrow = plan(settings(folder, dtype="bfloat16"))
    assert narrow.always["base weights"] < 0.6 * plain.always["base weights"]
    assert set(plan(settings(folder, trainer="dpo")).phases) == {"reference", "update of policy"}


def test_the_command_prints_every_part_and_whether_it_fits(folder, capsys):
    assert cli(["plan", "--model", folder, "--gpu", "rtx4090", "--trainer", "grpo"]) == 0
    text = capsys.readouterr().out
    for part in (
        "base weights",
        "adapters and heads",
        "Adam's moments",
        "rollout",
        "scoring",
        "update of policy",
        "peak",
    ):
        assert part in text
    assert f"rtx4090: {GPUS['rtx4090']} GiB" in text and "fits" in text


def test_what_cannot_be_planned_is_named(tmp_path):
    with pytest.raises(ValueError, match="'model' got"):
        plan(settings(str(tmp_path)))
    folder = str(save_tiny(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"'shared_layers' got 3, expected 0 to 2 for a model of 3 layers"):
        plan(settings(folder, shared_layers=3))
    with pytest.raises(ValueError, match=r"'roles' got \['value'\], expected one of policy among them for sft"):
        plan(settings(folder, trainer="sft", roles=("value",)))
    with pytest.raises(ConfigError, match="gpu"):
        load_config(PlanConfig, None, ["--model", "x", "--gpu", "h1000"])
