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
from checkpoints import child
from models import letter_tokenizer, save_tiny, tiny_llama
from processes import gone
from ranks_of import start
from runs import SCORERS, TEXTS, numbers, outcome, write_lines
from runs import steps as steps_of

from rlhf_fast import advantages, policy_loss
from rlhf_fast.config import (
    ConfigError,
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
    validate,
)
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.rollout import Engine, EngineError, Request, Rollout, sample
from rlhf_fast.rollout.process import ProcessEngine
from rlhf_fast.train import online
from rlhf_fast.train.group import Trainer as GroupTrainer
from rlhf_fast.train.group import train_group
from rlhf_fast.train.online import Sampler
from rlhf_fast.train.ppo import Trainer as PPOTrainer
from rlhf_fast.train.ppo import train_ppo
from rlhf_fast.train.rewards import Rewards

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


def beside(source: Path) -> ModelConfig:
    """With a fold, and an adapter that no pipe holds."""
    return settings(source, fold=(str(source / "fold"),), lora=LoraConfig(r=256, alpha=8.0))


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


def trainer_of(kind: str, source: Path, **changes: object) -> tuple[Sampler, SharedModel]:
    """A trainer whose adapters do something, with one update for a batch."""
    rollout = dataclasses.replace(AHEAD, temperature=0.7, **changes)
    config, trainer, roles = {
        "ppo": (of_ppo(source, source / "run", rollout), PPOTrainer, ("policy", "reference", "value")),
        "grpo": (of_group(source, source / "run", rollout), GroupTrainer, ("policy", "reference")),
    }[kind]
    if kind == "ppo":
        config = dataclasses.replace(config, ppo=PPOUpdateConfig(epochs=1, minibatch_size=8, micro_batch_size=3))
    model = disturb(SharedModel(tiny_llama(), roles, LoraConfig(r=2, alpha=8.0), 1), 1)
    return trainer(config, model, letter_tokenizer(), Rewards(config.reward)), model


class Updates:
    """Stands in for a Run: keeps the gradients of the policy."""

    def __init__(self, model: SharedModel) -> None:
        self.model, self.gradients = model, {}

    def update(self, loss: float) -> float:
        self.gradients = {n: p.grad.clone() for n, p in self.model.parameters_of("policy").items()}
        self.model.zero_grad()
        return 0.0


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("correction", [None, "token", "sequence-mis", "none"])
def test_an_older_policys_tokens_are_weighted_as_in_plain_pytorch(source, kind, correction):
    trainer, model = trainer_of(kind, source, correction=correction)
    prompts = [trainer.tokenizer(p, add_special_tokens=False).input_ids for p in ("the film", "we saw", "this", "it")]
    prompts = prompts * 2 if kind == "ppo" else prompts[:2]
    rollout = trainer.rollout(prompts, torch.Generator().manual_seed(0))
    disturb(model, 2)  # what trains is another policy now
    e = dataclasses.replace(trainer.score(rollout), scores=torch.tensor([3.0, 1.0, 0.0, 2.0, 5.0, 1.0, 1.0, 4.0]))
    updates, coef = Updates(model), trainer.controller.coef
    metrics = trainer.update(updates, e, torch.Generator().manual_seed(1))

    out, P = model(rollout.input_ids, rollout.attention_mask, roles=("policy", "reference")), rollout.prompt_length
    of = lambda role: (
        (out[role].logits[:, P - 1 : -1] / 0.7).log_softmax(-1).gather(-1, rollout.responses[..., None]).squeeze(-1)
    )
    logprobs, mask = of("policy"), rollout.response_mask
    proximal, behaviour = logprobs.detach(), rollout.logprobs
    ratio = (proximal - behaviour).exp()
    assert float((ratio - 1).abs()[mask].max()) > 0.1
    product = (proximal - behaviour).where(mask, 0.0).sum(1, keepdim=True).exp().expand_as(ratio)
    weights = {
        None: ratio.clamp(max=2.0),
        "token": ratio,
        "sequence-mis": product.where(product <= 3.0, 0.0),
        "none": torch.ones_like(ratio),
    }[correction]
    if kind == "ppo":
        each = advantages(
            e.scores, e.values, mask, logprobs=e.logprobs, ref_logprobs=e.ref_logprobs,
            kl_coef=coef, gamma=1.0, lam=0.95, whiten=True, truncated=~rollout.finished,
        ).advantages  # fmt: skip
        loss = -((logprobs - proximal).exp() * each * weights)[mask].sum() / mask.sum()
    else:
        d = of("reference").detach() - logprobs
        loss = (
            -(logprobs - proximal).exp() * trainer.advantages(e)[:, None] * weights + 0.05 * (d.exp() - 1 - d)
        ) * mask
        loss = (loss.sum(1) / mask.sum(1)).mean()
    loss.backward()
    wanted = {n: p.grad for n, p in model.parameters_of("policy").items()}
    for name, gradient in updates.gradients.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4 * scale + 1e-8)
    if correction == "none":
        assert not any(name.startswith("correction/") for name in metrics)
    else:
        assert metrics["correction/weight_max"] == pytest.approx(float(weights[mask].max()), rel=1e-4)
        assert metrics["correction/weight_mean"] == pytest.approx(float(weights[mask].mean()), rel=1e-4)
        assert 0 < metrics["correction/effective_samples"] < 1


