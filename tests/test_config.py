from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_fast import config as config_module
from rlhf_fast.config import (
    ConfigError,
    EvaluateConfig,
    OptimConfig,
    PPOConfig,
    ProcessConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SFTConfig,
    config_hash,
    config_help,
    is_callable_spec,
    load_config,
    resolve_device,
    resolve_dtype,
    to_yaml,
    validate,
)
from rlhf_fast.train.loop import device_of

FILE = """\
model: {path: models/base}
data: {path: prompts.jsonl}
run: {output_dir: out}
reward: {source: adapters/reward}
"""
WORDS = [
    *("--model.path", "models/base", "--data.path", "prompts.jsonl"),
    *("--run.output-dir", "out", "--reward.source", "adapters/reward"),
]
BLOCKS = [c for c in vars(config_module).values() if dataclasses.is_dataclass(c)]
ALL = (SFTConfig, RewardConfig, PPOConfig, EvaluateConfig)


@pytest.fixture
def load(tmp_path):
    def run(text: str | bytes | None = FILE, *words: str, cls: type = PPOConfig, **options):
        path = None
        if text is not None:
            path = tmp_path / "run.yaml"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(cls, path, words, **options)

    return run


def message(load, *arguments, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_file_and_command_line_give_the_same_settings(load):
    assert load(FILE) == load(None, *WORDS)


def test_override_beats_file_and_file_beats_default(load):
    config = load(FILE + "optim: {lr: 1.0e-3, eps: 1.0e-7}\n", "--optim.lr", "2e-3")
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (2e-3, 1e-7, 0.0)


def test_partial_block_keeps_the_defaults_of_its_command(load):
    assert OptimConfig().lr == 2e-4
    assert load(FILE).optim.lr == 3e-5
    assert load(FILE + "optim: {eps: 1.0e-8}\n").optim.lr == 3e-5


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "'1e-6'", ".000001", "0.000001"])
def test_every_spelling_of_a_small_number_is_a_float(load, text):
    value = load(FILE + f"optim: {{lr: {text}}}\n").optim.lr
    assert isinstance(value, float)
    assert math.isclose(value, 1e-6, rel_tol=1e-12)


def test_scalars_follow_yaml_1_2(load):
    config = load(
        "model: {path: no}\ndata: {path: 1:30, split: 'on'}\n"
        "run: {output_dir: 2020-01-01, seed: 010}\nreward: {source: 'null'}\n"
    )
    assert (config.model.path, config.data.path, config.data.split) == ("no", "1:30", "on")
    assert (config.run.output_dir, config.run.seed, config.reward.source) == ("2020-01-01", 10, "null")


@pytest.mark.parametrize(
    ("words", "read", "value"),
    [
        (["--optim.lr=3e-4"], lambda c: c.optim.lr, 3e-4),
        (["--optim.betas", "0.8", "0.99"], lambda c: c.optim.betas, (0.8, 0.99)),
        (["--optim.betas", "[0.8, 0.99]"], lambda c: c.optim.betas, (0.8, 0.99)),
        (["--run.resume"], lambda c: c.run.resume, True),
        (["--ppo.no-whiten"], lambda c: c.ppo.whiten, False),
        (["--ppo.whiten", "false"], lambda c: c.ppo.whiten, False),
        (["--ppo.value-clip", "none"], lambda c: c.ppo.value_clip, None),
        (["--ppo.value_clip", "None"], lambda c: c.ppo.value_clip, None),
        (["--model.fold", "a", "b"], lambda c: c.model.fold, ("a", "b")),
        (["--model.fold", "a"], lambda c: c.model.fold, ("a",)),
        (["--model.fold"], lambda c: c.model.fold, ()),
        (["--model.lora.target-modules", "q", "v"], lambda c: c.model.lora.target_modules, ("q", "v")),
        (["--model.lora.target-modules", "all-linear"], lambda c: c.model.lora.target_modules, "all-linear"),
        (["--data.fields", "prompt=my-q"], lambda c: c.data.fields, {"prompt": "my-q"}),
        (["--data.fields.prompt", "q"], lambda c: c.data.fields, {"prompt": "q"}),
        (["--data.path", "123"], lambda c: c.data.path, "123"),
        (["--data.path", "none"], lambda c: c.data.path, "none"),
        (["--optim.lr", "1", "--optim.lr", "2"], lambda c: c.optim.lr, 2.0),
        (["--reward.clip", "-1", "--reward.clip", "5"], lambda c: c.reward.clip, 5.0),
    ],
)
def test_override_forms(load, words, read, value):
    assert read(load(FILE, *words)) == value


