from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from models import letter_tokenizer, save_tiny, tiny_llama
from runs import SCORERS, numbers, write_lines

from rlhf_fast import advantages
from rlhf_fast.config import (
    ConfigError,
    GroupConfig,
    GroupUpdateConfig,
    KLConfig,
    ModelConfig,
    OnlineDPOConfig,
    OptimConfig,
    PPOConfig,
    PPOUpdateConfig,
    PromptDataConfig,
    RaftConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    load_config,
    to_yaml,
)
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.rewards import ContractError, RewardError, split_steps, step_ends
from rlhf_fast.rollout import Rollout
from rlhf_fast.train import group, ppo
from rlhf_fast.train.rewards import Rewards

WORDS = ["the. e. a", "ee", "e.. .e.", "z. e.", "a.b.c.d"]
STEPS = [["the.", " e.", " a"], ["ee"], ["e.", ". .e."], ["z.", " e."], ["a.", "b.", "c.", "d"]]


def spec(name: str) -> str:
    return f"{SCORERS}:{name}"


@pytest.mark.parametrize(
    ("text", "separator", "steps"),
    [
        ("one\n\ntwo\n\nthree", "\n\n", ["one\n\n", "two\n\n", "three"]),
        ("one\n\ntwo\n\n", "\n\n", ["one\n\n", "two\n\n"]),
        ("\n\none\n\n \n\ntwo", "\n\n", ["\n\none\n\n", " \n\ntwo"]),  # white space is no step
        ("one\n\n\n\n ", "\n\n", ["one\n\n\n\n "]),
        ("one", "\n", ["one"]),
        ("", "\n", [""]),
        (" \n\n", "\n", [" \n\n"]),
        *zip(WORDS, ["."] * 5, STEPS, strict=True),
    ],
)
def test_steps_end_with_the_separator_and_make_up_the_text(text, separator, steps):
    assert split_steps(text, separator) == steps and "".join(steps) == text


@pytest.mark.parametrize(
    ("tokens", "steps", "ends"),
    [
        (
            ["a", ".", "b", ".", "<eos>"],
            ["a.", "b."],
            [1, 4],
        ),  # the last step ends with the last token, whatever that is
        (["a.", "b.c", ".", "d"], ["a.", "b.", "c.", "d"], [0, 1, 2, 3]),
        (["a.b.c", "."], ["a.", "b.", "c."], [0, 0, 1]),  # two steps end within one token
        (["<eos>"], [""], [0]),
        (["x", "<eos>", "."], ["x."], [2]),
    ],
)
def test_a_step_ends_at_the_token_that_completes_it(tokens, steps, ends):
    decode = lambda ids: "".join(tokens[i] for i in ids if tokens[i] != "<eos>")
    assert step_ends(range(len(tokens)), steps, decode) == ends


def test_a_token_that_is_part_of_a_character_ends_no_step():
    raw = "é.ü.x".encode()
    decode = lambda ids: bytes(raw[i] for i in ids).decode(errors="replace")
    assert step_ends(range(len(raw)), ["é.", "ü.", "x"], decode) == [2, 5, 6]


@pytest.mark.parametrize("workers", [0, 2])
def test_functions_get_the_steps_and_score_each_of_them(workers):
    source = RewardSource(
        mix={spec("e_per_step"): 2.0, spec("position_of_steps"): 1.0}, workers=workers, max_unscorable=0.5
    )
    with Rewards(source) as rewards:
        scores, raw = rewards(["p"] * 5, STEPS, None)
    nan = math.nan
    expected = torch.tensor([2.0, 3.0, 2.0, 4.0, 2.0, 3.0, nan, nan, 0.0, 1.0, 2.0, 3.0])
    torch.testing.assert_close(raw, expected, equal_nan=True)
    torch.testing.assert_close(scores, raw, equal_nan=True)


def test_moments_are_those_of_the_steps_and_unscorable_completions_are_counted_once():
    source = RewardSource(spec("position_of_steps"), workers=0, normalize="running", max_unscorable=0.2)
    rewards = Rewards(source)
    scores, raw = rewards(["p"] * 5, STEPS, None)
    known = raw[~raw.isnan()]
    assert rewards.count == 10 and rewards.mean == pytest.approx(known.double().mean().item())
    torch.testing.assert_close(scores, (raw - known.mean()) / known.std(correction=0), equal_nan=True)
    with pytest.raises(RewardError, match="1 of 5 completions have no score"):
        Rewards(dataclasses.replace(source, max_unscorable=0.1))(["p"] * 5, STEPS, None)


GOOD = ("numbers", "arrays", "tuples", "none", "no score of a step")
WRONG = {
    "one number": "scores 0 got a float, expected a list of 3, one for each step",
    "too few": "scores 0 got 2, expected 3, one for each step",
    "text": "scores 0 got a str, expected a list of 3, one for each step",
    "words": "score 0, step 0 got str, expected a number",
    "completion missing": "got 4 scores for 5 completions",
}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_list_of_one_number_for_each_step_is_refused_and_named(workers):
    with Rewards(RewardSource(spec("step_result"), workers=workers, max_unscorable=1.0)) as rewards:
        for case in GOOD:
            raw = rewards([case] * 5, STEPS, None)[1]
            lost = {"none": 12, "no score of a step": 12}.get(case, 0)
            assert int(raw.isnan().sum()) == lost and bool((raw[~raw.isnan()] == 0.5).all()), case
        for case, message in WRONG.items():
            with pytest.raises(ContractError) as caught:
                rewards([case] * 5, STEPS, None)
            assert message in str(caught.value) and "step_result" in str(caught.value)


