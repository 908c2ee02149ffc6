from __future__ import annotations

import gc
import json
import logging
import os
import signal

import pytest
from checkpoints import child

from rlhf_fast.train import _run
from rlhf_fast.train.checkpoint import (
    CheckpointError,
    RunLock,
    claim_output,
)


def test_second_run_on_a_folder_is_refused_with_the_process_id(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(CheckpointError, match=rf"in use by this process \(process {os.getpid()}\)"):
            RunLock(tmp_path)

        def other() -> None:
            assert not _run._held
            with pytest.raises(CheckpointError, match=rf"in use by another run \(process {os.getppid()}\)"):
                RunLock(tmp_path)

        assert child(other) == 0
    with RunLock(tmp_path):
        pass


def test_lock_stays_until_release_even_if_nobody_refers_to_it_or_the_file_is_read(tmp_path):
    lock = RunLock(tmp_path)
    (tmp_path / "run.lock").read_bytes()  # closing any handle of the file would end some kinds of lock
    del lock
    gc.collect()

    def other() -> None:
        with pytest.raises(CheckpointError, match="in use by another run"):
            RunLock(tmp_path)

    assert child(other) == 0


def test_lock_of_a_killed_run_is_taken_over_with_a_warning(tmp_path, caplog):
    def killed() -> None:
        RunLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert child(killed) == -signal.SIGKILL
    pid = json.loads((tmp_path / "run.lock").read_text())["pid"]
    with caplog.at_level(logging.WARNING), RunLock(tmp_path):
        assert f"taking over the lock of process {pid}, which is gone" in caplog.text
        assert json.loads((tmp_path / "run.lock").read_text()) == {"pid": os.getpid()}
    caplog.clear()
    with RunLock(tmp_path):
        assert caplog.text == ""


def test_lock_does_not_outlive_the_run_in_a_forked_worker(tmp_path):
    reader, writer = os.pipe()

    def run_with_worker() -> None:
        RunLock(tmp_path)
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)  # until the test ends
            os._exit(0)

    assert child(run_with_worker) == 0
    with RunLock(tmp_path):
        pass
    os.close(writer)
    os.close(reader)


@pytest.mark.parametrize("content", [b"", b"garbage", b"[1]", b'{"pid": "x"}', b"\xff" * 2000])
def test_damaged_lock_file_is_no_obstacle(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text()) == {"pid": os.getpid()}


def test_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/sub: cannot lock"):
        RunLock(tmp_path / "file" / "sub")


def test_used_output_folder_needs_resume_or_overwrite(tmp_path):
    folder = tmp_path / "out"
    claim_output(folder).release()
    claim_output(folder).release()  # only the lock file of before
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"is not empty; give --run\.resume, --run\.overwrite"):
        claim_output(folder)
    claim_output(folder, resume=True).release()
    assert (folder / "metrics.jsonl").exists()
    claim_output(folder, overwrite=True).release()
    assert [p.name for p in folder.iterdir()] == ["run.lock"]


def test_overwrite_never_empties_a_folder_that_no_run_has_made(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="was not made by a run"):
            claim_output(tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="got a file, expected a folder"):
        claim_output(tmp_path / "thesis.tex")


def test_overwrite_waits_for_no_living_run_and_follows_no_link(tmp_path):
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x")
    with claim_output(folder):
        (folder / "link").symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match="in use"):
            claim_output(folder, overwrite=True)
        assert (folder / "link").exists()
    claim_output(folder, overwrite=True).release()
    assert (elsewhere / "kept").read_text() == "x"
