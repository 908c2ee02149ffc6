from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import assert_is_step, child, leftovers, save

from rlhf_fast.train import checkpoint as module
from rlhf_fast.train.checkpoint import (
    CheckpointError,
    CheckpointStore,
)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def full_after(monkeypatch, size: int) -> None:
    """A disk that holds `size` more bytes."""
    left = [size]
    original = open

    class Full:
        def __init__(self, file):
            self._file = file

        def write(self, content):
            if len(content) > left[0]:
                self._file.write(content[: left[0]])
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= len(content)
            return self._file.write(content)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

    monkeypatch.setattr(module, "open", lambda *a: Full(original(*a)), raising=False)


@pytest.mark.parametrize("size", [0, 10, 300, 700, -1])
def test_full_disk_is_a_warning_once_and_an_error_the_second_time(store, monkeypatch, caplog, size):
    save(store, 1)
    size = size if size >= 0 else sum(p.stat().st_size for p in store.path(1).iterdir()) - 1
    full_after(monkeypatch, size)
    with caplog.at_level(logging.WARNING):
        assert save(store, 2) is None
    assert "checkpoint not saved: No space left on device; the run goes on" in caplog.text
    assert leftovers(store.folder) == []
    assert_is_step(CheckpointStore(store.folder).load_latest(), 1)
    full_after(monkeypatch, size)
    with pytest.raises(CheckpointError, match=r"step-3: checkpoint not saved: No space left.* \(twice in a row\)"):
        save(store, 3)
    assert store.steps() == [1]
    assert leftovers(store.folder) == []


def test_a_good_save_in_between_forgives_a_failed_one(store, monkeypatch):
    for step in (1, 3):
        with monkeypatch.context() as full:
            full_after(full, 10)
            assert save(store, step) is None
        assert save(store, step + 1) is not None
    assert store.steps() == [2, 4]


def test_file_size_limit_of_the_system_behaves_like_a_full_disk(store):
    save(store, 1)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        big = {"model": {"w": torch.zeros(100_000)}}
        assert store.save(2, big, {}) is None
        assert store.steps() == [1]
        assert leftovers(store.folder) == []
        try:
            store.save(3, big, {})
        except CheckpointError:
            return
        raise AssertionError("the second failure did not stop the run")

    assert child(work) == 0
    assert_is_step(CheckpointStore(store.folder).load_latest(), 1)


def test_too_little_free_space_is_noticed_before_writing(store, monkeypatch, caplog):
    save(store, 1)
    size = sum(p.stat().st_size for p in store.path(1).iterdir())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size - 1))
    monkeypatch.setattr(module, "_write", lambda *_: pytest.fail("wrote"))
    assert save(store, 2) is None
    assert f"{2 * size - 1} bytes free, {2 * size} wanted" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size))
    assert save(store, 2) is not None


def test_read_only_folder_is_a_warning_once_and_an_error_the_second_time(store, monkeypatch, caplog):
    save(store, 1)

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert save(store, 2) is None
    assert "Read-only file system" in caplog.text
    with pytest.raises(CheckpointError, match="twice in a row"):
        save(store, 3)
    monkeypatch.undo()
    assert_is_step(store.load_latest(), 1)


def test_folder_deleted_at_run_time_is_made_again_with_a_warning(store, caplog):
    save(store, 1)
    shutil.rmtree(store.folder)
    with caplog.at_level(logging.WARNING):
        assert save(store, 2) is not None
    assert "was deleted while the run was using it" in caplog.text
    assert_is_step(store.load_latest(), 2)
    shutil.rmtree(store.folder)
    store.folder.write_text("a file in its place")
    assert save(store, 3) is None
    with pytest.raises(CheckpointError, match="twice in a row"):
        save(store, 4)


def test_interrupt_while_saving_leaves_no_rest(store, monkeypatch):
    save(store, 1)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)
    monkeypatch.undo()
    assert leftovers(store.folder) == []
    assert_is_step(store.load_latest(), 1)


def test_a_save_in_progress_of_a_living_process_is_left_alone(store):
    save(store, 1)
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    busy = store.folder / f"step-9.tmp-{other.pid}"
    busy.mkdir()
    save(store, 2)
    assert busy.exists()
    other.communicate()
    save(store, 3)
    assert not busy.exists()


def test_files_then_folder_are_synced_before_the_rename_and_the_parent_after_it(store, monkeypatch):
    events = []
    sync, rename = os.fsync, os.rename

    def record_sync(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def record_rename(source, target):
        events.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    save(store, 1)
    files = ["model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"]
    assert events == [
        *(("sync", name) for name in files),
        ("sync", f"step-1.tmp-{os.getpid()}"),
        ("rename", "step-1"),
        ("sync", "checkpoints"),
    ]
