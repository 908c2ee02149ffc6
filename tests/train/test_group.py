from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models import letter_tokenizer, save_tiny, tiny_llama
from runs import Updates

from rlhf_fast import _allocator, _buffers, group_advantages
from rlhf_fast.config import (
    GROUP_ADVANTAGES,
    ConfigError,
    GroupConfig,
    GroupKLConfig,
    GroupUpdateConfig,
    ModelConfig,
    OptimConfig,
    PromptDataConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    load_config,
    to_yaml,
)
from rlhf_fast.losses import RECIPES
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.train import online
from rlhf_fast.train.group import Trainer, train_group
from rlhf_fast.train.rewards import Rewards

SCORE = f"{Path(__file__).parent / 'scorers.py'}:count_e"
OURS = sorted(name for name, recipe in RECIPES.items() if recipe.advantages in GROUP_ADVANTAGES)


def group_config(folder: Path, **changes: object) -> GroupConfig:
    base = GroupConfig(
        model=ModelConfig(str(folder / "model"), dtype="float32", shared_layers=1, lora=LoraConfig(r=4, alpha=8.0)),
        data=PromptDataConfig(str(folder / "prompts.jsonl")),
        run=RunConfig(str(folder / "run"), save_every=2, sample_every=0),
        reward=RewardSource(source=SCORE),
        optim=OptimConfig(lr=3e-2, schedule="constant"),
        rollout=RolloutConfig(batch_size=16, max_new_tokens=8),
        group_size=4,
        group=GroupUpdateConfig(minibatch_size=16, micro_batch_size=4),
        steps=4,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    prompts = ["the film", "a story of", "we saw", "it was", "this"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return tmp_path


def make(folder: Path, **changes: object) -> tuple[Trainer, SharedModel]:
    config = group_config(folder, **changes)
    roles = ("policy", "reference") if config.kl.used else ("policy",)
    model = SharedModel(tiny_llama(), roles=roles, lora=config.model.lora, shared_layers=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.parameters_of("policy").items():
            if "lora_B" in name:
                p.normal_(0, 0.2, generator=generator)
    return Trainer(config, model, letter_tokenizer(), Rewards(config.reward)), model


def experience(trainer: Trainer):
    prompts = [trainer.tokenizer(p, add_special_tokens=False).input_ids for p in ("the film", "we saw", "this", "it")]
    return trainer.score(trainer.rollout(prompts, torch.Generator().manual_seed(0)))


def gradients(folder: Path, e=None, **changes: object):
    trainer, model = make(folder, **changes)
    e = experience(trainer) if e is None else e
    updates = Updates(model)
    metrics = trainer.update(updates, e, torch.Generator().manual_seed(1))
    return e, metrics, updates.seen


def test_completions_of_a_prompt_lie_side_by_side(folder):
    trainer, _ = make(folder)
    e = experience(trainer)
    assert len(e.scores) == 16
    texts = trainer.prompt_texts(e.rollout)
    assert [texts[i * 4 : i * 4 + 4] for i in range(4)] == [[p] * 4 for p in ("the film", "we saw", "this", "it")]
    groups = torch.arange(16) // 4
    assert torch.equal(trainer.advantages(e), group_advantages(e.scores, groups, "grpo"))


def test_the_kl_of_an_update_is_a_mean_over_its_tokens_in_micro_batches_of_any_size(folder):
    found = []
    for size in (16, 4, 1):
        update = GroupUpdateConfig(minibatch_size=16, micro_batch_size=size)
        found.append(gradients(folder, kl=GroupKLConfig(coef=0.1), group=update)[1])
    for metrics in found[1:]:
        assert metrics["group/kl"] == pytest.approx(found[0]["group/kl"], rel=1e-4) and metrics["group/kl"] > 0


def test_the_gradient_of_grpo_is_that_of_plain_pytorch(folder):
    e, metrics, (found,) = gradients(folder, kl=GroupKLConfig(coef=0.1))
    _, model = make(folder, kl=GroupKLConfig(coef=0.1))
    rollout, P = e.rollout, e.rollout.prompt_length
    groups = e.scores.view(4, 4)
    each = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).flatten()
    each = each.where(groups.std(1).gt(0).repeat_interleave(4), 0.0)
    out = model(rollout.input_ids, rollout.attention_mask, roles=("policy", "reference"))
    logprobs, ref = (
        out[role].logits[:, P - 1 : -1].log_softmax(-1).gather(-1, rollout.responses[..., None]).squeeze(-1)
        for role in ("policy", "reference")
    )
    ratio = (logprobs - logprobs.detach()).exp()
    d = ref.detach() - logprobs
    per_token = -ratio * each[:, None] + 0.1 * (d.exp() - 1 - d)
    mask = e.mask.float()
    loss = ((per_token * mask).sum(1) / mask.sum(1)).mean()
    loss.backward()
    assert metrics["group/loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, p in model.parameters_of("policy").items():
        torch.testing.assert_close(found[name], p.grad, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("recipe", OURS)
def test_micro_batches_of_any_size_add_up_for_every_recipe(folder, recipe):
    whole = GroupUpdateConfig(recipe, minibatch_size=16, micro_batch_size=16, entropy_coef=0.01)
    kl = GroupKLConfig(coef=0.05)
    e, metrics, (expected,) = gradients(folder, group=whole, kl=kl)
    assert any(g.abs().max() > 0 for g in expected.values())
    if RECIPES[recipe].local:
        return  # its denominator is the batch at hand by definition
    _, parts, (found,) = gradients(folder, e, group=dataclasses.replace(whole, micro_batch_size=3), kl=kl)
    assert parts["group/loss"] == pytest.approx(metrics["group/loss"], abs=1e-5)
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("recipe", ["rloo", "reinforce++"])
def test_a_kl_in_the_reward_moves_the_advantages_and_not_the_loss(folder, recipe):
    update = GroupUpdateConfig(recipe, minibatch_size=16, micro_batch_size=16)
    trainer, _ = make(folder, group=update, kl=GroupKLConfig(coef=0.5))
    e = experience(trainer)
    with_kl = trainer.advantages(e)
    trainer.controller.coef = 0.0
    without = trainer.advantages(e)
    assert (with_kl - without).abs().max() > 1e-3
    if recipe == "rloo":
        scores = e.scores - 0.5 * e.kl_per_sequence()
        assert torch.allclose(with_kl, group_advantages(scores, torch.arange(16) // 4, "rloo"), atol=1e-5)


def test_a_completion_without_a_score_is_no_ones_baseline(folder):
    trainer, _ = make(folder)
    e = experience(trainer)
    e.mask[5] = False
    e.scores[5] = 1e6
    each = trainer.advantages(e)
    alone = e.scores[[4, 6, 7]]
    expected = (alone - alone.mean()) / (alone.std() + 1e-6) if alone.std() > 0 else torch.zeros(3)
    assert each[5] == 0
    torch.testing.assert_close(each[[4, 6, 7]], expected)


def test_without_a_kl_there_is_no_reference(folder):
    e, metrics, _ = gradients(folder)
    assert e.ref_logprobs is None and "kl" not in metrics
    _, metrics, _ = gradients(folder, kl=GroupKLConfig(kind="adaptive", coef=0.1))
    assert metrics["kl"] > 0 and metrics["kl_coef"] == pytest.approx(0.1)


def test_one_update_per_batch_needs_no_scoring_pass_and_has_the_same_gradient(folder, monkeypatch):
    """The ratio of the first update is 1 whatever the log-probs from before it are, so those of the rollout do for what is logged."""
    calls = []
    plain = SharedModel.forward
    monkeypatch.setattr(SharedModel, "forward", lambda self, *a, **k: calls.append(k["roles"]) or plain(self, *a, **k))
    once = GroupUpdateConfig(minibatch_size=16, micro_batch_size=16)
    e, metrics, (found,) = gradients(folder, group=once)
    assert calls == [("policy",)], "the update alone"
    twice, _ = make(folder, group=dataclasses.replace(once, epochs=2))
    scored = experience(twice)
    torch.testing.assert_close(e.logprobs, scored.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(e.entropy, scored.entropy, atol=1e-4, rtol=1e-4)
    assert not twice.on_policy
    _, expected_metrics, seen = gradients(folder, scored, group=dataclasses.replace(once, epochs=2))
    assert metrics["score"] == expected_metrics["score"]
    for name, g in found.items():
        torch.testing.assert_close(g, seen[0][name], atol=1e-5, rtol=1e-3)
    for changes in (
        {"rollout": RolloutConfig(batch_size=16, max_new_tokens=8, min_new_tokens=2)},
        {"group": GroupUpdateConfig(minibatch_size=8, micro_batch_size=4)},
        {"group": GroupUpdateConfig("rloo", minibatch_size=16), "kl": GroupKLConfig(coef=0.1)},
        {"group": GroupUpdateConfig("kl_cov", minibatch_size=16)},
    ):
        assert not make(folder, **changes)[0].on_policy


def greedy_texts(trainer: Trainer, model: SharedModel) -> list[str]:
    """Most likely completions of the prompts of `experience`, token by token in plain PyTorch."""
    texts = []
    for prompt in ("the film", "we saw", "this", "it"):
        ids = trainer.tokenizer(prompt, add_special_tokens=False).input_ids
        start = len(ids)
        while len(ids) < start + 8 and (len(ids) == start or ids[-1] != trainer.tokenizer.eos_token_id):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), roles=("policy",)).policy.logits[0, -1].argmax()))
        texts.append(trainer.tokenizer.decode(ids[start:], skip_special_tokens=True))
    return texts


def test_what_an_update_left_behind_goes_back_before_weights_are_packed(folder, monkeypatch):
    trainer, _ = make(folder)
    order: list[str] = []
    sample = online.sample
    monkeypatch.setattr(_allocator, "trim", lambda: order.append("trim"))
    monkeypatch.setattr(online, "sample", lambda *args: order.append("sample") or sample(*args))
    experience(trainer)
    assert order == ["trim", "sample"]


@pytest.mark.parametrize("size", [4, 1])
def test_remax_compares_with_the_greedy_completion(folder, monkeypatch, size):
    update = GroupUpdateConfig("remax", minibatch_size=4 * size, micro_batch_size=4)
    reward = RewardSource(SCORE, workers=0, normalize="running")
    rollout = RolloutConfig(batch_size=4 * size, max_new_tokens=8, temperature=1.7)
    trainer, model = make(folder, group=update, reward=reward, group_size=size, rollout=rollout)
    e = experience(trainer)
    moments, batch = trainer.rewards.get(), e.rollout.input_ids.clone()
    released: list[bool] = []
    monkeypatch.setattr(_buffers, "release", lambda: released.append(True))
    greedy = trainer.greedy_scores(e)
    assert released == [True], "what it packed goes back before the update"
    expected = trainer.rewards.normalized(torch.tensor([float(t.count("e")) for t in greedy_texts(trainer, model)]))
    torch.testing.assert_close(greedy, expected)
    assert trainer.rewards.get() == moments and torch.equal(e.rollout.input_ids, batch)
    each = trainer.advantages(e, greedy)
    torch.testing.assert_close(each, e.scores - greedy.repeat_interleave(size))
    assert each.any() and not torch.equal(each, e.scores)
    metrics = trainer.update(Updates(model), e, torch.Generator().manual_seed(1))
    assert metrics["group/greedy_score"] == pytest.approx(float(greedy.mean()))
    # REINFORCE with that baseline: sums over tokens, means over completions.
    P = e.rollout.prompt_length
    logits = model(e.rollout.input_ids, e.rollout.attention_mask, roles=("policy",)).policy.logits[:, P - 1 : -1] / 1.7
    logprobs = logits.log_softmax(-1).gather(-1, e.rollout.responses[..., None]).squeeze(-1)
    loss = -(logprobs * each[:, None] * e.mask).sum(1).mean()
    assert metrics["group/loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)


def test_remax_leaves_out_the_prompts_whose_greedy_completion_has_no_score(folder):
    trainer, _ = make(folder, group=GroupUpdateConfig("remax", minibatch_size=16, micro_batch_size=4))
    e = experience(trainer)
    greedy = trainer.greedy_scores(e)
    greedy[1] = float("nan")
    e.scores += 7.0
    each = trainer.advantages(e, greedy)
    assert not each[4:8].any() and each[:4].all()
    torch.testing.assert_close(each[8:], (e.scores - greedy.repeat_interleave(4))[8:])


def test_remax_scores_the_greedy_completion_by_the_reward_role(folder):
    config = group_config(
        folder, group=GroupUpdateConfig("remax", minibatch_size=16, micro_batch_size=3), reward=RewardSource("adapter")
    )
    model = SharedModel(tiny_llama(), roles=("policy", "reward"), lora=config.model.lora, shared_layers=1)
    trainer = Trainer(config, model, letter_tokenizer(), Rewards(config.reward))
    found = trainer.greedy_scores(experience(trainer))
    for score, prompt, text in zip(
        found, ("the film", "we saw", "this", "it"), greedy_texts(trainer, model), strict=True
    ):
        ids = trainer.tokenizer(prompt + text, add_special_tokens=False).input_ids
        ended = len(trainer.tokenizer(text, add_special_tokens=False).input_ids) < 8
        ids = torch.tensor([ids + [trainer.tokenizer.eos_token_id] * ended])
        with torch.no_grad():
            assert float(score) == pytest.approx(float(model(ids, roles=("reward",)).reward.scores), rel=1e-4, abs=1e-5)


def test_training_raises_the_score_and_resumes(folder):
    config = group_config(folder, steps=12, kl=GroupKLConfig(coef=0.01))
    adapter = train_group(config)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [line["score"] for line in lines if "score" in line]
    assert len(scores) == 12 and sum(scores[-3:]) > sum(scores[:3])
    assert (adapter / "adapter_model.safetensors").is_file()
    with pytest.raises(Exception, match=r"resume|overwrite"):
        train_group(config)


BAD = {
    "recipe": (["--group.recipe", "grpoo"], "grpo"),
    "critic": (["--group.recipe", "ppo"], "critic"),
    "advantages": (["--group.advantages", "gae"], "advantages"),
    "size": (["--group-size", "5"], "divisor"),
    "clip": (["--group.recipe", "gpg", "--group.clip", "0.1", "0.1"], "clip"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_are_refused(folder, case):
    overrides, message = BAD[case]
    file = folder / "settings.yaml"
    file.write_text(to_yaml(group_config(folder)))
    with pytest.raises(ConfigError, match=message):
        load_config(GroupConfig, file, overrides, allow_code=True)
