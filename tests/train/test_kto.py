from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from models import letter_tokenizer, save_tiny, tiny_llama
from runs import numbers, write_lines

from rlhf_fast.config import (
    ConfigError,
    KTOConfig,
    LabelDataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    load_config,
    to_yaml,
)
from rlhf_fast.data import DataError, EncodedLabel, LabelRecord, encode_label
from rlhf_fast.model import LoraConfig, SharedModel
from rlhf_fast.train.kto import ROLES, Trainer, train_kto, weights_of
from rlhf_fast.train.preference import mismatched_logratios
from rlhf_fast.train.ranks import Ranks

ANSWERS = [
    ("the film was ", "good", True),
    ("we saw a ", "bad one", False),
    ("it is ", "fine", True),
    ("this ", "made me smile", True),
    ("a ", "bore", False),
]


def config_of(folder: Path, **changes: object) -> KTOConfig:
    base = KTOConfig(
        model=ModelConfig(str(folder / "model"), dtype="float32", shared_layers=1, lora=LoraConfig(r=4, alpha=8.0)),
        data=LabelDataConfig(str(folder / "labels.jsonl")),
        run=RunConfig(str(folder / "run"), save_every=100, sample_every=0, threads=1),
        optim=OptimConfig(lr=1e-2, schedule="constant"),
        beta=0.5,
        batch_size=5,
        micro_batch_size=2,
        eval_fraction=0.25,
        epochs=6,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    write_lines(tmp_path / "labels.jsonl", [{"prompt": p, "completion": c, "label": x} for p, c, x in ANSWERS * 4])
    return tmp_path


def encoded() -> list[EncodedLabel]:
    tokenizer = letter_tokenizer()
    records = [LabelRecord(*answer, source="here") for answer in ANSWERS]
    return [EncodedLabel(*encode_label(tokenizer, record), record) for record in records]


def model_of() -> SharedModel:
    model = SharedModel(tiny_llama(), roles=ROLES, lora=LoraConfig(r=4, alpha=8.0), shared_layers=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.parameters_of("policy").items():
            if "lora_B" in name:
                p.normal_(0, 0.2, generator=generator)
    return model


def logratio(model: SharedModel, ids: list[int], start: int) -> torch.Tensor:
    """Of one answer, alone and by plain PyTorch."""
    found = []
    for role in ROLES:
        logits = model(torch.tensor([ids]), roles=(role,))[role].logits[0, :-1].log_softmax(-1)
        found.append(logits.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)[start - 1 :].sum())
    return found[0] - found[1].detach()


def pieces(answers: list[EncodedLabel]) -> list[tuple[list[int], int]]:
    return [(x.input_ids, x.prompt_length) for x in answers]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("sizes", [[5], [1, 3, 1]])
def test_loss_and_gradient_are_those_of_the_paper_and_of_trl(packing, sizes):
    """trl 1.16.0, trl/trainer/kto_trainer.py, _compute_loss: losses of both labels side by side, each with its weight, and their mean."""
    model, answers, beta, desirable, undesirable = model_of(), encoded(), 0.5, 1.2, 0.7
    trainer = Trainer(config_of(Path("."), beta=beta), (desirable, undesirable), model, packing)
    kl = mismatched_logratios(model, pieces(answers), Ranks(), 2, packing=packing)
    done, loss, sums = 0, 0.0, {}
    for size in sizes:
        part, found = trainer(answers[done : done + size], len(answers), kl)
        part.backward()
        loss, done = loss + float(part.detach()), done + size
        sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
    gradient = {n: p.grad.clone() for n, p in model.parameters_of("policy").items()}
    model.zero_grad(set_to_none=True)

    strange = []
    for x, y in zip(answers, [*answers[1:], answers[0]], strict=True):
        ids = x.input_ids[: x.prompt_length] + y.input_ids[y.prompt_length :]
        strange.append(logratio(model, ids, x.prompt_length).detach())
    torch.testing.assert_close(kl, torch.stack(strange), atol=1e-4, rtol=1e-4)
    z0 = torch.stack(strange).mean().clamp(min=0)
    ratios = torch.stack([logratio(model, x.input_ids, x.prompt_length) for x in answers])
    good = torch.tensor([x.record.label for x in answers])
    chosen = 1 - torch.sigmoid(beta * (ratios[good] - z0))
    rejected = 1 - torch.sigmoid(beta * (z0 - ratios[~good]))
    expected = torch.cat((desirable * chosen, undesirable * rejected)).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-4) and sums["loss"] == pytest.approx(loss)
    assert (sums["desirable"], sums["undesirable"]) == (3, 2)
    assert sums["desirable_reward"] == pytest.approx(beta * ratios[good].sum().item(), rel=1e-3)
    assert sums["undesirable_reward"] == pytest.approx(beta * ratios[~good].sum().item(), rel=1e-3)
    size = max(float(g.abs().max()) for g in gradient.values())
    assert size > 0
    for name, p in model.parameters_of("policy").items():
        torch.testing.assert_close(gradient[name], p.grad, atol=1e-4 * size, rtol=2e-3)


