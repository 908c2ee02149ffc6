"""Completions without a score, and completions of unusual ends: what PPO and the group advantages make of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from models import letter_tokenizer, tiny_llama
from torch import Tensor

from rlhf_fast import group_advantages
from rlhf_fast.config import (
    KLConfig,
    ModelConfig,
    PPOConfig,
    PPOUpdateConfig,
    PromptDataConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
)
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.rollout import Rollout
from rlhf_fast.train.ppo import Experience, Trainer
from rlhf_fast.train.rewards import Rewards

SCORERS = Path(__file__).parent / "scorers.py"
PAD, EOS = 0, 1
PROMPT = [10, 11, 12]


def rollout_of(completions: list[list[int]], finished: list[bool]) -> Rollout:
    """Completions after the same prompt, right-padded."""
    width = max(map(len, completions))
    mask = torch.tensor([[i < len(c) for i in range(width)] for c in completions])
    responses = torch.tensor([[*c, *[PAD] * (width - len(c))] for c in completions])
    prompts = torch.tensor([PROMPT] * len(completions))
    ids = torch.cat([prompts, responses], dim=1)
    return Rollout(
        ids, torch.cat([torch.ones_like(prompts, dtype=torch.bool), mask], dim=1), mask, torch.tensor(finished)
    )


def trainer_of(function: str = "count_e", roles: tuple[str, ...] = ("policy", "reference", "value"), **rollout: object):
    config = PPOConfig(
        model=ModelConfig("model"),
        data=PromptDataConfig("data"),
        run=RunConfig("run"),
        reward=RewardSource(f"{SCORERS}:{function}", workers=0, max_unscorable=1.0),
        rollout=RolloutConfig(batch_size=16, **rollout),
        kl=KLConfig(kind="adaptive", coef=0.1, horizon=100.0),
        ppo=PPOUpdateConfig(epochs=1, minibatch_size=16, micro_batch_size=16, value_coef=0.5),
    )
    model = SharedModel(tiny_llama(), roles=roles, lora=LoraConfig(r=4, alpha=8.0))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for role in ("policy", "value"):
            for name, p in model.parameters_of(role).items():
                if "lora_B" in name or name == "score.weight":
                    p.normal_(0, 0.2, generator=generator)
    return Trainer(config, model, letter_tokenizer(), Rewards(config.reward))


class Gradients:
    """Stands in for a Run: keeps the gradient and takes no step."""

    def __init__(self, trainer: Trainer) -> None:
        self.model, self.found = trainer.model, {}

    def update(self, loss: float) -> float:
        for role in ("policy", "value"):
            self.found |= {f"{role}.{n}": p.grad for n, p in self.model.parameters_of(role).items()}
        self.model.zero_grad()
        return 0.0


def gradient(trainer: Trainer, e: Experience) -> tuple[dict[str, Tensor], dict[str, float]]:
    run = Gradients(trainer)
    metrics = trainer.update(run, e, torch.Generator().manual_seed(0))
    return {n: g for n, g in run.found.items() if g is not None}, metrics


def only(e: Experience, rows: list[int]) -> Experience:
    """The experience of some of its completions."""
    pick = lambda x: x[rows] if isinstance(x, Tensor) else x
    fields = {f.name: getattr(e, f.name) for f in dataclasses.fields(e)}
    parts = (getattr(e.rollout, f.name) for f in dataclasses.fields(Rollout))
    rollout = Rollout(*(None if x is None else x[rows] for x in parts))
    return Experience(**{**{name: pick(x) for name, x in fields.items()}, "rollout": rollout})


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0 and got.keys() == expected.keys()
    for name, g in expected.items():
        assert float((got[name] - g).abs().max()) <= 1e-5 * scale, name


WORDS = [[6, 7, 8, EOS], [9, 6, EOS], [6, 6, 13, 14, 15], [20, 21, EOS], [6, EOS], [22, 23, 24, 6, EOS]]


def test_case_47_a_batch_with_unscorable_completions_is_the_smaller_batch():
    trainer = trainer_of("skip_first")
    e = trainer.score(rollout_of(WORDS, [True, True, False, True, True, True]))
    assert e.raw_scores.isnan().tolist() == [True] + [False] * 5
    kept = [1, 2, 3, 4, 5]
    got, metrics = gradient(trainer, e)
    steered = trainer.controller.coef
    again = trainer_of("skip_first")
    expected, smaller = gradient(again, only(e, kept))
    assert_same(got, expected)
    assert steered == again.controller.coef != trainer.config.kl.coef
    for name in ("kl", "score", "ppo/loss", "ppo/approx_kl", "ppo/explained_variance"):
        assert metrics[name] == pytest.approx(smaller[name], rel=1e-4, abs=1e-7), name
    assert metrics["unscorable"] == 1.0


def test_case_47_a_batch_without_any_score_moves_nothing():
    trainer = trainer_of("result")
    completions = [letter_tokenizer()("none", add_special_tokens=False).input_ids] * 3
    e = trainer.score(rollout_of(completions, [False] * 3))
    assert e.raw_scores.isnan().all() and not e.mask.any()
    found, metrics = gradient(trainer, e)
    assert all(not g.any() for g in found.values()) and metrics["kl"] == 0.0 and metrics["unscorable"] == 3.0
    assert trainer.controller.coef == trainer.config.kl.coef


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "opo"])
def test_case_47_a_group_without_any_score_is_dropped_and_leaves_the_others_alone(kind):
    scores = torch.tensor([1.0, 2.0, 4.0, float("nan"), float("nan"), 3.0, float("nan"), 7.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    mask, options = ~scores.isnan(), {"kind": kind}
    if kind == "opo":
        options["lengths"] = torch.tensor([3, 4, 5, 6, 7, 8, 9, 2])
    found = group_advantages(scores, groups, mask=mask, **options)
    if kind == "opo":
        options["lengths"] = options["lengths"][mask]
    expected = group_advantages(scores[mask], groups[mask], **options)
    assert torch.equal(found[mask], expected) and not found[~mask].any() and expected.any()


ENDS = {
    "only EOS": ([EOS], True),
    "only special tokens": ([PAD, PAD, EOS], True),
    "never EOS": ([6, 7, 8, 9, 10], False),
    "usual": ([6, 7, EOS], True),
    "empty": ([], True),  # the sampler of this package never gives one, a server may
}


@pytest.mark.parametrize("missing_eos", ["none", "replace", "subtract"])
@pytest.mark.parametrize("learned", [False, True])
def test_case_49_every_way_a_completion_can_end_has_a_length_a_mask_and_a_reward(learned, missing_eos):
    roles = ("policy", "reference", "value", "reward") if learned else ("policy", "reference", "value")
    trainer = trainer_of(roles=roles, missing_eos=missing_eos, missing_eos_penalty=2.0)
    if learned:
        trainer.rewards.adapter = "adapter"
        trainer.rewards.config = RewardSource("adapter")
    rollout = rollout_of([ids for ids, _ in ENDS.values()], [done for _, done in ENDS.values()])
    assert rollout.texts(trainer.tokenizer) == ["", "", "efghi", "ef", ""]
    e = trainer.score(rollout)
    assert e.mask.sum(1).tolist() == [1, 3, 5, 3, 0] and torch.equal(e.mask, rollout.response_mask)
    assert not e.logprobs[~e.mask].any() and bool((e.logprobs[e.mask] < 0).all())
    if not learned:
        assert e.raw_scores.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    penalty = {"none": e.raw_scores[2], "replace": torch.tensor(-2.0), "subtract": e.raw_scores[2] - 2.0}[missing_eos]
    assert e.scores.isfinite().all() and e.scores[2] == penalty
    assert torch.equal(e.scores[[0, 1, 3, 4]], e.raw_scores[[0, 1, 3, 4]])
    got, metrics = gradient(trainer, e)
    assert all(g.isfinite().all() for g in got.values()) and metrics["finished"] == pytest.approx(0.8)
    trainer.controller.coef = trainer.config.kl.coef
    assert_same(got, gradient(trainer, only(e, [0, 1, 2, 3]))[0])  # without tokens there is nothing to learn