def test_what_raises_costs_its_completion_with_all_its_steps(tmp_path):
    file = tmp_path / "raises.py"
    file.write_text("def f(prompts, completions):\n    return [[1 / (s != 'd') for s in c] for c in completions]\n")
    raw = Rewards(RewardSource(f"{file}:f", workers=0, max_unscorable=0.2))(["p"] * 5, STEPS, None)[1]
    assert raw.isnan().tolist() == [False] * 8 + [True] * 4


def rollout_of(texts: list[str], finished: list[bool]) -> Rollout:
    """Completions after the same prompt, right-padded."""
    tokenizer = letter_tokenizer()
    rows = [
        tokenizer(t, add_special_tokens=False).input_ids + [1] * end for t, end in zip(texts, finished, strict=True)
    ]
    width = max(map(len, rows))
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    ids = torch.tensor([[10, 11, *row, *[0] * (width - len(row))] for row in rows])
    return Rollout(ids, torch.cat([torch.ones(len(rows), 2, dtype=torch.bool), mask], 1), mask, torch.tensor(finished))


FINISHED = [True, True, False, True, False]


def config_of(folder: Path, reward: RewardSource, **changes: object) -> PPOConfig:
    base = PPOConfig(
        model=ModelConfig(str(folder / "model"), dtype="float32", lora=LoraConfig(r=4, alpha=8.0)),
        data=PromptDataConfig(str(folder / "prompts.jsonl")),
        run=RunConfig(str(folder / "run"), save_every=100, sample_every=0, threads=1),
        reward=reward,
        optim=OptimConfig(lr=2e-2, schedule="constant"),
        rollout=RolloutConfig(batch_size=16, max_new_tokens=12),
        kl=KLConfig(coef=0.05),
        ppo=PPOUpdateConfig(epochs=1, minibatch_size=16, micro_batch_size=2),
        steps=3,
    )
    return dataclasses.replace(base, **changes)


def trainer_of(reward: RewardSource, roles=("policy", "reference", "value"), **changes: object) -> ppo.Trainer:
    config = config_of(Path("."), reward, **changes)
    model = SharedModel(tiny_llama(), roles=roles, lora=config.model.lora)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for role in set(roles) - {"reference"}:
            for name, p in model.parameters_of(role).items():
                if "lora_B" in name or name == "score.weight":
                    p.normal_(0, 0.2, generator=generator)
    return ppo.Trainer(config, model, letter_tokenizer(), Rewards(reward))


SOURCE = RewardSource(spec("position_of_steps"), workers=0, separator=".", max_unscorable=0.5)


@pytest.mark.parametrize("missing_eos", ["none", "subtract", "replace"])
def test_scores_stand_at_the_tokens_that_end_the_steps(missing_eos):
    rollout = RolloutConfig(missing_eos=missing_eos, missing_eos_penalty=5.0)
    trainer = trainer_of(SOURCE, rollout=rollout)
    e = trainer.score(rollout_of(WORDS, FINISHED))
    end = {"none": (1.0, 3.0), "subtract": (-4.0, -2.0), "replace": (-5.0, -5.0)}[missing_eos]
    expected = torch.zeros(e.mask.shape)
    expected[0, 6], expected[0, 9] = 1.0, 2.0  # "the." ends at 3 with 0, " e." at 6, the last step with end-of-sequence
    expected[2, 6] = end[0]
    expected[4, 3], expected[4, 5], expected[4, 6] = 1.0, 2.0, end[1]
    torch.testing.assert_close(e.steps.token_scores, expected)
    assert e.steps.counts.tolist() == [3, 1, 2, 2, 4]
    torch.testing.assert_close(e.scores, expected.sum(1))
    assert e.raw_scores.isnan().tolist() == [False, False, False, True, False] and not e.mask[3].any()
    torch.testing.assert_close(e.raw_scores.nan_to_num(0.0), torch.tensor([3.0, 0.0, 1.0, 0.0, 6.0]))
    metrics = trainer.metrics(e)
    assert (
        metrics["steps"] == pytest.approx(2.4) and metrics["unscorable"] == 1 and metrics["score"] == pytest.approx(2.5)
    )


class Gradients:
    """Stands in for a Run: keeps the gradient and takes no step."""

    def __init__(self, trainer) -> None:
        self.model, self.found = trainer.model, {}

    def update(self, loss: float) -> float:
        for role in self.model.roles:
            if role != "reference":
                self.found |= {f"{role}.{n}": p.grad for n, p in self.model.parameters_of(role).items()}
        self.model.zero_grad()
        return 0.0


