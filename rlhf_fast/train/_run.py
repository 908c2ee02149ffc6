"""One process per output folder, and the points at which tests kill it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import BinaryIO

from rlhf_fast import _env

LOCK = "run.lock"
_log = logging.getLogger(__name__)
_held: dict[str, BinaryIO] = {}  # keeps a lock that nobody refers to any more
_passed: dict[str, int] = {}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used or written, or its folder belongs to another run."""


def fault_point(name: str) -> None:
    """Kill this process (SIGKILL) if RLHF_FAST_FAULT="name[:nth]" names this point, at its nth passing."""
    fault = _env.get("FAULT")
    if fault is None:
        return
    wanted, _, nth = fault.partition(":")
    if wanted == name:
        _passed[name] = _passed.get(name, 0) + 1
        if _passed[name] == int(nth or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def alive(pid: int) -> bool:
    """True if a process of this id exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there, but another user's
        return True
    return True


def _forget_locks() -> None:
    # A forked worker would keep the lock alive after the run's end through its copy of the open file.
    for file in _held.values():
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


class RunLock:
    """Exclusive use of a folder by this process, from construction to `release` or the end of a `with` block.

    The lock is the kernel's, on `run.lock` in the folder, so it ends with the process however that dies;
    the id written in the file is for messages. Raises CheckpointError if another process, or this one,
    holds it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file: BinaryIO | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._key = os.path.realpath(self.folder)
            if self._key in _held:
                raise CheckpointError(f"{folder}: in use by this process (process {os.getpid()}) already")
            file = open(self.folder / LOCK, "a+b")  # noqa: SIM115  closed by release
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot lock: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = _owner(file)
            file.close()
            raise CheckpointError(f"{folder}: in use by another run (process {owner or 'unknown'})") from None
        stale = _owner(file)
        if stale is not None:
            _log.warning("%s: taking over the lock of process %d, which is gone", folder, stale)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid()}).encode())
        file.flush()
        self._file = file
        _held[self._key] = file

    def release(self) -> None:
        """Give the folder back. The empty lock file stays, since removing it would race with the next run."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(0)
            self._file.close()
            self._file = None
            _held.pop(self._key, None)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _owner(file: BinaryIO) -> int | None:
    try:
        file.seek(0)
        return int(json.loads(file.read(1000))["pid"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def claim_output(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> RunLock:
    """Lock the output folder of a run, made if need be.

    A folder that holds anything is refused unless resume, or overwrite, which empties it; and only a folder
    that a run has used before is ever emptied. Raises CheckpointError.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{folder}: got a file, expected a folder")
    try:
        path.parent.mkdir(
            parents=True, exist_ok=True
        )  # "new/../used" is not there before its parent, and is "used" after it
        content = os.listdir(path) if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from None
    if set(content) - {LOCK} and not resume:
        if not overwrite:
            raise CheckpointError(f"{folder}: is not empty; give --run.resume, --run.overwrite or another folder")
        if LOCK not in content:
            raise CheckpointError(f"{folder}: was not made by a run, so --run.overwrite does not empty it")
    lock = RunLock(path)
    if overwrite:
        for name in set(os.listdir(path)) - {LOCK}:
            child = path / name
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            else:
                child.unlink()
    return lock
