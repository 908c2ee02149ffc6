from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models import letter_tokenizer, save_tiny

from rlhf_fast.batch import collate
from rlhf_fast.config import DataConfig, ModelConfig, OptimConfig, PairDataConfig, RewardConfig, RunConfig, SFTConfig
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.train.reward import pair_accuracy, pair_scores, train_reward
from rlhf_fast.train.sft import sft_loss, train_sft

TEXTS = ["the film was good.", "a good film, we saw it.", "this is a story of a film.", "it was good."]


def lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def metrics(adapter: Path) -> list[dict]:
    return [json.loads(line) for line in (adapter.parent / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    lines(tmp_path / "texts.jsonl", [{"text": t} for t in TEXTS * 4])
    pairs = [{"prompt": "", "chosen": f"a good film {c}.", "rejected": f"a bad story {c}."} for c in "abcdefghijklmnop"]
    lines(tmp_path / "pairs.jsonl", pairs)
    return tmp_path


def sft_config(folder: Path, **changes: object) -> SFTConfig:
    base = SFTConfig(
        model=ModelConfig(str(folder / "model"), dtype="float32", lora=LoraConfig(r=4, alpha=8.0)),
        data=DataConfig(str(folder / "texts.jsonl")),
        run=RunConfig(str(folder / "sft"), sample_every=0),
        optim=OptimConfig(lr=2e-2, schedule="constant"),
        epochs=6,
        batch_size=8,
        micro_batch_size=4,
    )
    return dataclasses.replace(base, **changes)


def test_sft_lowers_the_loss_and_leaves_an_adapter_that_peft_reads_alike(folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = train_sft(sft_config(folder))
    losses = [m["loss"] for m in metrics(adapter)]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    ours = SharedModel.from_pretrained(folder / "model", roles=("policy",), adapters={"policy": adapter})
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    peft = PeftModel.from_pretrained(base, adapter)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(peft(ids).logits, ours(ids, roles=("policy",)).policy.logits, rtol=1e-4, atol=1e-5)


def test_sft_loss_is_the_mean_negative_logprob_and_adds_up_over_micro_batches(folder):
    model = SharedModel.from_pretrained(folder / "model", roles=("policy",), lora=LoraConfig(r=4))
    tokenizer = letter_tokenizer()
    rows = [tokenizer(t, add_special_tokens=False).input_ids for t in TEXTS]
    batch = collate(rows, [[True] * len(r) for r in rows])
    targets = int(batch.target_mask.sum())
    with torch.no_grad():
        whole = sft_loss(model, batch, targets)
        parts = sum(sft_loss(model, batch[i : i + 1], targets) for i in range(len(rows)))
        logits = model(batch.input_ids, batch.attention_mask, roles=("policy",)).policy.logits.log_softmax(-1)
    expected = [-logits[b, t - 1, rows[b][t]] for b in range(len(rows)) for t in range(1, len(rows[b]))]
    torch.testing.assert_close(whole, torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_sft_has_the_loss_and_the_gradients_of_the_padded_batch(folder, checkpointing):
    tokenizer = letter_tokenizer()
    rows = [tokenizer(t, add_special_tokens=False).input_ids for t in (*TEXTS, "a")]  # one without a target
    learn = [[t % 3 != 1 for t in range(len(r))] for r in rows]
    batch = collate(rows, learn)
    found = []
    for packing in (False, True):
        model = SharedModel.from_pretrained(
            folder / "model", roles=("policy",), lora=LoraConfig(r=4), gradient_checkpointing=checkpointing
        )
        with torch.no_grad():
            for p in model.parameters_of("policy").values():
                p.add_(0.05)  # a B of zero would hide the gradients of A
        loss = sft_loss(model, batch, 17, packing)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters_of("policy").values()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    # The sums of attention run in another order: 1e-5 of the whole gradient's length.
    length = torch.cat([g.flatten() for g in found[0][1]]).norm()
    for got, expected in zip(found[1][1], found[0][1], strict=True):
        assert expected.abs().max() > 0
        assert (got - expected).norm() <= 1e-5 * length


def test_packed_sft_learns_as_the_padded_run_does(folder):
    padded = metrics(train_sft(sft_config(folder, epochs=2)))
    run = RunConfig(str(folder / "packed"), sample_every=0)
    packed = metrics(train_sft(sft_config(folder, epochs=2, packing=True, run=run)))
    assert [m["tokens"] for m in packed] == [m["tokens"] for m in padded]
    assert [m["loss"] for m in packed] == pytest.approx([m["loss"] for m in padded], rel=1e-3)
    assert packed[-1]["loss"] < packed[0]["loss"]


def test_item_1_pad_is_not_eos_and_a_final_eos_is_learned(folder):
    from rlhf_fast.train.loop import load_data

    tokenizer = letter_tokenizer()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    texts, _ = load_data(DataConfig(str(folder / "texts.jsonl")), tokenizer)
    batch = collate([t.input_ids for t in texts], [t.learn for t in texts])
    last = batch.attention_mask.sum(1) - 1
    rows = torch.arange(len(texts))
    assert (batch.input_ids[rows, last] == tokenizer.eos_token_id).all() and batch.target_mask[rows, last].all()
    assert not batch.target_mask[:, 0].any() and not batch.target_mask[~batch.attention_mask].any()


def test_reward_model_learns_which_answer_is_better(folder):
    config = RewardConfig(
        model=ModelConfig(str(folder / "model"), dtype="float32", lora=LoraConfig(r=4, alpha=8.0)),
        data=PairDataConfig(str(folder / "pairs.jsonl")),
        run=RunConfig(str(folder / "reward"), sample_every=0),
        optim=OptimConfig(lr=1e-2, schedule="constant"),
        epochs=5,
        batch_size=6,
        micro_batch_size=3,
        eval_fraction=0.25,
    )
    adapter = train_reward(config)
    found = metrics(adapter)
    assert found[-1]["loss"] < 0.5 * found[0]["loss"] and found[-1]["eval_accuracy"] == 1.0
    model = SharedModel.from_pretrained(folder / "model", roles=("reward",), adapters={"reward": adapter})
    tokenizer = letter_tokenizer()
    pair = tuple([*tokenizer(t, add_special_tokens=False).input_ids, 1] for t in ("a good film q.", "a bad story q."))
    chosen, rejected = pair_scores(model, [pair])
    assert float(chosen) > float(rejected) and pair_accuracy(model, [pair, pair[::-1]], 8) == 0.5


def test_item_38_ties_count_one_half(folder):
    model = SharedModel.from_pretrained(folder / "model", roles=("reward",))
    with torch.no_grad():
        model.heads["reward"].weight.zero_()  # every score is 0
    assert pair_accuracy(model, [([4, 5, 6], [7, 8]), ([4], [9, 9])], 4) == 0.5


def test_item_10_reward_head_is_normal_with_the_papers_deviation():
    from rlhf_fast.model.heads import ScalarHead

    generator = torch.Generator().manual_seed(0)
    weights = torch.cat([ScalarHead(255, "normal", generator, torch.device("cpu")).weight.flatten() for _ in range(40)])
    assert float(weights.std()) == pytest.approx(1 / 16, rel=0.05) and abs(float(weights.mean())) < 0.005
