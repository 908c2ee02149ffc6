from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import gone, until

from rlhf_fast import _guarded
from rlhf_fast._guarded import Guarded

# A program with a child of its own, which keeps its parent's end to itself.
PROGRAM = (
    "import os, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
    "print('pids', os.getpid(), child.pid, flush=True)\n"
    "time.sleep(100)\n"
)


def pids(log: Path) -> list[int]:
    until(lambda: log.exists() and "pids" in (text := log.read_text()) and text.endswith("\n"))
    return [int(word) for word in log.read_text().split("pids")[1].split()[:2]]


def start(tmp_path: Path, *command: str) -> Guarded:
    return Guarded(command, log=tmp_path / "log", environment=os.environ)


def test_end_leaves_nothing_of_the_group(tmp_path):
    program = start(tmp_path, sys.executable, "-c", PROGRAM)
    found = pids(tmp_path / "log")
    assert not program.ended
    program.end()
    assert (
        program.ended and "the program was ended by signal 15" in program.last_words()
    )  # asked, not killed after GRACE
    assert all(map(gone, found))
    program.end()  # once more does nothing


def test_a_program_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + PROGRAM
    monkeypatch.setattr(_guarded, "GRACE", -1.5)  # of this side; the guard's own is longer
    program = start(tmp_path, sys.executable, "-c", deaf)
    found = pids(tmp_path / "log")
    program.end()
    assert all(map(gone, found))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_it_ends_with_its_parent_however_that_dies(tmp_path, number):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom rlhf_fast._guarded import Guarded\n"
        f"program = Guarded([sys.executable, '-c', {PROGRAM!r}], log=Path({str(tmp_path / 'log')!r}), environment=os.environ)\n"
        "if os.fork() == 0:\n    os.execvp('sleep', ['sleep', '60'])\n"  # a child that outlives it has no hold on the program
        "print('ready', flush=True)\nsys.stdin.read()\n"
        "os.kill(program._process.pid, 9)\nos._exit(0)\n"  # as workers of Ray do with their children
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(_guarded.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    ) as parent:
        assert parent.stdout.readline() == b"ready\n"
        found = pids(tmp_path / "log")
        if number is None:
            parent.stdin.close()
        else:
            parent.send_signal(number)
        parent.wait()
        assert all(map(gone, found))
        os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("raise SystemExit(3)", 3, "ended with status 3"),
        ("import os; os.kill(os.getpid(), 11)", -11, "was ended by signal 11"),
        ("print('the program ended with status 4')", 0, "ended with status 0"),
    ],
)
def test_the_log_ends_with_how_it_ended(tmp_path, code, status, told):
    program = start(tmp_path, sys.executable, "-c", "print('hello', flush=True); " + code)
    while not program.ended:
        time.sleep(0.01)
    words = program.last_words().splitlines()
    assert words[:2] == [f"the end of {tmp_path / 'log'}:", "hello"] and words[-1] == f"the program {told}"
    assert program.status == status


def test_a_program_may_take_its_time_to_end(tmp_path):
    code = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(7))\nprint('pids', 0, 0, flush=True)\ntime.sleep(100)"
    program = start(tmp_path, sys.executable, "-c", code)
    pids(tmp_path / "log")
    assert program.status is None
    program.ask_to_end()
    until(lambda: program.ended)
    assert program.status == 7


def test_a_program_that_is_not_there(tmp_path):
    program = start(tmp_path, "/no/such/program")
    while not program.ended:
        time.sleep(0.01)
    assert "/no/such/program: No such file or directory" in program.last_words()
