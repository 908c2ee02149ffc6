"""Runs whose rollouts come from a vLLM server, and their settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tolerances
from asking import VLLM, real
from ranks_of import start
from runs import SCORERS, TEXTS, numbers, outcome, write_lines

from rlhf_fast.config import (
    ConfigError,
    GroupConfig,
    GroupUpdateConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOUpdateConfig,
    PromptDataConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    VLLMConfig,
    config_hash,
    load_config,
)
from rlhf_fast.model import LoraConfig
from rlhf_fast.train.group import train_group
from rlhf_fast.train.ppo import train_ppo


def online(folder: Path, model: Path, name: str, kind: type, **rollout):
    write_lines(folder / "prompts.jsonl", [{"prompt": text} for text in TEXTS])
    own = (
        {"ppo": PPOUpdateConfig(epochs=2, minibatch_size=4, micro_batch_size=4)}
        if kind is PPOConfig
        else {"group_size": 4, "group": GroupUpdateConfig(minibatch_size=8, micro_batch_size=4)}
    )
    return kind(
        model=ModelConfig(str(model), dtype="float32", lora=LoraConfig(r=4, alpha=8.0)),
        data=PromptDataConfig(str(folder / "prompts.jsonl")),
        run=RunConfig(str(folder / name), save_every=1, sample_every=0),
        reward=RewardSource(source=f"{SCORERS}:count_e", workers=0),
        optim=OptimConfig(lr=2e-2, schedule="constant"),
        rollout=RolloutConfig(batch_size=8, max_new_tokens=8, **rollout),
        steps=3,
        **own,
    )


def elsewhere(config, url: str, name: str, **rollout):
    """The same run with another folder, whose completions come from a server."""
    rollout = dataclasses.replace(config.rollout, engine="vllm", vllm=VLLMConfig(server=url), **rollout)
    run = dataclasses.replace(config.run, output_dir=str(Path(config.run.output_dir).with_name(name)))
    return dataclasses.replace(config, rollout=rollout, run=run)


TRAIN = {PPOConfig: train_ppo, GroupConfig: train_group}


@pytest.mark.parametrize("kind", [PPOConfig, GroupConfig])
def test_a_run_learns_the_same_from_a_server_that_samples_the_same(fake, base, tmp_path, kind):
    # Without the weights and in two epochs: one learns from the rollout's own log-probs, which a server has no entropies with.
    here = online(tmp_path, base, "here", kind, correction="none")
    if kind is GroupConfig:
        here = dataclasses.replace(here, group=dataclasses.replace(here.group, epochs=2))
    there = elsewhere(here, fake.url, "there")
    TRAIN[kind](here)
    TRAIN[kind](there)
    assert outcome(tmp_path / "here") == outcome(tmp_path / "there")
    rows = numbers(tmp_path / "there")
    assert numbers(tmp_path / "here") == [{k: v for k, v in row.items() if k != "staleness"} for row in rows]
    assert len(fake.bodies("/v1/load_lora_adapter")) == 3 and not fake.adapters
    for row in rows:
        assert 0.0 <= row["mismatch/mean"] <= row["mismatch/max"] < tolerances.ANOTHER_ENGINE
        assert abs(row["mismatch/kl"]) < tolerances.ANOTHER_ENGINE
    (tmp_path / "there" / "checkpoints" / "step-3").rename(tmp_path / "gone")
    TRAIN[kind](dataclasses.replace(there, run=dataclasses.replace(there.run, resume=True)))
    assert outcome(tmp_path / "here") == outcome(tmp_path / "there")


@pytest.mark.parametrize("kind", [PPOConfig, GroupConfig])
def test_what_a_server_sampled_is_weighted_unless_told_otherwise(fake, base, tmp_path, kind):
    TRAIN[kind](elsewhere(online(tmp_path, base, "here", kind), fake.url, "there", staleness=1))
    rows = numbers(tmp_path / "there")
    assert [row["staleness"] for row in rows] == [0.0, 1.0, 1.0]
    assert abs(rows[0]["correction/weight_mean"] - 1) < tolerances.ANOTHER_ENGINE
    for row in rows[1:]:  # sampled by the policy before the last update
        assert row["mismatch/max"] > 100 * tolerances.ANOTHER_ENGINE and row["mismatch/kl"] > 0
        assert abs(row["correction/weight_mean"] - 1) > tolerances.ANOTHER_ENGINE


def test_one_server_samples_for_two_ranks(fake, base, tmp_path):
    config = online(tmp_path, base, "one", GroupConfig, min_new_tokens=1)
    update = GroupUpdateConfig(minibatch_size=8, micro_batch_size=2)
    one = elsewhere(dataclasses.replace(config, group=update, optim=OptimConfig(lr=1e-3)), fake.url, "one")
    train_group(one)
    asked = len(fake.bodies("/v1/completions"))
    two = dataclasses.replace(one, run=dataclasses.replace(one.run, output_dir=str(tmp_path / "two")))
    ranks = start(lambda rank: train_group(two), tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.words(0) + ranks.words(1)
    assert len(fake.bodies("/v1/completions")) == 2 * asked and not fake.adapters
    for a, b in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_settings(tmp_path):
    with pytest.raises(ValueError, match="expected exactly one of the two"):
        RolloutConfig(engine="vllm")
    with pytest.raises(ValueError, match="expected exactly one of the two"):
        RolloutConfig(engine="vllm", vllm=VLLMConfig(python="p", server="http://s"))
    words = ["--model.path", "m", "--data.path", "d", "--run.output-dir", "o", "--reward.source", "r"]
    file = tmp_path / "run.yaml"
    for key, value in (("python", "/bin/sh"), ("server", "http://host"), ("arguments", "[--trust-remote-code]")):
        file.write_text(
            f"rollout: {{vllm: {{{key}: '{value}'}}}}\n"
            if key != "arguments"
            else f"rollout: {{vllm: {{{key}: {value}}}}}\n"
        )
        with pytest.raises(ConfigError, match=rf"rollout\.vllm\.{key}.*a settings file may not name"):
            load_config(PPOConfig, file, words)
    given = load_config(PPOConfig, None, [*words, "--rollout.engine", "vllm", "--rollout.vllm.server", "http://a"])
    other = load_config(PPOConfig, None, [*words, "--rollout.engine", "vllm", "--rollout.vllm.python", "p"])
    assert config_hash(given) == config_hash(other)  # a resumed run may find its server elsewhere
    assert config_hash(given) != config_hash(load_config(PPOConfig, None, words))


@real
@pytest.mark.parametrize("kind", [PPOConfig, GroupConfig])
def test_a_run_through_vllm(wide, tmp_path, small_cache, kind):
    config = online(tmp_path, wide, "run", kind, engine="vllm", vllm=VLLMConfig(python=VLLM))
    TRAIN[kind](config)
    rows = numbers(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert 0.0 < row["mismatch/max"] < tolerances.ANOTHER_ENGINE
    assert "vllm" in {p.name for p in (tmp_path / "run").iterdir()}
