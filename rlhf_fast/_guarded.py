"""A program in a process group of its own that ends with this process, however that dies.

This file is also the program between the two (it imports nothing but the standard library): it waits for the end of what it
started, and for the end of a pipe that this process alone holds open, and then leaves nothing of the group behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE = 10.0
"""Seconds between the request to end and the kill."""
TAIL = 4000
"""Bytes of the log that a message quotes at most."""
_END = re.compile(r"the program (?:was ended by signal|ended with status) (\d+)\s*\Z")
_held: set[int] = set()


def _forget_pipes() -> None:
    # A forked worker would keep the program alive after the end of the process that wanted it.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_pipes)


class Guarded:
    """A program that runs until it ends, `end` is called, or this process is gone; what it prints goes to the file `log`."""

    def __init__(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        watched, hold = os.pipe()
        try:
            with open(log, "wb") as file:
                self._process = subprocess.Popen(
                    [sys.executable, "-ISu", __file__, str(watched), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    pass_fds=(watched,),
                    start_new_session=True,
                    env=dict(environment),
                )
        except BaseException:
            os.close(hold)
            raise
        finally:
            os.close(watched)
        _held.add(hold)
        self._finalizer = weakref.finalize(self, _end, self._process, hold, os.getpid())

    @property
    def ended(self) -> bool:
        """Whether the program is gone."""
        return has_ended(self._process)

    @property
    def status(self) -> int | None:
        """Exit status of the program, minus the signal that ended it; None while it runs, and if nobody saw its end."""
        found = _END.search(self._tail()) if self.ended else None
        return None if found is None else int(found[1]) * (-1 if "by signal" in found[0] else 1)

    def ask_to_end(self) -> None:
        """SIGTERM to the whole group, which may take its time."""
        if not self.ended:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGTERM)

    def last_words(self, lines: int = 15) -> str:
        """The last lines of the log, with its name."""
        return "\n".join([f"the end of {self.log}:", *self._tail().splitlines()[-lines:]])

    def _tail(self) -> str:
        with open(self.log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            return file.read().decode(errors="replace")

    def end(self) -> None:
        """Ask the group to end, kill it if it has not within GRACE, and wait until it is gone."""
        self._finalizer()


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child is gone. It is not reaped: while it is a zombie, no other process can get its number, and with it a kill of ours."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # reaped by somebody else
        return True


def _end(process: subprocess.Popen[bytes], hold: int, owner: int) -> None:
    if os.getpid() != owner:  # a forked child: it is not its own
        return
    _held.discard(hold)
    os.close(hold)
    deadline = time.monotonic() + GRACE + 2
    while not has_ended(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what is left if the guard itself was killed
    process.wait()


def _guard(descriptor: int, command: Sequence[str]) -> None:
    """Run the command; ends with a SIGKILL of the whole group, itself included."""
    try:
        program = subprocess.Popen(command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", flush=True)
        return

    def watch() -> None:
        os.read(descriptor, 1)  # returns when no one holds the other end any more
        os.killpg(0, signal.SIGTERM)
        time.sleep(GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = program.wait()
    how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    print(f"the program {how}", flush=True)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # its own request to the group; a program that is started does not inherit it
    if guard := os.fork():
        # Workers of Ray kill their children, and those alone, when they end: the guard itself is a child of a child.
        os.waitpid(guard, 0)
        os.killpg(0, signal.SIGKILL)
    try:
        _guard(int(sys.argv[1]), sys.argv[2:])
    finally:
        os.killpg(0, signal.SIGKILL)
