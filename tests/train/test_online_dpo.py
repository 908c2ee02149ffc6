from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from models import letter_tokenizer, save_tiny, tiny_llama
from runs import SCORERS, Updates, numbers, write_lines
from torch.nn.functional import logsigmoid

from rlhf_fast.config import (
    ConfigError,
    ModelConfig,
    OnlineDPOConfig,
    OnlineDPOUpdateConfig,
    OptimConfig,
    PreferenceLossConfig,
    PromptDataConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    load_config,
    to_yaml,
)
from rlhf_fast.data import EncodedPair
from rlhf_fast.data.records import PairRecord
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.preference_kinds import KINDS
from rlhf_fast.train import preference
from rlhf_fast.train.online_dpo import Trainer, best_and_worst, train_online_dpo
from rlhf_fast.train.rewards import Rewards

PROMPTS = ["the film", "a story of", "we saw", "it was", "this"]


def config_of(folder: Path, **changes: object) -> OnlineDPOConfig:
    base = OnlineDPOConfig(
        model=ModelConfig(str(folder / "model"), dtype="float32", shared_layers=1, lora=LoraConfig(r=4, alpha=8.0)),
        data=PromptDataConfig(str(folder / "prompts.jsonl")),
        run=RunConfig(str(folder / "run"), save_every=100, sample_every=0, threads=1),
        reward=RewardSource(f"{SCORERS}:count_e", workers=0),
        optim=OptimConfig(lr=3e-2, schedule="constant"),
        rollout=RolloutConfig(batch_size=16, max_new_tokens=8),
        group_size=4,
        dpo=OnlineDPOUpdateConfig(micro_batch_size=4),
        steps=4,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    return tmp_path


def make(folder: Path, **changes: object) -> tuple[Trainer, SharedModel]:
    config = config_of(folder, **changes)
    roles = ("policy", "reference") if config.loss.needs_reference else ("policy",)
    model = SharedModel(tiny_llama(), roles=roles, lora=config.model.lora, shared_layers=config.model.shared_layers)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.parameters_of("policy").items():
            if "lora_B" in name:
                p.normal_(0, 0.2, generator=generator)
    return Trainer(config, model, letter_tokenizer(), Rewards(config.reward)), model


def experience(trainer: Trainer):
    prompts = [trainer.tokenizer(p, add_special_tokens=False).input_ids for p in PROMPTS[:4]]
    return trainer.score(trainer.rollout(prompts, torch.Generator().manual_seed(0)))


def test_the_best_and_the_worst_of_each_prompt_are_a_pair_and_the_others_are_counted():
    nan = float("nan")
    scores = torch.tensor(
        [[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [nan, 4.0, nan], [nan, 7.0, 8.0], [2.0, 2.0, 1.0], [nan, nan, nan]]
    )
    scored = ~scores.isnan()
    found = best_and_worst(scores.nan_to_num(9e9).flatten(), scored.flatten(), 3)
    assert found.rows.tolist() == [[1, 0], [11, 10], [12, 14]]
    assert (found.ties, found.unscorable) == (1, 2)
    assert best_and_worst(torch.zeros(4), torch.ones(4, dtype=torch.bool), 2).rows.shape == (0, 2)


@pytest.mark.parametrize("packing", [False, True])
def test_the_gradient_is_that_of_dpo_in_plain_pytorch_at_the_temperature(folder, packing):
    rollout = RolloutConfig(batch_size=16, max_new_tokens=8, temperature=0.7)
    trainer, model = make(folder, rollout=rollout, packing=packing)
    e = experience(trainer)
    updates = Updates(model)
    metrics = trainer.update(updates, e, torch.Generator().manual_seed(1))
    groups = e.raw_scores.view(4, 4)
    differs = groups.amax(1) > groups.amin(1)
    assert metrics["pairs"] == differs.sum() > 1 and metrics["pairs/ties"] == (~differs).sum()

    def logprob(role: str, row: int) -> torch.Tensor:
        ids, P = e.rollout.input_ids[row][e.rollout.attention_mask[row]], int(e.rollout.response_mask[row].sum())
        logits = model(ids[None], roles=(role,))[role].logits[0, :-1] / 0.7
        return logits.log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)[-P:].sum()

    losses = []
    for i in differs.nonzero().flatten().tolist():
        won, lost = (4 * i + int(f(groups[i])) for f in (torch.argmax, torch.argmin))
        ratio = lambda row: logprob("policy", row) - logprob("reference", row).detach()
        losses.append(-logsigmoid(0.1 * (ratio(won) - ratio(lost))))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert metrics["dpo/loss"] == pytest.approx(loss.item(), rel=1e-4)
    (found,) = updates.seen
    for name, p in model.parameters_of("policy").items():
        torch.testing.assert_close(found[name], p.grad, atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_that_of_the_trainer_on_pairs(folder, kind):
    smoothing, options = (0.1 if kind == "exo" else 0.0), ({"alpha": 0.5} if kind == "alpha_po" else {})
    loss = PreferenceLossConfig(kind, label_smoothing=smoothing, options=options)
    trainer, model = make(folder, loss=loss, dpo=OnlineDPOUpdateConfig(micro_batch_size=4))
    e = experience(trainer)
    updates = Updates(model)
    metrics = trainer.update(updates, e, torch.Generator().manual_seed(1))
    rows = best_and_worst(e.scores, e.mask.any(1), 4).rows[
        torch.randperm(int(metrics["pairs"]), generator=torch.Generator().manual_seed(1))
    ]
    tokens = lambda row: e.rollout.input_ids[row][e.rollout.attention_mask[row]].tolist()
    length = lambda row: int(e.rollout.attention_mask[row, : e.rollout.prompt_length].sum())
    record = PairRecord("", "", "", "here")
    pairs = [EncodedPair(tokens(won), tokens(lost), length(won), record) for won, lost in rows.tolist()]
    plain = preference.Trainer(loss, model)
    kl = plain.mismatched([(p.chosen_ids, p.prompt_length) for p in pairs], 4)
    expected, shares, _ = plain(pairs, len(pairs), kl)
    expected.backward()
    for name, value in shares.items():
        assert metrics[f"dpo/{name}"] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    size = max(float(p.grad.abs().max()) for p in model.parameters_of("policy").values())
    assert size > 0
    for name, p in model.parameters_of("policy").items():
        torch.testing.assert_close(updates.seen[0][name], p.grad, atol=1e-5 * max(size, 1.0), rtol=2e-3)


@pytest.mark.parametrize("kind", ["dpo", "kto", "simpo"])
def test_micro_batches_add_up_and_epochs_go_through_all_pairs(folder, kind):
    loss, found = PreferenceLossConfig(kind), []
    for size in (4, 1, 3):
        trainer, model = make(folder, loss=loss, dpo=OnlineDPOUpdateConfig(micro_batch_size=size))
        updates = Updates(model)
        metrics = trainer.update(updates, experience(trainer), torch.Generator().manual_seed(1))
        found.append((metrics["dpo/loss"], updates.seen[0]))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], abs=1e-5)
        for name, g in gradient.items():
            torch.testing.assert_close(g, found[0][1][name], atol=1e-5, rtol=1e-3)
    trainer, model = make(folder, loss=loss, dpo=OnlineDPOUpdateConfig(epochs=2, minibatch_size=1, micro_batch_size=1))
    updates = Updates(model)
    metrics = trainer.update(updates, experience(trainer), torch.Generator().manual_seed(1))
    assert len(updates.seen) == 2 * metrics["pairs"]


