"""Sampling beside the trainer: the same runs as without, ahead of training by a bound, through kills and deaths."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from ahead import AHEAD, TRAINERS, beside, disturb, of_group, of_ppo, settings
from checkpoints import child
from models import save_tiny
from processes import gone
from ranks_of import start
from runs import SCORERS, TEXTS, numbers, outcome, write_lines
from runs import steps as steps_of

from rlhf_fast.config import (
    GroupUpdateConfig,
    ModelConfig,
    OptimConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
)
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.rollout import Engine, EngineError, Request, Rollout, sample
from rlhf_fast.rollout.process import ProcessEngine
from rlhf_fast.train import online
from rlhf_fast.train.checkpoint import CheckpointStore
from rlhf_fast.train.group import train_group
from rlhf_fast.train.online import Sampler
from rlhf_fast.train.ppo import train_ppo

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


def request(prompts: list[list[int]], samples: int = 3, **changes: object) -> Request:
    seeds = torch.randint(2**63 - 1, (len(prompts) * samples,), generator=torch.Generator().manual_seed(4))
    asked = Request(prompts, samples, seeds, 7, 0, 0.8, 1)
    return dataclasses.replace(asked, **changes)


PROMPTS = [[5, 6, 7], [9], [4, 4, 8, 3, 2]]


def same(a: Rollout, b: Rollout) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


@pytest.fixture(scope="module")
def engine(source):
    with ProcessEngine(beside(source), threads=1, timeout=60.0) as engine:
        yield engine


@pytest.fixture
def model(source) -> SharedModel:
    config = beside(source)
    return SharedModel.from_pretrained(config.path, ("policy",), config.lora, 1, fold=config.fold)


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


def test_an_adapter_is_taken_while_the_process_samples(engine, model):
    size = sum(x.numel() * x.element_size() for x in model.state_of("policy").values())
    assert size >= 1 << 20  # a pipe holds 64 KiB
    for rows in (64, 256):  # more where other jobs keep this process from handing over
        engine.update(model, 0)
        engine.submit(request([[5] * 8] * rows, 4, max_new_tokens=100, eos_token_id=None))
        for version in (1, 2):
            engine.update(disturb(model, version), version)
        handed_over = time.monotonic()
        engine.submit(request(PROMPTS))
        engine.collect()
        rollout, version = engine.collect()
        assert version == 2 and same(rollout, sample(model, request(PROMPTS)))
        if at_work := engine.span[1] > handed_over:
            break
    assert at_work


def test_the_end_of_the_process_is_noticed_with_its_last_words(source, model):
    engine = ProcessEngine(beside(source), threads=1, timeout=60.0)
    engine.update(model, 0)
    engine.submit(request([[5] * 8] * 64, 4, max_new_tokens=100, eos_token_id=None))
    os.kill(engine._worker.process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="the sampling process: its process was ended by signal 9"):
        engine.collect()
    with pytest.raises(EngineError, match="has ended"):
        engine.update(model, 1)
    engine.close()


def test_a_late_batch_and_an_unreadable_base_are_errors(source, tmp_path, model):
    with ProcessEngine(beside(source), threads=1, timeout=0.3) as engine:
        engine.update(model, 0)
        pid = engine._worker.process.pid
        os.kill(pid, signal.SIGSTOP)
        engine.submit(request(PROMPTS))
        with pytest.raises(EngineError, match=r"the sampling process: no batch within 0\.3 s"):
            engine.collect()
        assert gone(pid)
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


class Inside(Engine):
    """Holds a copy of the policy in this process and samples when a batch is asked for, as an engine does in the end."""

    def __init__(self, model: ModelConfig, rollout: RolloutConfig) -> None:
        self.model = SharedModel.from_pretrained(model.path, ("policy",), model.lora, model.shared_layers)
        self.done: deque[tuple[Rollout, int]] = deque()
        self.log: list[tuple[str, int]] = []

    def update(self, model: SharedModel, version: int) -> None:
        self.version = version
        self.model.load_state_of("policy", model.state_of("policy"))

    def submit(self, request: Request) -> None:
        self.log.append(("submit", self.version))
        self.done.append((sample(self.model, request), self.version))

    def collect(self) -> tuple[Rollout, int]:
        self.log.append(("collect", self.done[0][1]))
        return self.done.popleft()

    def close(self) -> None:
        self.log.append(("close", len(self.done)))


@pytest.fixture
def inside(monkeypatch) -> list[Inside]:
    """Engines in this process instead of others."""
    made: list[Inside] = []

    def engine_of(model: ModelConfig, rollout: RolloutConfig, *_: object) -> Inside | None:
        made.append(Inside(model, rollout))
        return made[-1]

    monkeypatch.setattr(online, "engine_of", engine_of)
    return made


@pytest.mark.parametrize("staleness", [0, 1, 2, 4, 9])
def test_no_batch_is_older_than_the_bound_and_none_is_asked_for_in_vain(source, tmp_path, inside, staleness):
    train_ppo(of_ppo(source, tmp_path / "run", dataclasses.replace(AHEAD, staleness=staleness)))
    (engine,) = inside
    steps = range(5)
    assert [row["staleness"] for row in numbers(tmp_path / "run")] == [min(staleness, step) for step in steps]
    sampled = [version for what, version in engine.log if what == "submit"]
    assert sampled == [max(0, step - staleness) for step in steps]
    assert [version for what, version in engine.log if what == "collect"] == sampled
    assert engine.log[-1] == ("close", 0)
    # Batches that are under way while a step is trained on.
    ahead, most = 0, 0
    for what, _ in engine.log[:-1]:
        ahead += 1 if what == "submit" else -1
        most = max(most, ahead)
    assert most == min(staleness, 4) + 1


@pytest.mark.parametrize("staleness", [0, 2])
def test_the_batch_that_scores_are_normalised_by_is_the_engine_s(source, tmp_path, inside, monkeypatch, staleness):
    reward = RewardSource(f"{SCORERS}:spread", normalize="reference", workers=0)

    def run(name: str, rollout: RolloutConfig, **changes: object) -> dict[str, float]:
        config = dataclasses.replace(of_ppo(source, tmp_path / name, rollout, **changes), reward=reward)
        train_ppo(config)
        state = CheckpointStore(tmp_path / name / "checkpoints").load_latest().state
        return state["extra"]["rewards"]

    with monkeypatch.context() as patch:
        patch.setattr(online, "engine_of", lambda *_: None)
        expected = run("local", dataclasses.replace(AHEAD, engine="local", staleness=0))
    assert expected["count"] == 8 and expected["m2"] > 0
    monkeypatch.setattr(Sampler, "rollout", lambda *_: pytest.fail("sampled beside the engine"))
    rollout = dataclasses.replace(AHEAD, staleness=staleness)
    assert run("engine", rollout) == expected
    (engine,) = inside
    assert engine.log[:2] == [("submit", 0), ("collect", 0)] and len(engine.log) == 2 * (5 + 1) + 1
    run("engine", rollout, resume=True)
    assert [what for what, _ in inside[1].log] == ["close"], "moments are those of the checkpoint"


def test_the_policy_that_samples_ahead_is_that_of_the_step_before(source, tmp_path, inside):
    """Batch 1 is sampled before the first update: its tokens are those of the untrained policy, whose rollout of it is here."""
    seen: list[list[str]] = []
    config = of_group(source, tmp_path / "run", dataclasses.replace(AHEAD, staleness=1))
    train_group(config, observe=lambda texts: seen.append(texts) or {})
    fresh: list[list[str]] = []
    one = dataclasses.replace(config, run=RunConfig(str(tmp_path / "frozen"), threads=1), optim=OptimConfig(lr=1e-30))
    train_group(one, observe=lambda texts: fresh.append(texts) or {})
    assert seen[:2] == fresh[:2] and seen[2:] != fresh[2:]


@pytest.mark.parametrize("staleness", [1, 3])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_case_27_a_run_resumes_with_what_was_under_way(source, tmp_path, inside, staleness, stop):
    """Also where fewer batches than that were left, and in the middle of the first ones, which share a policy."""
    ahead = dataclasses.replace(AHEAD, staleness=staleness)
    train_ppo(of_ppo(source, tmp_path / "whole", ahead))

    def stops(texts: list[str], calls: list[int] = [0]) -> dict[str, float]:  # noqa: B006
        calls[0] += 1
        if calls[0] == stop + 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        train_ppo(of_ppo(source, tmp_path / "halves", ahead), observe=stops)
    train_ppo(of_ppo(source, tmp_path / "halves", ahead, resume=True))
    assert outcome(tmp_path / "halves") == outcome(tmp_path / "whole")
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "whole")
    first, *_, last = inside
    again = [version for what, version in last.log if what == "submit"]
    assert again == [version for what, version in first.log if what == "submit"][stop:]


def test_an_error_before_the_first_update_of_a_step_leaves_what_a_resume_needs(source, tmp_path, inside, monkeypatch):
    """A step that fails is saved as it was before it, though its engine already has the next policy."""
    ahead = dataclasses.replace(AHEAD, staleness=2)
    train_ppo(of_ppo(source, tmp_path / "whole", ahead))
    collect, calls = Inside.collect, [0]

    def dies(self: Inside) -> tuple[Rollout, int]:
        calls[0] += 1
        if calls[0] == 4:
            raise EngineError("the sampling process: its process was ended by signal 9")
        return collect(self)

    monkeypatch.setattr(Inside, "collect", dies)
    with pytest.raises(EngineError, match="signal 9"):
        train_ppo(of_ppo(source, tmp_path / "halves", ahead, save_every=1000))
    assert steps_of(tmp_path / "halves") == [0, 3]
    train_ppo(of_ppo(source, tmp_path / "halves", ahead, resume=True))
    assert outcome(tmp_path / "halves") == outcome(tmp_path / "whole")


def test_case_27_28_a_killed_run_takes_its_process_along_and_resumes_to_the_same_bits(
    source, tmp_path, inside, monkeypatch
):
    """The whole run has its engine inside: that both are the same is seen on the way."""
    train_ppo(of_ppo(source, tmp_path / "whole"))
    monkeypatch.undo()

    def killed() -> None:
        found = online.engine_of

        def engine_of(*settings: object) -> Engine | None:
            engine = found(*settings)
            (tmp_path / "pid").write_text(str(engine._worker.process.pid))
            return engine

        online.engine_of = engine_of
        train_ppo(of_ppo(source, tmp_path / "killed", save_every=2))

    assert child(killed, "train.step:13") == -signal.SIGKILL  # in the fourth step
    assert steps_of(tmp_path / "killed") == [0, 2]
    train_ppo(of_ppo(source, tmp_path / "killed", save_every=2, resume=True))
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert gone(int((tmp_path / "pid").read_text()))


def test_two_ranks_with_a_process_each_train_like_one(source, tmp_path, inside, monkeypatch):
    update = GroupUpdateConfig(minibatch_size=12, micro_batch_size=2)
    rollout = dataclasses.replace(AHEAD, batch_size=12)  # three prompts: two for a rank, one for the other
    config = lambda name: dataclasses.replace(
        of_group(source, tmp_path / name, rollout), group=update, optim=OptimConfig(lr=1e-3)
    )
    train_group(config("one"))
    monkeypatch.undo()
    ranks = start(lambda rank: train_group(config("two")), tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.words(0) + ranks.words(1)
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert len(one) == len(two) == 5
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    assert [row["staleness"] for row in two] == [0.0, 1.0, 1.0, 1.0, 1.0]
