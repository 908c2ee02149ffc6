"""Updates on what an older policy sampled: its weights, and the settings of an engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from ahead import AHEAD, TRAINERS, disturb, of_group, of_ppo
from models import letter_tokenizer, tiny_llama
from runs import Updates

from rlhf_fast import advantages, policy_loss
from rlhf_fast.config import ConfigError, GroupKLConfig, PPOUpdateConfig, ProcessConfig, validate
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.train.group import Trainer as GroupTrainer
from rlhf_fast.train.online import Sampler
from rlhf_fast.train.ppo import Trainer as PPOTrainer
from rlhf_fast.train.rewards import Rewards


@pytest.fixture
def source(tmp_path) -> Path:
    """Settings name files in it, which nothing here reads."""
    return tmp_path


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
    for name, gradient in updates.seen[-1].items():
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
        torch.testing.assert_close(updates.seen[-1][name], p.grad, rtol=1e-3, atol=1e-4 * scale + 1e-8)
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