def test_mapping_overrides_add_to_the_file_and_can_clear_it(load):
    text = FILE + "data2: 1\n"
    with pytest.raises(ConfigError):
        load(text)
    text = FILE.replace("prompts.jsonl", "prompts.jsonl, fields: {prompt: a}")
    assert load(text, "--data.fields", "meta=b").data.fields == {"prompt": "a", "meta": "b"}
    assert load(text, "--data.fields").data.fields == {}


def test_hyphens_in_mapping_keys_are_kept(load):
    words = ["--model.path", "m", "--data.path", "d", "--run.output-dir", "o", "--adapters.sft-v1", "folder"]
    assert load(None, *words, cls=EvaluateConfig).adapters == {"sft-v1": "folder"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optm.lr", "1"], "optm: unknown setting; did you mean optim?"),
        (["--optim.lrr", "1"], "optim.lrr: unknown setting; did you mean optim.lr?"),
        (["--lr", "1"], "lr: unknown setting; did you mean optim.lr?"),
        (["--zzzz", "1"], "zzzz: unknown setting; expected one of model, data, run"),
        (["--optim.lr", "-1"], "optim.lr: got -1, expected greater than 0"),
        (["--optim.lr", "0"], "optim.lr: got 0, expected greater than 0"),
        (["--optim.lr", "nan"], "optim.lr: got 'nan', expected a finite number"),
        (["--optim.lr", ".inf"], "optim.lr: got inf, expected a finite number"),
        (["--optim.lr", "fast"], "optim.lr: got 'fast', expected a valid number"),
        (["--optim.lr"], "--optim.lr: got no value"),
        (["--optim.lr", "1", "2"], "--optim.lr: got 2 values"),
        (["--optim.betas", "0.9"], "optim.betas.1: missing"),
        (["--optim.betas", "0.9", "1.5"], "optim.betas.1: got '1.5', expected less than 1"),
        (["--optim.eps", "0"], "optim.eps: got 0"),
        (["--optim", "3"], "optim: got 3, expected a block of lr, betas"),
        (["--kl.coef", "-0.1"], "kl.coef: got -0.1, expected greater than or equal to 0"),
        (["--kl.kind", "adaptve"], "kl.kind: got 'adaptve', expected 'fixed' or 'adaptive'"),
        (["--ppo.clip", "-0.2"], "ppo.clip: got -0.2, expected greater than 0"),
        (["--ppo.clip", "0"], "ppo.clip: got 0, expected greater than 0"),
        (["--ppo.gamma", "1.5"], "ppo.gamma: got 1.5, expected less than or equal to 1"),
        (["--ppo.dual-clip", "0.5"], "ppo.dual_clip: got 0.5, expected greater than 1"),
        (["--ppo.epochs", "true"], "ppo.epochs: got true, expected an integer"),
        (["--ppo.epochs", "2.5"], "ppo.epochs: got 2.5, expected a valid integer"),
        (["--ppo.epochs", "0"], "ppo.epochs: got 0, expected greater than or equal to 1"),
        (
            ["--ppo.micro-batch-size", "99"],
            "ppo.micro_batch_size: got 99, expected at most minibatch_size = 16",
        ),
        (
            ["--ppo.minibatch-size", "99"],
            "ppo.minibatch_size: got 99, expected at most rollout.batch_size = 64",
        ),
        (["--rollout.temperature", "0"], "rollout.temperature: got 0, expected greater than 0"),
        (
            ["--rollout.min-new-tokens", "65"],
            "rollout.min_new_tokens: got 65, expected at most max_new_tokens",
        ),
        (
            ["--data.max-prompt-tokens", "600"],
            "data.max_prompt_tokens: got 600, expected at most max_tokens = 512",
        ),
        (["--data.kind", "text"], "data.kind: got 'text', expected 'prompt'"),
        (["--data.fields", "prompt"], "--data.fields: got 'prompt', expected NAME=VALUE"),
        (["--model.path="], "model.path: got '', expected at least 1 character"),
        (["--model.lora.r", "0"], "model.lora.r: got 0"),
        (["--model.lora.dropout", "1"], "model.lora.dropout: got 1"),
        (["--run.resume", "--run.overwrite"], "run.overwrite: got True, expected False beside resume"),
        (["--run.no-resume", "x"], "--run.no-resume: got 'x', expected no value"),
        (["--run.keep", "1"], "run.keep: got 1, expected greater than or equal to 2"),
        (["--reward.mix", "a=1"], "reward.source: got 'adapters/reward' and mix {'a': 1"),
        (["--reward.mix", "a=x"], "reward.mix.a: got 'x', expected a valid number"),
        (["stray"], "stray: got a value without a name"),
    ],
)
def test_wrong_override_is_one_line_naming_key_got_and_expected(load, words, expected):
    assert expected in message(load, FILE, *words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim:\n  lr: -1e-6\n", ":6: optim.lr: got -1e-06, expected greater than 0"),
        ("optim:\n  lr: .nan\n", ":6: optim.lr: got nan, expected a finite number"),
        ("optim:\n  lr: true\n", ":6: optim.lr: got true, expected a number"),
        ("optim:\n  lr: [1]\n", ":6: optim.lr: got [1], expected a valid number"),
        ("optim:\n  learning_rte: 1\n", ":6: optim.learning_rte: unknown setting"),
        ("optim: 3\n", ":5: optim: got 3, expected a block"),
        ("optim:\n", ":5: optim: got None, expected a block"),
        ("steps: 1\nsteps: 2\n", ":6: steps: given twice in the same block"),
        ("1: 2\n", ":5: 1: keys must be plain text"),
        (
            "steps: !!python/object/apply:os.system [x]\n",
            ":5: steps: got tag 'tag:yaml.org,2002:python/object",
        ),
        ("steps: !!python/name:os.system\n", ":5:8: could not determine a constructor"),
        ("steps: !local 3\n", ":5:8: could not determine a constructor"),
        ("a: &x [1]\nb: *x\n", ":6:4: aliases are not allowed"),
        ("steps: [1,\n", ":6:1: while parsing a flow node"),
        ("steps: - 1\n", ":5:8: sequence entries are not allowed here"),
        ("steps: " + "9" * 5000 + "\n", ":5: steps: got '9999"),
        ("a: " + "[" * 100_000, "nested deeper than 20 levels"),
        ("---\na: 1\n", "expected a single document"),
        ("steps: \x00\n", "unacceptable character"),
    ],
)
def test_wrong_file_is_one_line_naming_file_line_and_key(load, tmp_path, text, expected):
    found = message(load, FILE + text)
    assert found.startswith(str(tmp_path / "run.yaml"))
    assert expected in found