def test_bco_keeps_the_mean_of_all_implicit_rewards(folder):
    trainer, model = make(folder, loss=PreferenceLossConfig("bco"))
    metrics = trainer.update(Updates(model), experience(trainer), torch.Generator().manual_seed(1))
    get, put = trainer.state()["delta"]
    delta, seen = get()
    assert seen == 2 * metrics["pairs"]
    assert delta == pytest.approx((metrics["dpo/reward_chosen"] + metrics["dpo/reward_rejected"]) / 2, rel=1e-5)
    put([0.5, 7.0])
    assert get() == [0.5, 7.0]


def test_a_batch_without_a_pair_takes_no_update(folder):
    trainer, model = make(folder, reward=RewardSource(f"{SCORERS}:constant", workers=0))
    updates = Updates(model)
    metrics = trainer.update(updates, experience(trainer), torch.Generator().manual_seed(1))
    assert not updates.seen and metrics["pairs"] == 0 and metrics["pairs/ties"] == 4 and metrics["score"] == 1.0


def test_a_completion_without_a_score_is_in_no_pair(folder):
    trainer, model = make(folder)
    e = experience(trainer)
    e.mask[:3] = False
    e.mask[4] = False
    e.scores[4] = 1e6
    metrics = trainer.update(Updates(model), e, torch.Generator().manual_seed(1))
    assert metrics["pairs/unscorable"] == 1 and metrics["pairs/gap"] < 1e3


