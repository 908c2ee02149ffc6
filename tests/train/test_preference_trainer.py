from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models import letter_tokenizer, save_tiny, tiny_llama

from rlhf_fast import preference
from rlhf_fast.config import (
    ConfigError,
    ModelConfig,
    OptimConfig,
    PairDataConfig,
    PreferenceConfig,
    PreferenceLossConfig,
    RunConfig,
    load_config,
    to_yaml,
)
from rlhf_fast.data import EncodedPair, encode_pair
from rlhf_fast.data.records import PairRecord
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.preference_kinds import KINDS
from rlhf_fast.train.preference import Trainer, answer_logprobs, train_preference

PAIRS = [
    ("the film was ", "good", "not good at all"),
    ("we saw a ", "great story.", "bad one"),
    ("it is ", "fine", "so bad, so bad"),
    ("this ", "made me smile", "fails"),
    ("a ", "joy", "bore"),
]


def preference_config(folder: Path, **changes: object) -> PreferenceConfig:
    base = PreferenceConfig(
        model=ModelConfig(str(folder / "model"), dtype="float32", shared_layers=1, lora=LoraConfig(r=4, alpha=8.0)),
        data=PairDataConfig(str(folder / "pairs.jsonl")),
        run=RunConfig(str(folder / "run"), save_every=2, sample_every=0),
        optim=OptimConfig(lr=1e-2, schedule="constant"),
        batch_size=4,
        micro_batch_size=2,
        eval_fraction=0.2,
        epochs=4,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    lines = [json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in PAIRS * 2]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def encoded():
    tokenizer = letter_tokenizer()
    records = [PairRecord(*pair, source="here") for pair in PAIRS[:4]]
    return [EncodedPair(*encode_pair(tokenizer, record), record) for record in records]


def chosen(pairs):
    return [(p.chosen_ids, p.prompt_length) for p in pairs]


def model_of(loss: PreferenceLossConfig) -> SharedModel:
    roles = ("policy", "reference") if loss.needs_reference else ("policy",)
    model = SharedModel(tiny_llama(), roles=roles, lora=LoraConfig(r=4, alpha=8.0), shared_layers=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.parameters_of("policy").items():
            if "lora_B" in name:
                p.normal_(0, 0.2, generator=generator)
    return model


def plain_logprob(model: SharedModel, role: str, ids: list[int], start: int) -> torch.Tensor:
    """Of one answer, alone and by plain PyTorch."""
    logits = model(torch.tensor([ids]), roles=(role,))[role].logits[0, :-1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)[start - 1 :].sum()


@pytest.mark.parametrize("packing", [False, True])
def test_log_probs_are_those_of_the_answers_alone(packing):
    model, pairs = model_of(PreferenceLossConfig()), encoded()
    answers = [(p.rejected_ids, p.prompt_length) for p in pairs]
    found = answer_logprobs(model, answers, ("policy", "reference"), packing=packing)
    for role in ("policy", "reference"):
        expected = torch.stack([plain_logprob(model, role, *answer) for answer in answers])
        torch.testing.assert_close(found[role].logprobs, expected, atol=1e-4, rtol=1e-5)
        assert found[role].lengths.tolist() == [len(ids) - start for ids, start in answers]
    assert found["policy"].logprobs.requires_grad and not found["reference"].logprobs.requires_grad


@pytest.mark.parametrize("packing", [False, True])
def test_the_gradient_of_dpo_is_that_of_plain_pytorch(packing):
    model, pairs = model_of(PreferenceLossConfig()), encoded()
    loss, sums, _ = Trainer(PreferenceLossConfig(), model, packing)(pairs, len(pairs), None)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.parameters_of("policy").items()}
    model.zero_grad(set_to_none=True)
    margins = []
    for p in pairs:
        chosen, rejected = ((ids, p.prompt_length) for ids in (p.chosen_ids, p.rejected_ids))
        won, lost = (
            plain_logprob(model, "policy", *a) - plain_logprob(model, "reference", *a).detach()
            for a in (chosen, rejected)
        )
        margins.append(won - lost)
    expected = -torch.nn.functional.logsigmoid(0.1 * torch.stack(margins)).mean()
    expected.backward()
    assert sums["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, p in model.parameters_of("policy").items():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-3)


def options_of(kind: str) -> PreferenceLossConfig:
    smoothing = 0.1 if kind == "exo" else 0.0
    options = {"alpha": 0.5} if kind == "alpha_po" else {}
    return PreferenceLossConfig(kind, label_smoothing=smoothing, options=options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_its_micro_batches_add_up(kind):
    config = options_of(kind)
    model, pairs = model_of(config), encoded()

    def gradient(sizes):
        trainer = Trainer(config, model)
        kl, done, total = trainer.mismatched(chosen(pairs), 3), 0, 0.0
        for size in sizes:
            loss, _, _ = trainer(pairs[done : done + size], len(pairs), kl)
            loss.backward()
            total, done = total + float(loss.detach()), done + size
        found = {n: p.grad.clone() for n, p in model.parameters_of("policy").items()}
        model.zero_grad(set_to_none=True)
        return total, found

    total, whole = gradient([4])
    assert any(g.abs().max() > 0 for g in whole.values())
    if KINDS[kind].across:
        return
    parts_total, parts = gradient([1, 3])
    assert parts_total == pytest.approx(total, rel=1e-4, abs=1e-6)
    size = max(float(g.abs().max()) for g in whole.values())  # the squares of ipo have gradients in the hundreds
    for name, g in parts.items():
        torch.testing.assert_close(g, whole[name], atol=1e-5 * max(size, 1.0), rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_of_dpo_loss_computes_the_kinds_it_covers_from_the_tokens(kind, monkeypatch):
    calls, plain = [], preference.pair_loss
    monkeypatch.setattr(preference, "pair_loss", lambda *a: calls.append(a[1].logprobs.dim()) or plain(*a))
    config = options_of(kind)
    model, pairs = model_of(config), encoded()
    trainer = Trainer(config, model)
    loss, _, _ = trainer(pairs, len(pairs), trainer.mismatched(chosen(pairs), 4))
    assert calls == ([2] if KINDS[kind].fused else [])
    tailed = Trainer(dataclasses.replace(config, tail_weight=1 - 1e-12), model)  # whose answers are summed first
    expected, _, _ = tailed(pairs, len(pairs), tailed.mismatched(chosen(pairs), 4))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == KINDS[kind].fused


def test_training_widens_the_margin_and_keeps_the_held_out_accuracy(folder):
    adapter = train_preference(preference_config(folder))
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference start equal"
    assert lines[-1]["margin"] > lines[0]["margin"] and lines[-1]["loss"] < lines[0]["loss"]
    assert 0.0 <= lines[-1]["eval_accuracy"] <= 1.0
    assert (adapter / "adapter_model.safetensors").is_file()


def test_ld_dpo_weighs_what_goes_past_the_shorter_answer():
    config = PreferenceLossConfig(tail_weight=0.25)
    model, pairs = model_of(config), encoded()
    answers = [(p.chosen_ids, p.prompt_length) for p in pairs] + [(p.rejected_ids, p.prompt_length) for p in pairs]
    weighted = answer_logprobs(model, answers, ("policy",), 0.25)["policy"].logprobs
    p = pairs[0]
    common = min(len(p.chosen_ids), len(p.rejected_ids))
    head = plain_logprob(model, "policy", p.rejected_ids[:common], p.prompt_length)
    whole = plain_logprob(model, "policy", p.rejected_ids, p.prompt_length)
    torch.testing.assert_close(weighted[4], head + 0.25 * (whole - head), atol=1e-4, rtol=1e-5)


BAD = {
    "kind": (["--loss.kind", "dppo"], "dpo"),
    "option it does not read": (["--loss.options", "gamma=0.5"], "gamma"),
    "unknown option": (["--loss.options", "gama=0.5"], "options"),
    "exo without smoothing": (["--loss.kind", "exo"], "label_smoothing"),
    "aot in micro-batches": (["--loss.kind", "aot"], "looks across"),
    "divergence": (["--loss.kind", "ipo", "--loss.divergence", "js"], "divergence"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_are_refused(folder, case):
    overrides, message = BAD[case]
    file = folder / "settings.yaml"
    file.write_text(to_yaml(preference_config(folder)))
    with pytest.raises(ConfigError, match=message):
        load_config(PreferenceConfig, file, overrides)
