from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import assert_is_step, flip, save, tensors_of

from rlhf_fast.train import checkpoint as module
from rlhf_fast.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


DAMAGE = {
    "flipped bit in weights": (
        lambda f: flip(f / "model.safetensors", 0.9),
        "model.safetensors does not match its SHA",
    ),
    "flipped bit in header": (
        lambda f: flip(f / "optim.safetensors", 0.1),
        "optim.safetensors does not match its SHA",
    ),
    "flipped bit in state": (lambda f: flip(f / "state.json"), "state.json does not match its SHA"),
    "flipped bit in manifest": (lambda f: flip(f / "MANIFEST.json"), "MANIFEST.json"),
    "truncated file": (
        lambda f: os.truncate(f / "model.safetensors", 50),
        "model.safetensors has 50 bytes, expected",
    ),
    "longer file": (lambda f: (f / "state.json").open("ab").write(b" "), "state.json has"),
    "missing file": (lambda f: (f / "optim.safetensors").unlink(), "optim.safetensors: No such file"),
    "missing state": (lambda f: (f / "state.json").unlink(), "state.json: No such file"),
    "missing manifest": (lambda f: (f / "MANIFEST.json").unlink(), "MANIFEST.json: No such file"),
    "empty manifest": (lambda f: os.truncate(f / "MANIFEST.json", 0), "MANIFEST.json is not JSON"),
    "manifest of nothing": (
        lambda f: (f / "MANIFEST.json").write_text("{}"),
        "does not match its own SHA-256",
    ),
    "deep manifest": (lambda f: (f / "MANIFEST.json").write_text("[" * 100_000), "MANIFEST.json is not JSON"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "MANIFEST.json: No such file"),
    "pickle inside": (lambda f: (f / "model.pt").write_bytes(b"\x80\x04."), "holds the pickle file model.pt"),
    "renamed folder": (lambda f: shutil.copytree(f.parent / "step-1", f, dirs_exist_ok=True), "is of step 1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_newest_checkpoint_is_passed_over_with_a_warning(store, caplog, kind):
    damage, reason = DAMAGE[kind]
    save(store, 1)
    save(store, 2)
    damage(store.path(2))
    with caplog.at_level(logging.WARNING):
        assert_is_step(CheckpointStore(store.folder).load_latest(), 1)
    assert "step-2 is damaged and passed over" in caplog.text
    assert reason in caplog.text


def says_the_same(raw: bytes, whole: bytes) -> bool:
    """White space may differ."""
    try:
        return json.loads(raw) == json.loads(whole)
    except ValueError:
        return False


def test_every_flipped_bit_of_the_manifest_is_noticed(store):
    save(store, 1)
    save(store, 2)
    manifest = store.path(2) / "MANIFEST.json"
    whole = manifest.read_bytes()
    wrong = []
    for at in range(len(whole)):
        raw = bytearray(whole)
        raw[at] ^= 1 << (at % 8)
        manifest.write_bytes(raw)
        found = CheckpointStore(store.folder).load_latest()
        if found.step != (2 if says_the_same(raw, whole) else 1):
            wrong.append(at)
    assert wrong == []


def test_no_whole_checkpoint_left_is_an_error_that_lists_why(store):
    save(store, 1)
    save(store, 2)
    for step in (1, 2):
        flip(store.path(step) / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no whole checkpoint among 2 \(step-2: model.*; step-1: model.*from scratch"
    ):
        store.load_latest()


def test_damaged_later_checkpoint_does_not_push_out_good_ones(tmp_path, caplog):
    first = CheckpointStore(tmp_path, keep=4)
    for step in (10, 20, 30):
        save(first, step)
    for step in (20, 30):
        flip(first.path(step) / "state.json")
    second = CheckpointStore(tmp_path, keep=2)
    assert_is_step(second.load_latest(), 10)
    save(second, 12)
    assert second.steps() == [10, 12]
    flip(second.path(12) / "state.json")
    assert_is_step(CheckpointStore(tmp_path).load_latest(), 10)


def test_manifest_cannot_lead_out_of_the_folder(store, tmp_path):
    save(store, 1)
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((store.path(1) / "model.safetensors").read_bytes())
    manifest = json.loads((store.path(1) / "MANIFEST.json").read_bytes())
    manifest["files"]["../../secret.safetensors"] = manifest["files"].pop("model.safetensors")
    (store.path(1) / "MANIFEST.json").write_text(json.dumps(module._sealed(manifest)))
    with pytest.raises(CheckpointError, match=r"lists '\.\./\.\./secret\.safetensors', which is not a file"):
        store.load_latest()


def test_too_many_tensors_and_non_finite_ones_are_damage(store, monkeypatch):
    save(store, 1)
    store.save(2, {"model": {"w": torch.tensor([1.0, float("nan")])}}, {})
    assert store.load_latest().step == 2
    assert_is_step(store.load_latest(finite=True), 1)
    monkeypatch.setattr(module, "MAX_TENSORS", 0)
    with pytest.raises(CheckpointError, match="holds 1 tensors, expected at most 0"):
        store.load_latest()


def test_differing_field_is_refused_by_its_name_and_nothing_older_is_tried(store):
    state = {"identity": {"lora": {"r": 8, "alpha": 16.0}, "dtype": "float32", "base": "abc"}}
    store.save(1, {}, state)
    store.save(2, {}, state)
    same = {"identity": {"lora": {"r": 8, "alpha": 16}, "base": "abc"}}
    assert store.load_latest(expect=same).step == 2
    for wrong, message in [
        (
            {"identity": {"lora": {"r": 16}}},
            r"step-2: field 'identity\.lora\.r' is 8, expected 16 for this run",
        ),
        ({"identity": {"dtype": "bfloat16"}}, r"field 'identity\.dtype' is float32, expected bfloat16"),
        ({"identity": {"lora": {"rank": 8}}}, r"field 'identity\.lora\.rank' is absent, expected 8"),
        ({"identity": {"lora": {"r": True}}}, r"field 'identity\.lora\.r' is 8, expected True"),
        ({"config": "x"}, r"field 'config' is absent, expected x"),
        ({"identity": 3}, r"field 'identity' is .*, expected 3"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            store.load_latest(expect=wrong)


def test_another_set_of_tensors_is_refused_by_name(store):
    save(store, 1)
    right = {stem: named.keys() for stem, named in tensors_of(1).items()}
    assert store.load_latest(names=right).step == 1
    with pytest.raises(CheckpointError, match=r"tensor 'c' of model is missing"):
        store.load_latest(names={**right, "model": [*right["model"], "c"]})
    with pytest.raises(CheckpointError, match=r"tensor 'b' of model is unknown to this run"):
        store.load_latest(names={**right, "model": ["a", "empty"]})
    with pytest.raises(CheckpointError, match=r"got tensor files \['model', 'optim'\], expected \['model'\]"):
        store.load_latest(names={"model": right["model"]})


def test_newer_format_is_refused_by_its_version(store, monkeypatch):
    save(store, 1)
    monkeypatch.setattr(module, "FORMAT", 2)
    save(store, 2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"step-2: field 'format' is 2, this version reads 1"):
        store.load_latest()


def test_other_torch_version_is_only_a_warning(store, monkeypatch, caplog):
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    save(store, 1)
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        assert_is_step(store.load_latest(), 1)
    assert "written with torch 2.10.0" in caplog.text


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl", ".pth", ".ckpt"])
def test_pickle_offered_as_a_checkpoint_is_refused_unopened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    path.chmod(0)
    with pytest.raises(CheckpointError, match="got a pickle file, expected a folder; pickles are never opened"):
        CheckpointStore(path)
    with pytest.raises(CheckpointError, match="got a file, expected a folder"):
        CheckpointStore(Path(__file__))


def test_nothing_in_the_package_loads_pickles():
    import rlhf_fast

    forbidden = ("torch.load(", "torch.save(", "pickle.load", "allow_pickle=True", "trust_remote_code=True")
    for path in Path(rlhf_fast.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], path