def test_alias_bomb_is_refused_before_expansion(load):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert "aliases are not allowed" in message(load, bomb)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\xff\xfea\x00", "not UTF-8 text at byte 0"),
        (b"x" * 1_000_001, "got more than 1000000 bytes"),
        (b"- 1\n", "got a list, expected `key: value` lines"),
        (b"3\n", "got a int, expected `key: value` lines"),
        (b"", "model.path: missing, expected text (and 3 more)"),
    ],
)
def test_file_that_holds_no_settings_is_refused(load, raw, expected):
    assert expected in message(load, raw)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        load_config(PPOConfig, tmp_path / "absent.yaml")


def test_override_error_is_not_blamed_on_the_file(load):
    text = message(load, FILE + "optim: {lr: 1.0e-4}\n", "--optim.lr", "-3")
    assert text == "optim.lr: got -3, expected greater than 0"


@pytest.mark.parametrize(
    ("key", "block"),
    [("reward.source", "reward: {source: 'os:system'}"), ("reward.mix", "reward: {mix: {'evil.py:run': 1}}")],
)
def test_file_cannot_name_code_but_command_line_can(load, key, block):
    text = FILE.replace("reward: {source: adapters/reward}", block)
    assert f":4: {key}: got '" in message(load, text)
    assert "may not name code to run" in message(load, text)
    assert load(text, allow_code=True).reward.weights
    config = load(FILE, "--reward.source", "os:system")
    assert config.reward.weights == {"os:system": 1.0}


