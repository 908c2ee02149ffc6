from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy
import pytest
import torch
from checkpoints import assert_is_step, child, leftovers, save

from rlhf_fast.train import checkpoint as module
from rlhf_fast.train.checkpoint import (
    SAVE_FAULTS,
    CheckpointStore,
    fault_point,
    load_optimizer_tensors,
    optimizer_tensors,
    rng_state,
    set_rng_state,
)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The first optimizer imports a good part of torch; forked children get that from here."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    optimizer.step()
    optimizer.zero_grad()


def test_what_was_saved_comes_back_bit_for_bit(store):
    assert store.load_latest() is None
    assert save(store, 3) == store.path(3)
    assert_is_step(store.load_latest(), 3)
    assert_is_step(CheckpointStore(store.folder).load_latest(), 3)
    assert sorted(p.name for p in store.path(3).iterdir()) == [
        *("MANIFEST.json", "model.safetensors", "optim.safetensors", "state.json"),
    ]
    assert leftovers(store.folder) == []


def test_saving_leaves_the_tensors_alone_and_takes_views_and_shared_memory(store):
    base = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(base.clone())
    store.save(1, {"m": {"t": base.t(), "row": base[1], "same": base, "p": parameter}}, {})
    found = store.load_latest().tensors["m"]
    assert torch.equal(found["t"], base.t())
    assert torch.equal(found["row"], base[1])
    assert torch.equal(found["p"], parameter)
    assert torch.equal(base, torch.arange(12.0).reshape(3, 4))


def test_newest_two_are_kept_by_number_not_by_name_or_time(store):
    for step in (0, 9, 10, 100):
        save(store, step)
        os.utime(store.path(step), (1e9 - step, 1e9 - step))
    assert store.steps() == [10, 100]
    assert_is_step(store.load_latest(), 100)


def test_keep_counts_and_the_one_resumed_from_is_never_dropped(tmp_path):
    for step in (1, 2, 3):
        save(CheckpointStore(tmp_path, keep=3), step)
    resumed = CheckpointStore(tmp_path, keep=2)
    assert_is_step(resumed.load_latest(), 3)
    for step in (4, 5, 6):
        save(resumed, step)
    assert resumed.steps() == [3, 5, 6]


def test_same_step_can_be_saved_again(store):
    save(store, 1)
    store.save(1, {"model": {"x": torch.ones(1)}}, {"second": True})
    assert store.load_latest().state == {"second": True}
    assert leftovers(store.folder) == []


