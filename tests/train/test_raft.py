from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from models import letter_tokenizer, save_tiny, tiny_llama
from runs import SCORERS, Updates, numbers, write_lines

from rlhf_fast.config import (
    ConfigError,
    ModelConfig,
    OptimConfig,
    PromptDataConfig,
    RaftConfig,
    RaftUpdateConfig,
    RewardSource,
    RolloutConfig,
    RunConfig,
    load_config,
    to_yaml,
)
from rlhf_fast.data import ChatRecord, PromptRecord, read_records
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.train.monitor import Monitor, read_json_lines
from rlhf_fast.train.raft import KEPT, Trainer, best_of, train_raft
from rlhf_fast.train.rewards import Rewards

PROMPTS = ["the film", "a story of", "we saw", "it was", "this"]


def config_of(folder: Path, **changes: object) -> RaftConfig:
    base = RaftConfig(
        model=ModelConfig(str(folder / "model"), dtype="float32", shared_layers=1, lora=LoraConfig(r=4, alpha=8.0)),
        data=PromptDataConfig(str(folder / "prompts.jsonl")),
        run=RunConfig(str(folder / "run"), save_every=100, sample_every=0, threads=1),
        reward=RewardSource(f"{SCORERS}:count_e", workers=0),
        optim=OptimConfig(lr=2e-2, schedule="constant"),
        rollout=RolloutConfig(batch_size=16, max_new_tokens=8),
        group_size=4,
        raft=RaftUpdateConfig(micro_batch_size=3),
        steps=12,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    return tmp_path


def make(folder: Path, **changes: object) -> tuple[Trainer, SharedModel]:
    config = config_of(folder, **changes)
    model = SharedModel(tiny_llama(), roles=("policy",), lora=config.model.lora, shared_layers=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.parameters_of("policy").items():
            if "lora_B" in name:
                p.normal_(0, 0.2, generator=generator)
    return Trainer(config, model, letter_tokenizer(), Rewards(config.reward)), model


def experience(trainer: Trainer):
    prompts = [trainer.tokenizer(p, add_special_tokens=False).input_ids for p in PROMPTS[:4]]
    return trainer.score(trainer.rollout(prompts, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("best", "threshold", "expected"),
    [
        (1, None, [1, 4, 10]),
        (2, None, [1, 2, 4, 5, 10]),
        (3, None, [0, 1, 2, 4, 5, 7, 10]),
        (1, 5.0, [4]),
        (None, 3.0, [1, 4, 5, 7]),
        (2, 9.0, []),
    ],
)
def test_the_best_of_each_prompt_are_kept_the_first_of_equals_before_the_others(best, threshold, expected):
    nan = float("nan")
    scores = torch.tensor([1.0, 3.0, 2.0, nan, 5.0, 5.0, nan, 4.0, nan, nan, -1.0, nan])
    scored = ~scores.isnan()
    assert best_of(scores.nan_to_num(9e9), scored, 4, best, threshold).tolist() == expected


@pytest.mark.parametrize("packing", [False, True])
def test_the_gradient_is_that_of_fine_tuning_on_what_is_kept(folder, packing):
    """At temperature 1, however it was sampled."""
    rollout = RolloutConfig(batch_size=16, max_new_tokens=8, temperature=1.3)
    update = RaftUpdateConfig(best=2, micro_batch_size=3)
    trainer, model = make(folder, rollout=rollout, raft=update, packing=packing)
    e = experience(trainer)
    updates = Updates(model)
    metrics = trainer.update(updates, e, torch.Generator().manual_seed(1))
    groups = e.raw_scores.view(4, 4)
    kept = [4 * i + j for i in range(4) for j in sorted(range(4), key=lambda j: -groups[i, j])[:2]]
    loss, tokens = torch.zeros(()), 0
    for row in kept:
        ids, n = e.rollout.input_ids[row][e.rollout.attention_mask[row]], int(e.rollout.response_mask[row].sum())
        logprobs = model(ids[None], roles=("policy",)).policy.logits[0, :-1].log_softmax(-1)
        loss, tokens = loss - logprobs.gather(-1, ids[1:, None]).squeeze(-1)[-n:].sum(), tokens + n
    (loss / tokens).backward()
    assert metrics["kept"] == 8 and metrics["kept/score"] == pytest.approx(float(e.raw_scores[kept].mean()))
    assert metrics["raft/loss"] == pytest.approx(loss.item() / tokens, rel=1e-5) and "kl" not in metrics
    (found,) = updates.seen
    for name, p in model.parameters_of("policy").items():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-3)


def test_epochs_and_minibatches_go_through_all_that_is_kept(folder):
    update = RaftUpdateConfig(best=2, epochs=3, minibatch_size=3, micro_batch_size=2)
    trainer, model = make(folder, raft=update)
    updates = Updates(model)
    trainer.update(updates, experience(trainer), torch.Generator().manual_seed(1))
    assert len(updates.seen) == 3 * 3


def test_a_batch_that_keeps_nothing_takes_no_update(folder):
    trainer, model = make(folder, raft=RaftUpdateConfig(threshold=1e3))
    updates = Updates(model)
    metrics = trainer.update(updates, experience(trainer), torch.Generator().manual_seed(1))
    assert not updates.seen and metrics["kept"] == 0 and "raft/loss" not in metrics


def test_training_raises_the_score_and_writes_what_it_learned(folder):
    adapter = train_raft(config_of(folder, rollout=RolloutConfig(batch_size=24, max_new_tokens=8), group_size=6))
    rows = numbers(folder / "run")
    assert sum(row["score"] for row in rows[-4:]) > 1.3 * sum(row["score"] for row in rows[:4])
    assert all(row["kept/score"] >= row["score"] for row in rows)
    assert (adapter / "adapter_model.safetensors").is_file()
    kept = read_json_lines(folder / "run" / KEPT)
    assert len(kept) == sum(row["kept"] for row in rows) and {row["step"] for row in kept} == set(range(1, 13))
    assert all(row["score"] == row["completion"].count("e") for row in kept)
    sources = {f"{folder}/prompts.jsonl:{i + 1}": p for i, p in enumerate(PROMPTS)}
    assert all(sources[row["source"]] == row["prompt"] for row in kept)
    texts = read_records(folder / "run" / KEPT, "text")
    assert [r.text for r in texts] == [row["prompt"] + row["completion"] for row in kept]
    assert len(read_records(folder / "run" / KEPT, "prompt")) == len(kept)


def test_what_answers_messages_is_written_as_a_chat(folder, tmp_path):
    trainer, _ = make(folder)
    e = experience(trainer)
    asked = [{"role": "user", "content": "q"}]

    class Run:
        monitor = Monitor(tmp_path / "run", 1, "raft", silent=False)

    with Run.monitor:
        trainer.record(Run, 0, e, [PromptRecord(asked, f"f:{i}") for i in range(4)])
    texts, rows = e.rollout.texts(trainer.tokenizer), trainer.kept(e).tolist()
    for record, row in zip(read_records(tmp_path / "run" / KEPT, "chat"), rows, strict=True):
        assert isinstance(record, ChatRecord)
        assert record.messages == [*asked, {"role": "assistant", "content": texts[row]}]
        assert record.meta == {"step": 1, "score": float(e.raw_scores[row]), "source": f"f:{row // 4}"}


def test_lines_after_the_step_of_a_resume_are_written_again_and_a_silent_rank_writes_none(tmp_path):
    write_lines(tmp_path / KEPT, [{"step": 1, "n": 1}, {"step": 2, "n": 2}, {"step": 3, "n": 3}])
    with Monitor(tmp_path, 4, "raft", start_step=2) as monitor:
        monitor.lines(KEPT, 3, [{"n": 4}, {"n": 5}])
        monitor.lines(KEPT, 4, [{"n": 6}])
    assert [row["n"] for row in read_json_lines(tmp_path / KEPT)] == [1, 2, 4, 5, 6]
    with Monitor(tmp_path / "other", 4, "raft", silent=True) as monitor:
        monitor.lines(KEPT, 1, [{"n": 1}])
    assert not (tmp_path / "other").exists()


def test_a_file_that_cannot_be_written_is_dropped_with_one_warning(tmp_path, caplog):
    (tmp_path / KEPT).mkdir()
    with Monitor(tmp_path, 4, "raft") as monitor:
        monitor.lines(KEPT, 1, [{"n": 1}])
        monitor.lines(KEPT, 2, [{"n": 2}])
        monitor.log(2, {"loss": 1.0})
    assert sum("kept.jsonl failed" in r.message for r in caplog.records) == 1
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 1


BAD = {
    "importance weights": (["--rollout.correction", "token-tis"], "does not compare with the policy that sampled"),
    "nothing chooses": (["--raft.best", "none"], "a number, or a threshold"),
    "best": (["--raft.best", "5"], "at most group_size = 4"),
    "size": (["--group-size", "5", "--raft.best", "1"], "divisor"),
    "shard": (["--model.shard"], "whose outputs stay with the rank that sampled"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_are_refused(folder, case):
    overrides, message = BAD[case]
    file = folder / "settings.yaml"
    file.write_text(to_yaml(config_of(folder)))
    with pytest.raises(ConfigError, match=message):
        load_config(RaftConfig, file, overrides, allow_code=True)