@pytest.mark.parametrize("block", ["{source: 'http://10.0.0.1/score'}", "{mix: {'https://host': 1}}"])
def test_file_cannot_name_where_completions_are_sent_but_command_line_can(load, block):
    text = FILE.replace("{source: adapters/reward}", block)
    assert "may not name a server to send completions to; give it on the command line" in message(load, text)
    config = load(None, *[w.replace("adapters/reward", "http://host:8000/score?a=b") for w in WORDS])
    assert config.reward.weights == {"http://host:8000/score?a=b": 1.0}


def test_file_cannot_name_a_judge_that_is_code(load):
    text = "model: {path: m}\ndata: {path: d}\nrun: {output_dir: o}\njudges: [vader, 'evil.py:run']\n"
    assert ":4: judges: got 'evil.py:run'" in message(load, text, cls=EvaluateConfig)


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("package.module:function", True),
        ("file.py:function", True),
        ("some folder/file.py:f", True),
        ("adapters/reward", False),
        ("C:/adapters/reward", False),
        ("vader", False),
        ("module:1f", False),
        ("http://host:1/a.py:f", False),
    ],
)
def test_callable_specs_are_told_from_folders(source, code):
    assert is_callable_spec(source) is code


def test_mix_of_rewards_keeps_weights(load):
    words = [w for w in WORDS if w not in ("--reward.source", "adapters/reward")]
    config = load(None, *words, "--reward.mix", "adapters/reward=0.7", "score.py:brevity=-0.3")
    assert config.reward.weights == {"adapters/reward": 0.7, "score.py:brevity": -0.3}
    assert "expected exactly one of the two" in message(load, None, *words)


@pytest.mark.parametrize("cls", ALL)
def test_yaml_round_trip_is_equal(load, cls):
    words = WORDS[:6] if cls is not PPOConfig else WORDS
    config = load(None, *words, "--data.path", "1e-6", "--data.split", "null", "--model.fold", "true", cls=cls)
    assert load(to_yaml(config), cls=cls) == config
    assert yaml.safe_load(to_yaml(config))["model"]["path"] == "models/base"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20))
@example(text="\x85\u2028\u2029\ufeff\n\r\n\t")
def test_any_text_survives_the_yaml_round_trip(tmp_path_factory, text):
    config = load_config(SFTConfig, None, [*WORDS[:6], "--run.output-dir", "o", f"--data.path=x{text}"])
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_config(SFTConfig, path).data.path == f"x{text}"


