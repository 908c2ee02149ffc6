"""Wrong arguments are one clear exception before any work."""

from __future__ import annotations

import pytest
import torch
from model.tiny import tiny_base, tiny_batch
from torch import nn

from rlhf_fast.model import ROLES, LoraConfig, SharedModel

LORA = LoraConfig(r=2)


@pytest.fixture(scope="module")
def model() -> SharedModel:
    return SharedModel(tiny_base(), lora=LORA, shared_layers=1)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"roles": ("policy", "critic")},
            ValueError,
            "'critic', expected the known roles: policy, reference, value",
        ),
        ({"roles": ("policy", "policy")}, ValueError, "at least one role, none twice"),
        ({"roles": ()}, ValueError, "at least one role"),
        ({"roles": "policy"}, TypeError, "a sequence of role names"),
        ({"shared_layers": 3}, ValueError, "'shared_layers' got 3, expected 0 to 2 for a model of 3 layers"),
        ({"shared_layers": -1}, ValueError, "'shared_layers' got -1"),
        ({"shared_layers": 1.0}, TypeError, "'shared_layers' got 1.0, expected an integer"),
        (
            {"lora": LoraConfig(target_modules=("q_proj", "c_attn"))},
            ValueError,
            "'c_attn', expected among down_proj, gate",
        ),
        ({"lora": LoraConfig(target_modules="mlp")}, ValueError, "'mlp', expected among"),
        ({"lora": LoraConfig(target_modules="lm_head")}, ValueError, "'lm_head', expected among"),
        (
            {"roles": ("policy",), "adapters": {"value": "x"}},
            ValueError,
            "'value', expected the roles of this model",
        ),
        (
            {"adapters": {"policy": "missing-folder"}},
            ValueError,
            r"no adapter_config\.json in missing-folder",
        ),
        ({"fold": "missing-folder"}, ValueError, r"no adapter_config\.json in missing-folder"),
    ],
)
def test_construction_errors(options, error, message):
    with pytest.raises(error, match=message):
        SharedModel(tiny_base(), **{"lora": LORA, **options})


@pytest.mark.parametrize(
    "options, error",
    [
        ({"r": 0}, ValueError),
        ({"r": 1.5}, TypeError),
        ({"r": True}, TypeError),
        ({"alpha": 0.0}, ValueError),
        ({"alpha": float("nan")}, ValueError),
        ({"dropout": 1.0}, ValueError),
        ({"dropout": -0.1}, ValueError),
        ({"target_modules": ()}, ValueError),
    ],
)
def test_lora_config_errors_name_the_field(options, error):
    with pytest.raises(error, match=next(iter(options))):
        LoraConfig(**options)


def test_base_must_be_a_causal_lm_that_is_not_shared_yet():
    base = tiny_base()
    for wrong in (nn.Linear(2, 2), base.model, "gpt2"):
        with pytest.raises(TypeError, match="expected a Hugging Face causal LM"):
            SharedModel(wrong)
    SharedModel(base, lora=LORA)
    with pytest.raises(ValueError, match="already belongs to a SharedModel"):
        SharedModel(base, lora=LORA)


def test_linear_layer_of_unknown_arithmetic_is_refused_by_name():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    base = tiny_base()
    base.model.layers[1].mlp.gate_proj = Router(32, 48)
    with pytest.raises(
        TypeError, match=r"'model\.layers\.1\.mlp\.gate_proj' is a .*Router, expected a layer that comp"
    ):
        SharedModel(base, lora=LORA)
    SharedModel(base, lora=LoraConfig(target_modules=("q_proj", "up_proj")))


def test_architecture_whose_layers_exchange_more_than_hidden_states_is_refused():
    base = tiny_base()
    first, last = base.model.layers[0], base.model.layers[2]
    first.register_forward_hook(lambda module, args, output: setattr(module, "note", output.mean()))
    first.self_attn.register_forward_hook(lambda module, args, output: setattr(last, "seen", output[0].sum().abs()))
    last.register_forward_hook(lambda module, args, output: output * (1 + module.__dict__.pop("seen")))
    with pytest.raises(ValueError, match="'shared_layers' got 2, expected 0: the layers of LlamaForCausalLM exchange"):
        SharedModel(base, lora=LORA, shared_layers=2)


