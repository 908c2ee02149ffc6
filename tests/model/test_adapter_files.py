"""Adapter folders in both directions between this package and plain PEFT, and folded adapters."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from model.tiny import disturb, tiny_base, tiny_batch
from safetensors.torch import load_file, save_file
from tolerances import FLOOR
from transformers import AutoModelForSequenceClassification

from rlhf_fast.model import LoraConfig, SharedModel, read_adapter
from rlhf_fast.model.adapters import CONFIG_FILE, WEIGHTS_FILE

LORA = LoraConfig(r=4, alpha=8.0)
CLOSE = 32 * FLOOR[torch.float32]
pytestmark = pytest.mark.filterwarnings("error:.*adapter keys.*")  # PEFT's word for tensors it missed


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=CLOSE, atol=CLOSE)


def logits_of(model, role: str = "policy") -> torch.Tensor:
    ids, _ = tiny_batch(padded=False)
    with torch.no_grad():
        return model(ids, roles=(role,))[role].logits if isinstance(model, SharedModel) else model(input_ids=ids).logits


def in_peft(folder: Path, family: str = "llama", **overrides) -> torch.Tensor:
    return logits_of(peft.PeftModel.from_pretrained(tiny_base(family, **overrides), folder).eval())


def peft_adapter(folder: Path, family: str = "llama", seed: int = 2, **options) -> torch.Tensor:
    """Save a random adapter with plain PEFT; returns PEFT's own logits with it."""
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        **options,
    }
    model = peft.get_peft_model(tiny_base(family), peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return logits_of(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe", "bloom"])
@pytest.mark.parametrize("role", ["policy", "value", "reward"])
def test_saved_adapter_gives_the_same_logits_in_plain_peft(tmp_path, family, role):
    model = disturb(SharedModel(tiny_base(family), lora=LORA))
    ids, _ = tiny_batch(padded=False)
    model.save_adapter(role, tmp_path)
    with model.as_role(role), torch.no_grad():
        expected = model.base(input_ids=ids).logits
    close(in_peft(tmp_path, family), expected)
    assert (expected - logits_of(tiny_base(family))).abs().max() > 1e-2


@pytest.mark.parametrize("layers, targets", [(1, "all-linear"), (2, ("q_proj",)), (0, ("v_proj", "up_proj"))])
def test_adapter_on_some_layers_loads_in_plain_peft_without_missing_keys(tmp_path, layers, targets):
    model = SharedModel(tiny_base(), lora=LoraConfig(r=3, alpha=5.0, target_modules=targets), shared_layers=layers)
    disturb(model).save_adapter("policy", tmp_path)
    close(in_peft(tmp_path), logits_of(model))


def test_written_config_is_what_peft_expects(tmp_path):
    model = disturb(SharedModel(tiny_base("gpt2"), lora=LoraConfig(r=4, alpha=8.0, dropout=0.1)))
    model.save_adapter("policy", tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8.0, 0.1)
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"] and config["fan_in_fan_out"] is True
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    keys = set(load_file(tmp_path / WEIGHTS_FILE))
    assert len(keys) == 3 * 4 * 2 and "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in keys
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True}),
        (
            "llama",
            {
                "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
                "alpha_pattern": {"q_proj": 3},
            },
        ),
        (
            "llama",
            {
                "rank_pattern": {".*\\.1\\..*": 2},
                "use_rslora": True,
                "exclude_modules": ["model.layers.0.mlp.down_proj"],
            },
        ),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}),
        ("llama", {"target_modules": r".*\.(0|2)\.mlp\.(up|gate)_proj"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_peft_adapter_gives_the_same_logits_here_and_survives_a_save(tmp_path, family, options):
    expected = peft_adapter(tmp_path / "peft", family, **options)
    model = SharedModel(tiny_base(family), ("policy", "reference"), LORA, adapters={"policy": tmp_path / "peft"})
    close(logits_of(model), expected)
    close(logits_of(model, "reference"), logits_of(tiny_base(family)))
    model.save_adapter("policy", tmp_path / "again")
    close(in_peft(tmp_path / "again", family), expected)
    other = disturb(SharedModel(tiny_base(family), ("policy", "reference"), LoraConfig(r=2)), "policy")
    other.load_adapter("policy", tmp_path / "again")
    assert torch.equal(logits_of(other), logits_of(model))
    assert {n: p.shape for n, p in other.parameters_of("policy").items()} == {
        n: p.shape for n, p in model.parameters_of("policy").items()
    }


def test_gradient_equals_that_of_plain_peft(tmp_path):
    peft_adapter(tmp_path, target_modules="all-linear")
    ours = SharedModel(tiny_base(), ("policy",), LORA, adapters={"policy": tmp_path})
    theirs = peft.PeftModel.from_pretrained(tiny_base(), tmp_path, is_trainable=True).eval()
    ids, _ = tiny_batch(padded=False)
    for logits in (ours(ids).policy.logits, theirs(input_ids=ids).logits):
        logits.log_softmax(-1)[..., 11].mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.parameters_of("policy").items():
        key = "base_model.model." + name.replace(".weight", ".default.weight")
        close(parameter.grad, expected[key].grad)
        assert parameter.grad.abs().max() > 0


def test_reference_takes_an_adapter_and_does_not_train_it(tmp_path):
    expected = peft_adapter(tmp_path)
    model = SharedModel(tiny_base(), ("policy", "reference"), LORA, adapters={"reference": tmp_path})
    close(logits_of(model, "reference"), expected)
    close(logits_of(model, "policy"), logits_of(tiny_base()))
    assert not any(p.requires_grad for p in model.parameters_of("reference").values())


def test_reward_folder_keeps_adapter_and_head(tmp_path):
    ids, mask = tiny_batch()
    model = disturb(SharedModel(tiny_base(), lora=LORA))
    model.save_adapter("reward", tmp_path)
    again = SharedModel(tiny_base(), lora=LORA, adapters={"reward": tmp_path, "value": tmp_path})
    with torch.no_grad():
        out, expected = again(ids, mask), model(ids, mask)
    assert torch.equal(out.reward.scores, expected.reward.scores)
    assert torch.equal(out.value.values, expected.reward.token_scores)
    head = load_file(tmp_path / WEIGHTS_FILE)["base_model.model.score.weight"]
    assert torch.equal(head, model.state_of("reward")["score.weight"])


def test_reward_model_trained_by_plain_peft_loads_with_its_head(tmp_path):
    """Reward trainers on a sequence classifier save a `score` without bias in modules_to_save."""
    base = tiny_base()
    base.config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(base.config).eval()
    classifier.model.load_state_dict(base.model.state_dict())
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    model = peft.get_peft_model(classifier, options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(tmp_path)
    ids, _ = tiny_batch(padded=False)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 0]
        ours = SharedModel(tiny_base(), ("reward",), LORA, adapters={"reward": tmp_path})
        close(ours(ids).reward.scores, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fold_makes_the_base_what_peft_computes_and_all_roles_start_there(tmp_path, family):
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["k_proj", "up_proj"]
    expected = peft_adapter(tmp_path, family, target_modules=targets)
    model = SharedModel(tiny_base(family), lora=LORA, fold=tmp_path)
    close(logits_of(model, "reference"), expected)
    assert torch.equal(logits_of(model, "policy"), logits_of(model, "reference"))
    close(logits_of(model.base), expected)  # no adapter left behind: the weights themselves changed


def test_fold_is_computed_in_fp32_for_a_bf16_base(tmp_path):
    peft_adapter(tmp_path, r=2, lora_alpha=2)
    file = read_adapter(tmp_path)
    name = "model.layers.1.self_attn.q_proj"
    update = file.weights[name]
    base = tiny_base().to(torch.bfloat16)
    before = base.get_submodule(name).weight.detach().clone()
    model = SharedModel(base, lora=LORA, fold=[tmp_path, tmp_path])
    delta = update.scale * (update.b.double() @ update.a.double())
    once = (before.double() + delta).to(torch.bfloat16)
    expected = (once.double() + delta).to(torch.bfloat16)
    assert torch.equal(model.base.get_submodule(name).weight, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", [0, 1])
def test_exported_adapter_gives_the_same_logits_on_the_original_base(tmp_path, family, layers):
    first, second = (["c_attn"], ["c_fc", "c_attn"]) if family == "gpt2" else (["k_proj"], ["k_proj", "up_proj"])
    peft_adapter(tmp_path / "a", family, target_modules=first, r=2)
    peft_adapter(tmp_path / "b", family, seed=3, target_modules=second, r=3, use_rslora=True)
    folds = [tmp_path / "a", tmp_path / "b"]
    model = disturb(SharedModel(tiny_base(family), lora=LORA, fold=folds, shared_layers=layers))
    model.export_adapter("policy", tmp_path / "policy")
    config = json.loads((tmp_path / "policy" / CONFIG_FILE).read_text())
    assert config["r"] == config["lora_alpha"] == 2 + 3 + 4 and config["rank_pattern"] == {}
    close(in_peft(tmp_path / "policy", family), logits_of(model))
    again = SharedModel(tiny_base(family), lora=LORA, adapters={"policy": tmp_path / "policy"})
    close(logits_of(again), logits_of(model))
    model.export_adapter("reference", tmp_path / "reference")  # the folded adapters alone
    close(in_peft(tmp_path / "reference", family), logits_of(model, "reference"))


def test_export_carries_the_head(tmp_path):
    peft_adapter(tmp_path / "a")
    model = disturb(SharedModel(tiny_base(), lora=LORA, fold=tmp_path / "a"))
    model.export_adapter("reward", tmp_path / "reward")
    ids, mask = tiny_batch()
    again = SharedModel(tiny_base(), ("reward",), LORA, adapters={"reward": tmp_path / "reward"})
    with torch.no_grad():
        close(again(ids, mask).reward.scores, model(ids, mask).reward.scores)


def test_loading_the_same_shape_keeps_the_parameters_of_a_running_optimizer(tmp_path):
    model = disturb(SharedModel(tiny_base(), lora=LORA))
    model.save_adapter("policy", tmp_path)
    saved, held = model.state_of("policy"), model.parameters_of("policy")
    disturb(model, "policy", seed=6)
    model.load_adapter("policy", tmp_path)
    assert all(torch.equal(p, saved[n]) and p is held[n] for n, p in model.parameters_of("policy").items())


def test_save_replaces_an_older_adapter_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = disturb(SharedModel(tiny_base(), lora=LORA))
    model.save_adapter("policy", tmp_path)
    disturb(model, "policy", seed=4)
    model.save_adapter("policy", tmp_path)
    close(in_peft(tmp_path), logits_of(model))
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, WEIGHTS_FILE, "notes.txt"]


def test_interrupted_save_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    model = disturb(SharedModel(tiny_base(), lora=LORA))
    model.save_adapter("policy", tmp_path)
    expected = logits_of(model)
    disturb(model, "policy", seed=4)

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_adapter("policy", tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, WEIGHTS_FILE]
    close(in_peft(tmp_path), expected)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good adapter to be spoiled."""
    peft_adapter(tmp_path / "good")
    return tmp_path / "good"


def spoil_config(folder: Path, **changes) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_2_SEQ_LM"),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [5]),
        ("a_field_of_the_future", "on"),
        ("r", 0),
        ("r", True),
        ("lora_alpha", "8"),
        ("rank_pattern", {"q_proj": -1}),
        ("alpha_pattern", [1]),
        ("alpha_pattern", {"q_proj": None}),
    ],
)
def test_unsupported_or_wrong_config_field_is_named(folder, field, value):
    spoil_config(folder, **{field: value})
    with pytest.raises(ValueError, match=f"{CONFIG_FILE}: field '{field}'"):
        read_adapter(folder)


def test_pattern_that_is_no_regular_expression_is_named(folder):
    spoil_config(folder, rank_pattern={"(q_proj": 4})
    with pytest.raises(ValueError, match=r"pattern '\(q_proj' is no regular expression"):
        read_adapter(folder)


def test_pickle_adapter_is_refused_without_being_opened(folder):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    (folder / "adapter_model.bin").chmod(0)
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle file, which is never opened"):
        read_adapter(folder)


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), "has lora_A but not its partner"),
        (lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(32)}), "is no LoRA factor"),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(5, 32)}),
            r"factors \(5, 32\) and \(32, 4\)",
        ),
        (lambda t: t[f"{KEY}.lora_A.weight"].fill_(float("nan")), "not finite"),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int64)}),
            "not finite floating",
        ),
        (
            lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, 32)}),
            r"\(2, 32\), expected \(1, hidden",
        ),
        (lambda t: t.update({"base_model.model.score.bias": torch.zeros(1)}), "'score.weight' is None"),
        (lambda t: t.clear(), "holds no tensor"),
    ],
)
def test_damaged_tensors_are_named(folder, change, message):
    spoil_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def test_damaged_or_missing_files_are_named(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    data = (folder / WEIGHTS_FILE).read_bytes()
    for content in (b"", data[:100], data[: len(data) // 2]):
        (broken / WEIGHTS_FILE).write_bytes(content)
        with pytest.raises(ValueError, match=f"{WEIGHTS_FILE}: not readable as safetensors"):
            read_adapter(broken)
    for content in ("{", "[" * 100_000, "[]", " " * (2 << 20)):
        (broken / CONFIG_FILE).write_text(content)
        with pytest.raises(ValueError, match=CONFIG_FILE):
            read_adapter(broken)
    (broken / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match=f"no {CONFIG_FILE} in .*broken"):
        read_adapter(broken)


def test_adapter_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(folder, tmp_path):
    model = disturb(SharedModel(tiny_base(), lora=LORA, shared_layers=1))
    before = {role: model.state_of(role) for role in model.roles}
    other = tmp_path / "other"
    peft_adapter(other, "gpt2", target_modules=["c_attn"])
    wide = tmp_path / "wide"
    shutil.copytree(folder, wide)
    spoil_tensors(wide, lambda t: [t.update({k: torch.zeros(4, 40)}) for k in list(t) if "q_proj.lora_A" in k])
    plain = tmp_path / "plain"
    disturb(SharedModel(tiny_base(), lora=LORA, shared_layers=1)).save_adapter("policy", plain)
    headed = tmp_path / "headed"
    disturb(SharedModel(tiny_base(), lora=LORA, shared_layers=1)).save_adapter("reward", headed)
    for role, path, message in (
        ("policy", other, "'transformer.h.0.attn.c_attn' is no linear layer"),
        ("policy", folder, r"layers\.0.* can adapt \(decoder layers from 1 on\)"),
        ("policy", headed, "has a scalar head, which the role 'policy' cannot take"),
        ("reward", plain, "has no scalar head .* expected one for the role 'reward'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(role, path)
    with pytest.raises(ValueError, match=r"maps \(in, out\) \(40, 32\), the base's \(32, 32\)"):
        SharedModel(tiny_base(), lora=LORA, fold=wide)
    with pytest.raises(ValueError, match="has a scalar head, which a fold cannot take"):
        SharedModel(tiny_base(), lora=LORA, fold=headed)
    for role, state in before.items():
        assert all(torch.equal(t, state[n]) for n, t in model.state_of(role).items())
    head = model.state_of("value")["score.weight"]
    model.load_adapter("value", plain)  # a value role may start from an adapter without a head
    assert torch.equal(model.state_of("value")["score.weight"], head)


def test_failed_construction_leaves_the_base_untouched(folder, tmp_path):
    base = tiny_base("gpt2")
    before = {n: (p.clone(), p.requires_grad) for n, p in base.named_parameters()}
    classes = [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match="is no linear layer"):
        SharedModel(base, lora=LORA, fold=folder)
    assert [type(m) for m in base.modules()] == classes
    assert all(torch.equal(p, before[n][0]) and p.requires_grad for n, p in base.named_parameters())