@pytest.mark.parametrize(
    ("step", "tensors", "state", "message"),
    [
        (-1, {}, {}, "'step' got -1"),
        (True, {}, {}, "'step' got True"),
        (1, {"../x": {}}, {}, "'tensors' got key '../x'"),
        (1, {"m": {"x": [1.0]}}, {}, "got list for m['x'], expected a dense tensor"),
        (1, {"m": {"x": torch.eye(2).to_sparse()}}, {}, "got Tensor for m['x'], expected a dense tensor"),
        (1, {}, {"loss": float("nan")}, "state.loss got nan, expected a finite number"),
        (1, {}, {"a": [{"b": object()}]}, "state.a[0].b got object, expected a JSON value"),
        (1, {}, {"a": {1: 2}}, "state.a got key 1, expected text"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(store, step, tensors, state, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        store.save(step, tensors, state)
    assert message in str(caught.value)
    assert not store.folder.exists()


def test_fewer_than_two_checkpoints_cannot_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match="'keep' got 1, expected at least 2"):
        CheckpointStore(tmp_path, keep=1)


@pytest.mark.parametrize(
    "fault", [*SAVE_FAULTS, "save.mid_file:2", "save.mid_file:3", "save.mid_file:4", "save.file:4"]
)
def test_kill_at_any_point_of_a_save_leaves_the_previous_or_the_new_checkpoint(tmp_path, fault):
    for step in (1, 2):
        save(CheckpointStore(tmp_path), step)
    assert child(lambda: save(CheckpointStore(tmp_path), 3), fault) == -signal.SIGKILL
    renamed = fault in ("save.after_rename", "save.before_prune", "save.mid_prune", "save.after_prune")
    after = CheckpointStore(tmp_path)
    assert_is_step(after.load_latest(), 3 if renamed else 2)
    save(after, 4)
    assert_is_step(CheckpointStore(tmp_path).load_latest(), 4)
    assert leftovers(tmp_path) == []


def test_there_are_at_least_ten_points_and_each_of_them_is_passed(tmp_path, monkeypatch):
    passed = []
    monkeypatch.setattr(module, "fault_point", passed.append)
    for step in (1, 2, 3):
        save(CheckpointStore(tmp_path), step)
    assert set(passed) == set(SAVE_FAULTS)
    assert len(SAVE_FAULTS) >= 10


@pytest.mark.parametrize("fault", SAVE_FAULTS)
def test_kill_while_saving_the_first_checkpoint_again_loses_nothing(tmp_path, fault):
    save(CheckpointStore(tmp_path), 1)
    child(lambda: save(CheckpointStore(tmp_path), 1), fault)
    assert_is_step(CheckpointStore(tmp_path).load_latest(), 1)


def test_kill_between_the_two_renames_of_a_replacement_puts_the_old_one_back(tmp_path):
    save(CheckpointStore(tmp_path), 1)

    def replace() -> None:
        rename = os.rename

        def once(source, target):
            rename(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename = once
        save(CheckpointStore(tmp_path), 1)

    assert child(replace) == -signal.SIGKILL
    assert CheckpointStore(tmp_path).steps() == []
    assert_is_step(CheckpointStore(tmp_path).load_latest(), 1)


def test_kill_in_the_very_first_save_is_a_start_from_scratch(tmp_path):
    assert child(lambda: save(CheckpointStore(tmp_path), 1), "save.before_rename") == -signal.SIGKILL
    assert CheckpointStore(tmp_path).load_latest() is None


def test_fault_point_counts_passings_and_ignores_other_names(tmp_path):
    passes = tmp_path / "passes"

    def work() -> None:
        for i in range(5):
            fault_point("other")
            passes.write_text(str(i))
            fault_point("train.step")

    assert child(work, "train.step:3") == -signal.SIGKILL
    assert passes.read_text() == "2"
    assert child(work) == 0


def train(folder: Path, steps: int, result: Path | None = None) -> None:
    """.

    A run with everything a resume must restore: dropout, sampling, shuffling over epochs, NumPy and Python
    noise.
    """
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    shuffler = torch.Generator().manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    data, order, start = torch.randn(10, 4), [], 0
    store = CheckpointStore(folder)
    found = store.load_latest(expect={"size": 8})
    if found is not None:
        start, order = found.step, found.state["order"]
        model.load_state_dict(found.tensors["model"])
        load_optimizer_tensors(optimizer, names, found.tensors["optim"])
        set_rng_state(found.state["rng"], {"shuffler": shuffler})
    losses = found.state["losses"] if found else []
    for step in range(start, steps):
        if len(order) < 3:
            order = torch.randperm(10, generator=shuffler).tolist()
        rows, order = order[:3], order[3:]
        target = torch.rand(()) + random.random() + numpy.random.normal()
        loss = (model(data[rows]) - target).square().mean()
        loss.backward()
        fault_point("train.step")
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 2 == 0:
            state = {"size": 8, "order": order, "losses": losses, "rng": rng_state({"shuffler": shuffler})}
            tensors = {"model": model.state_dict(), "optim": optimizer_tensors(optimizer, names)}
            store.save(step + 1, tensors, state)
    if result is not None:
        result.write_text(json.dumps([losses, {k: v.tolist() for k, v in model.state_dict().items()}]))


@pytest.mark.parametrize(
    "fault",
    [
        "train.step:6",
        "train.step:1",
        "save.mid_file:7",
        "save.before_rename:3",
        "save.after_rename:4",
        "save.mid_prune:2",
    ],
)
def test_killed_run_resumes_to_the_losses_and_weights_of_an_uninterrupted_one(tmp_path, fault):
    assert child(lambda: train(tmp_path / "a", 20, tmp_path / "straight")) == 0
    (tmp_path / "b").mkdir()
    assert child(lambda: train(tmp_path / "b", 20), fault) == -signal.SIGKILL
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    for name in ("b", "c"):  # resumed twice from the same checkpoint
        assert child(lambda name=name: train(tmp_path / name, 20, tmp_path / f"resumed-{name}")) == 0
        assert (tmp_path / f"resumed-{name}").read_text() == (tmp_path / "straight").read_text()
