"""Sampling beside the trainer: the same runs as without, ahead of training by a bound, through kills and deaths."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from models import save_tiny
from runs import SCORERS, TEXTS, numbers, outcome, write_lines

from rlhf_fast.config import (
    GroupConfig,
    GroupKLConfig,
    GroupUpdateConfig,
    KLConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOUpdateConfig,
    ProcessConfig,
    PromptDataConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
)
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.rollout import EngineError, Request, Rollout, sample
from rlhf_fast.rollout.process import ProcessEngine
from rlhf_fast.train.group import train_group
from rlhf_fast.train.ppo import train_ppo

AHEAD = RolloutConfig(batch_size=8, max_new_tokens=6, engine="process", staleness=1, process=ProcessConfig(threads=1))
TENSORS = ("input_ids", "attention_mask", "response_mask", "finished", "logprobs", "entropy")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny(folder / "model")
    write_lines(folder / "prompts.jsonl", [{"prompt": t[:8]} for t in TEXTS])
    fold = SharedModel.from_pretrained(folder / "model", ("policy",), LoraConfig(r=2, alpha=8.0))
    disturb(fold, 1)
    fold.save_adapter("policy", folder / "fold")
    return folder


def disturb(model: SharedModel, seed: int) -> SharedModel:
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.parameters_of("policy").items():
            if "lora_B" in name:
                p.normal_(0, 0.2, generator=generator)
    return model


def settings(source: Path, **changes: object) -> ModelConfig:
    base = ModelConfig(str(source / "model"), "float32", 1, LoraConfig(r=2, alpha=8.0))
    return dataclasses.replace(base, **changes)


def common(source: Path, folder: Path, rollout: RolloutConfig, **run: object) -> dict:
    return {
        "model": settings(source),
        "data": PromptDataConfig(str(source / "prompts.jsonl")),
        "run": RunConfig(str(folder), **{"sample_every": 0, "save_every": 1, "threads": 1, **run}),
        "reward": RewardSource(f"{SCORERS}:count_e", normalize="running", workers=0),
        "optim": OptimConfig(lr=2e-2),
        "rollout": rollout,
        "steps": 5,
    }


def of_ppo(source: Path, folder: Path, rollout: RolloutConfig = AHEAD, **run: object) -> PPOConfig:
    ppo = PPOUpdateConfig(epochs=2, minibatch_size=4, micro_batch_size=4)
    return PPOConfig(**common(source, folder, rollout, **run), ppo=ppo, kl=KLConfig(kind="adaptive", horizon=100.0))


def of_group(source: Path, folder: Path, rollout: RolloutConfig = AHEAD, **run: object) -> GroupConfig:
    update = GroupUpdateConfig(minibatch_size=8, micro_batch_size=4)
    return GroupConfig(
        **common(source, folder, rollout, **run), group=update, group_size=4, kl=GroupKLConfig(coef=0.05)
    )


TRAINERS = {"ppo": (train_ppo, of_ppo), "grpo": (train_group, of_group)}


def request(prompts: list[list[int]], samples: int = 3, **changes: object) -> Request:
    seeds = torch.randint(2**63 - 1, (len(prompts) * samples,), generator=torch.Generator().manual_seed(4))
    asked = Request(prompts, samples, seeds, 7, 0, 0.8, 1)
    return dataclasses.replace(asked, **changes)


PROMPTS = [[5, 6, 7], [9], [4, 4, 8, 3, 2]]


def same(a: Rollout, b: Rollout) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def engine(source):
    with ProcessEngine(settings(source, fold=(str(source / "fold"),)), threads=1, timeout=60.0) as engine:
        yield engine


@pytest.fixture
def model(source) -> SharedModel:
    fold = source / "fold"
    return SharedModel.from_pretrained(source / "model", ("policy",), LoraConfig(r=2, alpha=8.0), 1, fold=fold)


def test_a_second_process_samples_the_bits_of_this_one_with_the_newest_adapter(engine, model):
    asked = [request(PROMPTS), request(PROMPTS[:1], 1, min_new_tokens=3, eos_token_id=2), request(PROMPTS[1:], 2)]
    asked.append(request(PROMPTS, temperature=1.5, max_new_tokens=1, eos_token_id=None))
    expected = []
    for version, one in enumerate(asked):
        disturb(model, version)
        engine.update(model, version)
        engine.submit(one)
        expected.append(sample(model, one))
    for version, rollout in enumerate(expected):
        got, by = engine.collect()
        assert by == version and same(got, rollout)
    assert not same(expected[0], expected[2])


def test_a_request_in_parts_is_the_whole_request(model):
    whole, parts = request(PROMPTS), []
    for rows in (slice(0, 3), slice(3, 9)):
        part = sample(disturb(model, 0), whole.part(rows))
        parts.append(part)
    got = sample(model, whole)
    for i, (part, row) in enumerate([(0, j) for j in range(3)] + [(1, j) for j in range(6)]):
        own = parts[part]
        tokens = own.responses[row][own.response_mask[row]]
        assert torch.equal(got.responses[i][got.response_mask[i]], tokens)
        assert torch.equal(got.logprobs[i][got.response_mask[i]], own.logprobs[row][own.response_mask[row]])


def test_what_a_batch_raises_is_told_and_the_next_one_is_sampled(engine, model):
    engine.update(model, 3)
    engine.submit(request(PROMPTS, max_new_tokens=0))
    engine.submit(request(PROMPTS))
    with pytest.raises(EngineError, match=r"the sampling process: ValueError: generate: .*max_new_tokens"):
        engine.collect()
    rollout, version = engine.collect()
    assert version == 3 and same(rollout, sample(model, request(PROMPTS)))
    with pytest.raises(ValueError, match="nothing was submitted"):
        engine.collect()


def test_a_large_adapter_is_taken_while_the_process_samples(source):
    wide = dataclasses.replace(settings(source), lora=LoraConfig(r=2048, alpha=8.0))
    model = SharedModel.from_pretrained(source / "model", ("policy",), wide.lora, 1)
    size = sum(x.numel() * x.element_size() for x in model.state_of("policy").values())
    assert size > 4e6  # far beyond what a pipe holds
    with ProcessEngine(wide, threads=1, timeout=60.0) as engine:
        engine.update(model, 0)
        many = request([[5] * 8] * 64, 4, max_new_tokens=100, eos_token_id=None)
        engine.submit(many)
        for version in (1, 2):
            engine.update(disturb(model, version), version)
        handed_over = time.monotonic()
        engine.submit(request(PROMPTS))
        engine.collect()
        assert engine.span[1] > handed_over  # it was at work all the time
        rollout, version = engine.collect()
        assert version == 2 and same(rollout, sample(model, request(PROMPTS)))


def test_the_end_of_the_process_is_noticed_with_its_last_words(source, model):
    engine = ProcessEngine(settings(source, fold=(str(source / "fold"),)), threads=1, timeout=60.0)
    engine.update(model, 0)
    engine.submit(request([[5] * 8] * 64, 4, max_new_tokens=100, eos_token_id=None))
    os.kill(engine._worker.process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="the sampling process: its process was ended by signal 9"):
        engine.collect()
    with pytest.raises(EngineError, match="has ended"):
        engine.update(model, 1)
    engine.close()


def test_a_late_batch_and_an_unreadable_base_are_errors(source, tmp_path, model):
    with ProcessEngine(settings(source, fold=(str(source / "fold"),)), threads=1, timeout=0.3) as engine:
        engine.update(model, 0)
        pid = engine._worker.process.pid
        os.kill(pid, signal.SIGSTOP)
        engine.submit(request(PROMPTS))
        with pytest.raises(EngineError, match=r"the sampling process: no batch within 0\.3 s"):
            engine.collect()
        assert not alive(pid)
    with (
        ProcessEngine(settings(source, path=str(tmp_path / "nothing")), threads=1) as engine,
        pytest.raises(EngineError, match=r"could not load the base: .*nothing"),
    ):
        engine.update(model, 0)


@pytest.mark.parametrize("name", TRAINERS)
def test_without_staleness_a_run_is_the_local_one_bit_for_bit(source, tmp_path, name):
    train, config = TRAINERS[name]
    for engine in ("local", "process"):
        train(config(source, tmp_path / engine, dataclasses.replace(AHEAD, staleness=0, engine=engine)))
    local, beside = outcome(tmp_path / "local"), outcome(tmp_path / "process")
    assert local == beside and local
    rows = [{k: v for k, v in row.items() if k != "staleness"} for row in numbers(tmp_path / "process")]
    assert rows == numbers(tmp_path / "local")
