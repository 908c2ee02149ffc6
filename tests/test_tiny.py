"""Tiny models that have learned something, made in seconds without a download."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhf_fast.demo import tiny
from rlhf_fast.demo.tiny import TEST_RECIPE, TinyRecipe, pretrain_tiny, python_prose, tiny_model_folder

SMALL = TinyRecipe(vocab_size=320, hidden_size=32, layers=1, heads=2, intermediate_size=48, batch_size=8, window=32)


@pytest.fixture(scope="module")
def prose() -> list[str]:
    return python_prose()[:200]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, prose):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    seen: list[tuple[int, float, float]] = []
    torch.set_num_threads(1)
    result = pretrain_tiny(folder, prose, steps=60, recipe=SMALL, on_step=lambda *step: seen.append(step))
    return result, seen


def test_the_text_that_ships_with_python_is_enough_prose_without_listings():
    prose = python_prose()
    assert len(prose) > 300 and sum(map(len, prose)) > 100_000
    assert len(set(prose)) == len(prose) and all("\n" not in text and len(text) >= 80 for text in prose)


def test_pretraining_learns_and_reports_loss_on_text_it_did_not_see(trained):
    result, seen = trained
    assert result.loss_before == pytest.approx(math.log(320), abs=0.25)
    assert result.loss_after < result.loss_before - 1.0
    assert 1.0 < result.bits_per_byte < 5.0
    assert (result.steps, result.tokens) == (60, 60 * 8 * 32)
    assert [s for s, _, _ in seen] == list(range(1, 61)) and seen[-1][1] == 1.0
    assert seen[-1][2] < seen[0][2]


def test_the_folder_is_a_plain_checkpoint_with_a_tokenizer_of_its_own(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result, _ = trained
    model = AutoModelForCausalLM.from_pretrained(result.folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(result.folder, local_files_only=True)
    assert sum(p.numel() for p in model.parameters()) == result.parameters < 100_000
    assert len(tokenizer) == model.config.vocab_size == 320
    text = "Any text: naïve, 日本, tabs\tand  spaces"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id != tokenizer.pad_token_id
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer("The object", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert loss < math.log(320)


def test_equal_seeds_give_equal_weights_and_leave_the_callers_random_state(trained, prose, tmp_path):
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain_tiny(tmp_path / name, prose, steps=3, recipe=SMALL, seed=seed)
    assert torch.equal(torch.rand(3), expected)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])


def test_a_time_budget_ends_training(prose, tmp_path):
    result = pretrain_tiny(tmp_path / "m", prose, seconds=0.5, recipe=SMALL)
    assert result.steps >= 1 and 0.5 <= result.seconds < 100  # a step, and no more steps than that


@pytest.mark.parametrize("budget", [{}, {"steps": 3, "seconds": 3.0}, {"steps": 0}, {"seconds": -1.0}])
def test_a_missing_or_double_budget_is_refused(prose, tmp_path, budget):
    with pytest.raises(ValueError, match="give seconds or steps"):
        pretrain_tiny(tmp_path / "m", prose, recipe=SMALL, **budget)


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too little text"):
        pretrain_tiny(tmp_path / "m", ["a short text"] * 3, steps=1, recipe=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_training_leaves_no_folder(prose, tmp_path):
    def stop(step, share, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain_tiny(tmp_path / "m", prose, steps=3, recipe=SMALL, on_step=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_test_model_is_trained_once_and_again_only_when_its_recipe_changes(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    first = tiny_model_folder(tmp_path, steps=4)
    record = json.loads((first / "pretraining.json").read_text())
    assert record["steps"] == 4 and record["recipe"]["hidden_size"] == TEST_RECIPE.hidden_size
    assert torch.get_num_threads() == threads
    trained = []
    monkeypatch.setattr(tiny, "pretrain_tiny", lambda folder, *a, **k: trained.append(folder))
    assert tiny_model_folder(tmp_path, steps=4) == first and trained == []
    assert tiny_model_folder(tmp_path, steps=5) != first and len(trained) == 1