@settings(max_examples=150, deadline=None)
@given(raw=st.one_of(st.binary(max_size=80), st.text("{}[]:,-&*!|>'\"#%@` \n\tab1.e~", max_size=80).map(str.encode)))
def test_any_bytes_give_settings_or_a_one_line_config_error(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:  # nothing this short names every required setting
        load_config(PPOConfig, path)
    assert len(str(caught.value).splitlines()) == 1


def test_hash_ignores_where_and_how_a_run_is_shown(load):
    plain = config_hash(load(FILE))
    words = "--run.output-dir elsewhere --run.resume --run.log-every 9 --run.threads 1 --run.sample-every 0"
    assert config_hash(load(FILE, *words.split(), "--run.save-every", "3", "--run.keep", "5")) == plain
    assert len(plain) == 64
    words = "--reward.workers 4 --reward.timeout 5 --reward.retries 0 --reward.call-size 2 --reward.max-unscorable 0.5"
    assert config_hash(load(FILE, *words.split())) == plain
    assert config_hash(load(FILE, "--reward.whole-batch")) != plain
    words = "--rollout.process.threads 1 --rollout.process.timeout 5"
    assert config_hash(load(FILE, *words.split())) == plain
    assert config_hash(load(FILE, "--rollout.process.device", "cuda")) != plain


@pytest.mark.parametrize(
    "words", ["--run.seed 1", "--optim.lr 1e-3", "--model.lora.r 8", "--data.path other", "--steps 7"]
)
def test_hash_changes_with_every_setting_that_changes_numbers(load, words):
    assert config_hash(load(FILE, *words.split())) != config_hash(load(FILE))


def test_hash_does_not_depend_on_how_a_number_was_written(load):
    config = load(FILE, "--optim.weight-decay", "1")
    same = dataclasses.replace(config, optim=dataclasses.replace(config.optim, weight_decay=1))
    assert config_hash(same) == config_hash(config)


def test_objects_built_in_python_are_checked_by_validate(load):
    config = load(FILE)
    assert validate(config) == config
    broken = dataclasses.replace(config, optim=OptimConfig(lr=-1.0))
    with pytest.raises(ConfigError, match=r"^optim\.lr: got -1\.0, expected greater than 0$"):
        validate(broken)
    with pytest.raises(ValueError, match="RunConfig: argument 'overwrite'"):
        RunConfig("out", resume=True, overwrite=True)


@pytest.mark.parametrize("cls", ALL)
def test_help_explains_every_setting(cls, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")  # one column of boxes
    text = config_help(cls, "rlhf-fast x")

    def visit(owner: type, prefix: str) -> None:
        for f in dataclasses.fields(owner):
            inner = next((c for c in BLOCKS if c.__name__ == f.type), None)
            if inner:
                visit(inner, f"{prefix}{f.name}.")
                continue
            option = f"--{prefix}{f.name}".replace("_", "-")
            _, found, rest = text.partition(option)
            assert found, option
            assert len(re.split(r"\n\s*--\w", rest)[0].split()) > 5, option  # more than a type and a default

    visit(cls, "")
    assert cls.__doc__[:40] in text


def test_auto_dtype_follows_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert resolve_dtype("auto") is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert resolve_dtype("auto") is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    assert resolve_dtype("auto") is torch.float32
    assert resolve_dtype("auto", "cuda") is torch.bfloat16
    assert resolve_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="float16"):
        resolve_dtype("float16")


@pytest.mark.parametrize(
    ("name", "devices", "rank", "expected"),
    [
        ("auto", 0, None, "cpu"),
        ("cpu", 4, "2", "cpu"),
        ("auto", 4, None, "cuda:0"),
        ("auto", 4, "2", "cuda:2"),
        ("cuda", 4, "3", "cuda:3"),
        ("cuda", 1, "3", "cuda:0"),  # a launcher that shows every rank its own GPU alone
        ("cuda:1", 4, "3", "cuda:1"),
    ],
)
def test_a_device_is_the_gpu_of_the_local_rank_unless_it_has_a_number(monkeypatch, name, devices, rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert resolve_device("RunConfig", name) == torch.device(expected)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=rf"RunConfig: argument 'device' got '{name}', expected auto or cpu where"):
            resolve_device("RunConfig", name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"'cuda:2', expected auto, cpu, cuda or cuda:0 to cuda:1"):
        resolve_device("RunConfig", "cuda:2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"'cuda:1', expected auto, cpu or cuda under torchrun"):
        device_of(RunConfig("run", device="cuda:1"))
    for name in ("gpu", "cuda:", "cuda:01", "cuda:-1", "mps"):
        for section in (lambda name=name: RunConfig("run", device=name), lambda name=name: ProcessConfig(device=name)):
            with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:N"):
                section()


def test_an_engine_on_another_device_is_another_policy():
    local, process = RolloutConfig(), RolloutConfig(engine="process")
    assert local.same_policy("cuda") and local.weighted("cuda") is None
    assert process.same_policy("cpu") and not process.same_policy("cuda")
    assert process.weighted("cuda") == "token-tis" and process.weighted("cpu") is None


@pytest.mark.parametrize(
    "other", [{"min_new_tokens": 1}, {"correction": "sequence-tis"}, {"engine": "process", "staleness": 1}]
)
def test_logprobs_of_sampling_are_refused_as_the_old_ones_where_another_distribution_sampled(other):
    with pytest.raises(ValueError, match=r"'old_logprobs' got 'sampled' with .*, expected scored unless"):
        RolloutConfig(old_logprobs="sampled", **other)
    RolloutConfig(**other)
    RolloutConfig(old_logprobs="sampled", correction="none")