IDS, MASK = tiny_batch()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"input_ids": IDS.float()}, TypeError, "'input_ids' got torch.float32"),
        ({"input_ids": [[1, 2]]}, TypeError, "'input_ids' got list"),
        ({"input_ids": IDS[0]}, ValueError, r"'input_ids' got shape \(8,\), expected \(B, T\)"),
        ({"input_ids": IDS[:0]}, ValueError, r"got shape \(0, 8\)"),
        ({"input_ids": IDS[:, :0]}, ValueError, r"got shape \(3, 0\)"),
        (
            {"input_ids": IDS.clone().fill_(97)},
            ValueError,
            r"got 97 at row 0, position 3, expected ids in \[0, 97\)",
        ),
        ({"input_ids": -IDS}, ValueError, "at row 0, position 3"),
        ({"attention_mask": MASK[:, 1:]}, ValueError, r"'attention_mask' got shape \(3, 7\)"),
        ({"attention_mask": MASK.float()}, TypeError, "'attention_mask' got torch.float32"),
        (
            {"attention_mask": MASK & (torch.arange(3) != 1).unsqueeze(1)},
            ValueError,
            "no real token in row 1",
        ),
        (
            {"roles": ("policy", "judge")},
            ValueError,
            "'judge', expected the roles of this model: policy, reference",
        ),
        ({"roles": ()}, ValueError, "at least one role"),
        (
            {"trunk": torch.zeros(3, 7, 32)},
            ValueError,
            r"'trunk' got shape \(3, 7, 32\), expected \(3, 8, 32\)",
        ),
        ({"trunk": torch.zeros(3, 8, 32, dtype=torch.int64)}, TypeError, "'trunk' got torch.int64"),
    ],
)
def test_forward_errors(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model(**{"input_ids": IDS, "attention_mask": MASK, **arguments})
    assert model._plan.roles == ()


def test_error_inside_a_pass_restores_the_plain_base(model):
    handle = model.base.model.layers[1].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS, MASK)
    handle.remove()
    assert model._plan.roles == () and "forward" not in model.base.model.layers[0].__dict__
    with torch.no_grad():
        ids, _ = tiny_batch(padded=False)
        assert torch.equal(model.base(input_ids=ids).logits, tiny_base()(input_ids=ids).logits)


def test_trunk_without_shared_layers_is_an_error():
    plain = SharedModel(tiny_base(), lora=LORA)
    with pytest.raises(ValueError, match="shared_layers=0"):
        plain.trunk(IDS, MASK)
    with pytest.raises(ValueError, match="'trunk' got a tensor, expected None with shared_layers=0"):
        plain(IDS, MASK, trunk=torch.zeros(3, 8, 32))


def test_outputs_not_computed_are_errors_that_say_what_there_is(model):
    out = model(IDS, MASK, roles=("policy", "value"))
    with pytest.raises(AttributeError, match="no role 'reward', computed are policy, value"):
        _ = out.reward
    with pytest.raises(ValueError, match="'policy' has no value head"):
        _ = out.policy.values
    with pytest.raises(ValueError, match="'value' has no reward head"):
        _ = out.value.scores


def test_role_operations_name_what_is_missing(model, tmp_path):
    for call in (model.parameters_of, model.state_of, lambda role: model.save_adapter(role, tmp_path)):
        with pytest.raises(ValueError, match="'critic', expected the roles of this model"):
            call("critic")
    with pytest.raises(ValueError, match="'critic'"), model.as_role("critic"):
        pass
    with pytest.raises(ValueError, match="the role 'reference' has no adapter"):
        model.save_adapter("reference", tmp_path)
    with pytest.raises(ValueError, match="nothing folded, and the role 'reference' has no adapter"):
        model.export_adapter("reference", tmp_path)
    with pytest.raises(ValueError, match="the role 'reference' has no adapter"):
        model.copy_role("reference", "policy")
    assert list(tmp_path.iterdir()) == []


def test_state_of_another_shape_is_refused_and_nothing_changes(model):
    before = model.state_of("policy")
    name = next(iter(before))
    for wrong, message in (
        ({**before, name: torch.zeros(3, 3)}, r"got \(3, 3\), expected \(2, 32\)"),
        ({n: t for n, t in before.items() if n != name}, r"got nothing, expected \(2, 32\)"),
        ({**before, "extra": torch.zeros(1)}, r"'extra' got \(1,\), expected nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_state_of("policy", {n: t + 1 for n, t in wrong.items()})
    assert all(torch.equal(t, before[n]) for n, t in model.state_of("policy").items())


def test_missing_model_folder_is_a_value_error_without_network(tmp_path):
    with pytest.raises(ValueError, match=r"no local safetensors model at .*nowhere"):
        SharedModel.from_pretrained(tmp_path / "nowhere", ROLES, LORA)
    tiny_base().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no local safetensors model"):
        SharedModel.from_pretrained(tmp_path, ROLES, LORA)