def test_a_kind_across_the_pairs_keeps_them_in_one_pass(folder):
    dpo = OnlineDPOUpdateConfig(minibatch_size=4, micro_batch_size=4)
    trainer, _ = make(folder, loss=PreferenceLossConfig("aot"), dpo=dpo)
    assert not trainer.micro_batches.halve


JUDGE = """
def judge(prompts, completions):
    assert len(completions) == 16 and all(prompts[i] == prompts[i + 1] for i in range(0, 16, 2))
    verdicts = []
    for one, other in zip(completions[::2], completions[1::2]):
        a, b = one.count("e"), other.count("e")
        verdicts += [None, None] if a == b else [float(a > b), float(b > a)]
    return verdicts
"""


def test_training_raises_the_score_by_a_source_or_by_a_judge_of_two(folder):
    (folder / "judge.py").write_text(JUDGE)
    for name, reward, size in (
        ("scores", RewardSource(f"{SCORERS}:count_e", workers=0), 4),
        ("judge", RewardSource(f"{folder}/judge.py:judge", whole_batch=True, max_unscorable=1.0, workers=0), 2),
    ):
        config = config_of(folder, reward=reward, group_size=size, steps=14, loss=PreferenceLossConfig(beta=0.5))
        run = dataclasses.replace(config.run, output_dir=str(folder / name))
        letters: list[float] = []
        count = lambda texts, letters=letters: letters.append(sum(t.count("e") for t in texts) / len(texts)) or {}
        adapter = train_online_dpo(dataclasses.replace(config, run=run), observe=count)
        assert (adapter / "adapter_model.safetensors").is_file()
        assert sum(letters[-4:]) > 1.3 * sum(letters[:4]), name
        rows = numbers(folder / name)
        assert all(row["pairs"] + row["pairs/ties"] + row["pairs/unscorable"] == 16 // size for row in rows)
        assert all("dpo/margin" in row and "kl_coef" not in row for row in rows) and rows[-1]["kl"] > 0


BAD = {
    "importance weights": (["--rollout.correction", "token-tis"], "does not compare with the policy that sampled"),
    "one completion": (["--group-size", "1"], "greater than or equal to 2"),
    "size": (["--group-size", "5"], "divisor"),
    "minibatch": (["--dpo.minibatch-size", "5"], "at most rollout.batch_size / group_size = 4"),
    "across": (["--loss.kind", "aot", "--dpo.micro-batch-size", "2"], "looks across"),
    "shard": (["--model.shard"], "whose outputs stay with the rank that sampled"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_are_refused(folder, case):
    overrides, message = BAD[case]
    file = folder / "settings.yaml"
    file.write_text(to_yaml(config_of(folder)))
    with pytest.raises(ConfigError, match=message):
        load_config(OnlineDPOConfig, file, overrides, allow_code=True)
    assert load_config(OnlineDPOConfig, file, [], allow_code=True) == config_of(folder)