def test_what_another_policy_sampled_is_scored_again(source):
    trainer, _ = trainer_of("grpo", source)
    assert not trainer.on_policy and trainer.correction == "token-tis"
    trainer, _ = trainer_of("grpo", source, staleness=0)
    assert trainer.on_policy and trainer.correction is None
    elsewhere = ProcessConfig(device="cuda")
    trainer, _ = trainer_of("grpo", source, staleness=0, process=elsewhere)
    assert not trainer.on_policy and trainer.correction == "token-tis"


def test_a_recipe_with_a_correction_of_its_own_keeps_it(source):
    config = of_group(source, source / "run")
    recipe = dataclasses.replace(config.group, recipe="decoupled_ppo", advantages="grpo")
    for correction, expected in ((None, "token"), ("none", None), ("token-mis", "token-mis")):
        rollout = dataclasses.replace(config.rollout, correction=correction)
        changed = dataclasses.replace(config, group=recipe, rollout=rollout)
        model = SharedModel(tiny_llama(), ("policy", "reference"), LoraConfig(r=2), 1)
        assert GroupTrainer(changed, model, letter_tokenizer(), Rewards(config.reward)).correction == expected


def test_a_ratio_over_the_policy_that_sampled_needs_no_weights(source):
    config = of_group(source, source / "run")
    update = dataclasses.replace(config.group, recipe="vespo")
    with pytest.raises(ValueError, match=r"rollout.correction' got token-tis, expected none .* recipe = vespo"):
        dataclasses.replace(config, group=update, rollout=dataclasses.replace(config.rollout, correction="token-tis"))
    model = disturb(SharedModel(tiny_llama(), ("policy", "reference"), LoraConfig(r=2, alpha=8.0), 1), 1)
    config = dataclasses.replace(config, group=update, kl=GroupKLConfig())
    trainer = GroupTrainer(config, model, letter_tokenizer(), Rewards(config.reward))
    rollout = trainer.rollout([[5, 6, 7], [9]], torch.Generator().manual_seed(0))
    disturb(model, 2)
    e = dataclasses.replace(trainer.score(rollout), scores=torch.tensor([3.0, 1.0, 0.0, 2.0, 5.0, 1.0, 1.0, 4.0]))
    assert e.correction is None
    updates = Updates(model)
    trainer.update(updates, e, torch.Generator().manual_seed(1))
    out, P = model(rollout.input_ids, rollout.attention_mask, roles=("policy",)), rollout.prompt_length
    logits = out.policy.logits[:, P - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(-1, rollout.responses[..., None]).squeeze(-1)
    policy_loss("vespo", logprobs, rollout.logprobs, trainer.advantages(e), rollout.response_mask).loss.backward()
    for name, p in model.parameters_of("policy").items():
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(updates.gradients[name], p.grad, rtol=1e-3, atol=1e-4 * scale + 1e-8)
    assert any(float(p.grad.abs().max()) > 1e-3 for p in model.parameters_of("policy").values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "local"}, "staleness.*got 1.*engine = local"),
        ({"correction": "tis"}, "correction.*'tis'.*token-tis"),
        ({"staleness": -1}, "staleness"),
        ({"engine": "elsewhere"}, "engine"),
    ],
)
def test_settings_of_an_engine_that_cannot_be(changes, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        validate(dataclasses.replace(AHEAD, **changes))