def test_the_scan_takes_the_rewards_of_the_steps_and_one_step_is_one_score(monkeypatch):
    seen = []
    monkeypatch.setattr(ppo, "advantages", lambda *a, **k: seen.append(advantages(*a, **k)) or seen[-1])
    trainer = trainer_of(SOURCE)
    e = trainer.score(rollout_of(WORDS, FINISHED))
    metrics = trainer.update(Gradients(trainer), e, torch.Generator().manual_seed(0))
    expected = e.steps.token_scores - 0.05 * (e.logprobs - e.ref_logprobs)
    torch.testing.assert_close(seen[0].rewards, expected.where(e.mask, 0.0))
    kl = ((e.logprobs - e.ref_logprobs) * e.mask).sum(1)
    assert metrics["reward"] == pytest.approx(float((e.scores - 0.05 * kl).mean()), rel=1e-4)

    whole = RewardSource(spec("count_e"), workers=0)
    single = RewardSource(spec("e_per_step"), workers=0, separator="?")  # which no completion has
    results = []
    for source in (whole, single):
        trainer = trainer_of(source)
        run, e = Gradients(trainer), trainer.score(rollout_of(WORDS, FINISHED))
        metrics = trainer.update(run, e, torch.Generator().manual_seed(0))
        metrics.pop("steps", None)
        results.append((metrics, run.found))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert gradient is None or torch.equal(gradient, results[1][1][name])


@pytest.mark.parametrize("packing", [False, True])
def test_an_adapter_is_read_at_the_end_of_each_step(packing):
    """Its score there is the one it gives the completion up to there."""
    trainer = trainer_of(
        RewardSource("adapter", separator="."), ("policy", "reference", "value", "reward"), packing=packing
    )
    rollout = rollout_of(WORDS, FINISHED)
    e = trainer.score(rollout)
    for row, steps in enumerate(STEPS):
        done, length = 0, int(rollout.response_mask[row].sum())
        for k, step in enumerate(steps):
            done += len(step)
            stop = length if k + 1 == len(steps) else done
            with torch.no_grad():
                alone = trainer.model(rollout.input_ids[row : row + 1, : 2 + stop], roles=("reward",)).reward.scores
            assert float(e.steps.token_scores[row, stop - 1]) == pytest.approx(float(alone), rel=1e-4, abs=1e-5)
    assert int((e.steps.token_scores != 0).sum()) == sum(map(len, STEPS))


def test_returns_without_a_critic_take_the_rewards_of_the_steps():
    config = GroupConfig(
        model=ModelConfig("model"), data=PromptDataConfig("data"), run=RunConfig("run"), reward=SOURCE, group_size=1,
        rollout=RolloutConfig(batch_size=64), group=GroupUpdateConfig("reinforce++", minibatch_size=64),
    )  # fmt: skip
    model = SharedModel(tiny_llama(), roles=("policy",), lora=LoraConfig(r=4, alpha=8.0))
    trainer = group.Trainer(config, model, letter_tokenizer(), Rewards(SOURCE))
    e = trainer.score(rollout_of(WORDS, FINISHED))
    each = trainer.advantages(e)
    rest = e.steps.token_scores.flip(1).cumsum(1).flip(1)[e.mask]
    torch.testing.assert_close(each[e.mask], (rest - rest.mean()) / rest.std(), atol=1e-4, rtol=1e-4)


def test_a_run_with_steps(tmp_path):
    save_tiny(tmp_path / "model")
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in ("the film", "a story of", "we saw", "it was")])
    reward = RewardSource(spec("e_per_step"), separator=" ", normalize="running")
    ppo.train_ppo(config_of(tmp_path, reward, steps=10))
    rows = numbers(tmp_path / "run")
    assert all(row["steps"] >= 1 for row in rows) and max(row["steps"] for row in rows) > 1
    assert sum(row["score"] for row in rows[-3:]) > sum(row["score"] for row in rows[:3])


def test_trainers_that_compare_whole_completions_take_no_steps(tmp_path):
    model, data = ["--model.path", "m", "--data.path", "d"], ["--run.output-dir", "r", "--reward.source", "f.py:f"]
    line = [*model, *data, "--reward.separator", "\n\n"]
    assert load_config(PPOConfig, None, line).reward.separator == "\n\n"
    reinforce = [*line, "--group.recipe", "reinforce++"]
    assert load_config(GroupConfig, None, reinforce).reward.separator == "\n\n"
    for kind, arguments, message in (
        (GroupConfig, line, "none with advantages = grpo"),
        (OnlineDPOConfig, line, "whole completions are compared"),
        (RaftConfig, line, "whole completions are compared"),
        (PPOConfig, [*line, "--ppo.dialect", "openrlhf"], "none with dialect = openrlhf"),
        (PPOConfig, [*model, *data, "--reward.separator", ""], "at least 1 character"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(kind, None, arguments)
    file = tmp_path / "settings.yaml"
    file.write_text(to_yaml(load_config(PPOConfig, None, line)))
    assert load_config(PPOConfig, file, [], allow_code=True).reward.separator == "\n\n"