@pytest.mark.parametrize(
    ("labels", "given", "balanced"),
    [
        ((4, 3), (1.0, 1.0), (1.0, 1.0)),  # 4/3 is within
        ((3, 3), (1.0, 1.0), (1.0, 1.0)),
        ((1, 4), (1.0, 1.0), (4.0, 1.0)),  # too few desirable ones: n_d w_d / (n_u w_u) rises to 1
        ((8, 2), (1.0, 1.0), (1.0, 3.0)),  # too many: it falls to 4/3
        ((8, 2), (1.0, 4.0), (1.0, 4.0)),
        ((1, 4), (2.0, 1.0), (4.0, 1.0)),
    ],
)
def test_an_imbalance_is_told_and_the_rarer_label_raised_when_asked(caplog, labels, given, balanced):
    flags = [True] * labels[0] + [False] * labels[1]
    config = config_of(Path("."), desirable_weight=given[0], undesirable_weight=given[1])
    assert weights_of(config, flags) == given
    assert bool(caplog.records) == (given != balanced)
    if caplog.records:
        assert f"weights {balanced[0]:g} and {balanced[1]:g} (balance" in caplog.text
    assert weights_of(dataclasses.replace(config, balance=True), flags) == pytest.approx(balanced)


def test_one_label_alone_is_told(caplog):
    assert weights_of(config_of(Path("."), balance=True), [True] * 3) == (1.0, 1.0)
    assert "3 answers are desirable and 0 are not" in caplog.text


def test_training_moves_the_labels_apart(folder):
    adapter = train_kto(config_of(folder, balance=True))
    rows = numbers(folder / "run")
    assert rows[0]["loss"] == pytest.approx(0.5, abs=0.1)  # policy and reference start equal
    gap = lambda row: row["desirable_reward"] - row["undesirable_reward"]
    assert gap(rows[0]) == pytest.approx(0.0, abs=1e-5) and gap(rows[-1]) > 0.5
    assert rows[-1]["loss"] < rows[0]["loss"] and all(0 <= row["desirable"] <= 1 and row["kl"] >= 0 for row in rows)
    assert rows[-1]["eval_desirable_reward"] > rows[-1]["eval_undesirable_reward"]
    assert (adapter / "adapter_model.safetensors").is_file()


def test_a_wrong_label_stops_the_run_with_its_line(folder):
    write_lines(
        folder / "labels.jsonl",
        [{"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "b", "label": "?"}],
    )
    with pytest.raises(DataError, match=r"labels\.jsonl:2: field 'label' got '\?', expected true or false"):
        train_kto(config_of(folder))


BAD = {
    "one answer a batch": (["--batch-size", "1", "--micro-batch-size", "1"], "greater than or equal to 2"),
    "micro-batch": (["--micro-batch-size", "9"], "at most batch_size = 5"),
    "weight": (["--undesirable-weight", "0"], "greater than 0"),
    "kind": (["--data.kind", "pair"], "label"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_are_refused(folder, case):
    overrides, message = BAD[case]
    file = folder / "settings.yaml"
    file.write_text(to_yaml(config_of(folder)))
    with pytest.raises(ConfigError, match=message):
        load_config(KTOConfig, file, overrides)
