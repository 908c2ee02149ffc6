from __future__ import annotations

import io
import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from rlhf_fast.train import monitor as module
from rlhf_fast.train.monitor import Monitor, read_json_lines

ROWS = [{"prompt": "The film", "completion": " was fine", "reward": 0.25, "length": 3}]
RUN = """
import sys
from rlhf_fast.train.monitor import Monitor
from rlhf_fast.train import monitor
monitor.PLAIN_INTERVAL = 0.0
with Monitor(sys.argv[1], 4, "ppo") as mon:
    for step in range(1, 5):
        mon.log(step, {"reward": step / 4})
        mon.samples(step, [{"prompt": "p \\u2013 q", "completion": "caf\\u00e9 " * 30, "reward": 0.5}])
        mon.advance(step, tokens=10, text=f"reward {step / 4:.2f}")
"""


def show(width: int = 100, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False, markup=False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move by hand."""

    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr(module.time, "monotonic", made)
    return made


@pytest.fixture(autouse=True)
def no_tensorboard(request, monkeypatch):
    """TensorBoard takes seconds to import; the tests about it ask for it by their name."""
    if "tensorboard" not in request.node.name:
        monkeypatch.setattr(Monitor, "_open_tensorboard", lambda self: Mock())


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_metrics_are_one_json_object_per_line(tmp_path):
    with Monitor(tmp_path, 2, "sft", console=show()) as mon:
        mon.log(1, {"loss": torch.tensor(0.5), "lr": 1})
        mon.log(2, {"loss": float("nan"), "lr": float("inf")})
    rows = read_json_lines(tmp_path / "metrics.jsonl")
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows] == [
        {"step": 1, "loss": 0.5, "lr": 1.0},
        {"step": 2, "loss": None, "lr": None},
    ]
    assert all(abs(row["time"] - time.time()) < 60 for row in rows)


def test_metrics_can_be_read_while_the_run_goes_on(tmp_path):
    with Monitor(tmp_path, 2, "sft", console=show()) as mon:
        mon.log(1, {"loss": 0.5})
        assert read_json_lines(tmp_path / "metrics.jsonl")[0]["loss"] == 0.5


def test_value_that_is_no_number_is_refused_by_name(tmp_path):
    with (
        Monitor(tmp_path, 2, "sft", console=show()) as mon,
        pytest.raises(TypeError, match="got str for 'loss', expected a number"),
    ):
        mon.log(1, {"loss": "low"})


def test_tensorboard_holds_the_same_scalars(tmp_path):
    with Monitor(tmp_path, 2, "sft", console=show()) as mon:
        mon.log(1, {"loss/train": 0.5})
        mon.log(2, {"loss/train": 0.25, "kl": 1.0})
    assert scalars(tmp_path / "tensorboard") == {"loss/train": [(1, 0.5), (2, 0.25)], "kl": [(2, 1.0)]}


def test_resume_from_an_earlier_step_leaves_each_step_once_also_in_tensorboard(tmp_path):
    with Monitor(tmp_path, 4, "sft", console=show()) as mon:
        for step in (1, 2, 3):
            mon.log(step, {"loss": step})
            mon.samples(step, ROWS)
    with Monitor(tmp_path, 4, "sft", start_step=2, console=show()) as mon:
        mon.log(3, {"loss": 30})
    assert [row["loss"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 30]
    assert [row["step"] for row in read_json_lines(tmp_path / "samples.jsonl")] == [1, 2]
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_line_torn_by_a_kill_is_removed_and_the_rest_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_json_lines(path)] == [1]
    with Monitor(tmp_path, 4, "sft", start_step=2, console=show()) as mon:
        mon.log(3, {"loss": 3})
    assert [row["step"] for row in read_json_lines(path)] == [1, 3]


def test_plain_output_has_steps_rate_times_and_news(tmp_path, clock):
    console = show()
    with Monitor(tmp_path, 100, "ppo", console=console) as mon:
        clock.now += 10
        mon.advance(1, tokens=5000, text="reward 0.31 kl 2.1")
        clock.now += 2
        mon.advance(2, tokens=5000, text="too soon for another line")
        clock.now += 8
        mon.advance(3, tokens=5000, text="reward 0.40 kl 2.3")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "ppo  1/100  500 tok/s  elapsed 0:00:10  left 0:16:30  reward 0.31 kl 2.1"
    assert lines[1] == "ppo  3/100  750 tok/s  elapsed 0:00:20  left 0:10:46  reward 0.40 kl 2.3"
    assert len(lines) == 2


def test_last_line_is_always_shown(tmp_path, clock):
    console = show()
    with Monitor(tmp_path, 3, "sft", console=console) as mon:
        for step in (1, 2, 3):
            clock.now += 1
            mon.advance(step, tokens=1)
    assert console.file.getvalue().splitlines()[-1].startswith("sft  3/3  1 tok/s  elapsed 0:00:03  left 0:00:00")


def test_rates_come_from_the_last_steps_and_from_this_process_only(tmp_path, clock):
    with Monitor(tmp_path, 1000, "ppo", start_step=500, console=show()) as mon:
        assert (mon.tokens_per_second, mon.remaining) == (0.0, None)
        for step in range(501, 541):
            slow = step <= 520
            clock.now += 100 if slow else 2
            mon.advance(step, tokens=100)
        assert mon.tokens_per_second == 50.0
        assert mon.remaining == 460 * 2.0
        clock.now += 30
        assert mon.remaining == 460 * 2.0 - 30
        assert mon.elapsed == 20 * 100 + 20 * 2 + 30


def test_jumps_of_the_wall_clock_do_not_matter(tmp_path, clock, monkeypatch):
    with Monitor(tmp_path, 10, "sft", console=show()) as mon:
        for step, wall in enumerate((2e9, 0.0, -5e9), start=1):
            monkeypatch.setattr(module.time, "time", lambda wall=wall: wall)
            clock.now += 1
            mon.log(step, {"loss": 1.0})
            mon.advance(step, tokens=10)
        assert (mon.tokens_per_second, mon.remaining, mon.elapsed) == (10.0, 7.0, 3.0)
    assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_terminal_gets_a_bar_with_the_same_facts(tmp_path, clock):
    console = show(terminal=True)
    with Monitor(tmp_path, 4, "ppo", console=console) as mon:
        clock.now += 5
        mon.advance(2, tokens=6000, text="reward 0.31")
        clock.now += 1
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    last = drawn.strip().splitlines()[-1]
    assert "\u2501" * 10 in last
    assert re.search(r"^ppo .* 2/4 1,200 tok/s 0:00:06 left 0:00:04 reward 0\.31", last)


def test_sample_table_shows_text_exactly_and_the_file_keeps_all_of_it(tmp_path):
    console = show(width=100)
    long = "x" * 1000
    rows = [
        {"prompt": "A [bold]film[/bold]", "completion": "one\ntwo", "reward": torch.tensor(0.5), "kl": None},
        {"prompt": long + "END", "completion": "BEGIN" + long, "reward": float("nan"), "judge": True, "n": 3},
    ]
    with Monitor(tmp_path, 4, "ppo", console=console) as mon:
        mon.samples(7, rows)
    shown = console.file.getvalue()
    assert "ppo step 7" in shown
    assert "A [bold]film[/bold]" in shown
    assert "0.500" in shown
    assert "BEGINxxx" in shown
    assert "xEND" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.count("x") < 600
    stored = read_json_lines(tmp_path / "samples.jsonl")
    assert stored[0] == {
        "step": 7,
        "prompt": "A [bold]film[/bold]",
        "completion": "one\ntwo",
        "reward": 0.5,
        "kl": None,
    }
    assert stored[1]["completion"] == "BEGIN" + long
    assert (stored[1]["reward"], stored[1]["judge"], stored[1]["n"]) == (None, True, 3)


def test_completions_cannot_drive_the_terminal(tmp_path):
    console = show(terminal=True)
    evil = "a\x1b[31mred\x07\x9b2J\u202etxt\r\ud800b\x00"
    with Monitor(tmp_path, 4, "ppo", console=console) as mon:
        mon.samples(1, [{"prompt": evil, "completion": evil, "reward": 0}])
        mon.advance(1, text=evil)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", lambda m: "" if m[0] != "\x1b[31m" else m[0], console.file.getvalue())
    assert "\x1b[31m" not in shown
    assert not set("\x07\x9b\u202e\ud800\x00") & set(shown)
    assert "\\x1b[31mred\\x07" in shown
    assert read_json_lines(tmp_path / "samples.jsonl")[0]["prompt"] == evil


class Broken:
    """A sink of which everything fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str):
        def fail(*_, **__):
            raise self.error

        return fail


@pytest.mark.parametrize("name", ["metrics file", "samples file", "TensorBoard", "console"])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe"), RuntimeError("x\ny")],
)
def test_failing_sink_is_dropped_with_one_warning_and_the_others_go_on(tmp_path, caplog, name, error):
    console = show()
    with caplog.at_level(logging.WARNING), Monitor(tmp_path, 3, "ppo", console=console) as mon:
        mon._sinks[name] = Broken(error)
        for step in (1, 2, 3):
            mon.log(step, {"loss": step})
            mon.samples(step, ROWS)
            mon.advance(step, tokens=1)
    assert [r.message for r in caplog.records if name in r.message] == [
        f"the {name} failed and is dropped; the run goes on ({type(error).__name__}: {' '.join(str(error).split())})"
    ]
    assert len(caplog.records) == 1
    assert ((tmp_path / "metrics.jsonl").read_text().count("\n") == 3) is (name != "metrics file")
    assert ((tmp_path / "samples.jsonl").read_text().count("\n") == 3) is (name != "samples file")
    assert ("ppo step 3" in console.file.getvalue()) is (name != "console")


def test_unwritable_folder_costs_files_and_tensorboard_but_not_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "out"
    with caplog.at_level(logging.WARNING), Monitor(folder, 1, "sft", console=show()) as mon:
        mon.log(1, {"loss": 1})
        mon.samples(1, ROWS)
        mon.advance(1)
    dropped = [r.message.split(" failed")[0] for r in caplog.records]
    assert dropped[:3] == ["the metrics file", "the samples file", "the TensorBoard"]
    assert len(dropped) == len(set(dropped))


def test_missing_tensorboard_is_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING), Monitor(tmp_path, 2, "sft", console=show()) as mon:
        mon.log(1, {"loss": 1})
        mon.log(2, {"loss": 1})
    assert [r.message.split(";")[0] for r in caplog.records] == ["the TensorBoard failed and is dropped"]
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 2


def test_error_in_training_passes_through_and_everything_is_closed(tmp_path):
    console = show()
    with pytest.raises(ZeroDivisionError), Monitor(tmp_path, 3, "sft", console=console) as mon:
        mon.log(1, {"loss": 1})
        mon.advance(1)
        raise ZeroDivisionError
    assert mon._sinks == {}
    mon.log(2, {"loss": 1})
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 1


def run(folder, *, stdout, **environment):
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "90", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder)], stdout=stdout, stderr=subprocess.PIPE, env=environment
    )


def test_closed_pipe_on_standard_output_ends_no_run(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    process = run(tmp_path, stdout=writer)
    os.close(writer)
    errors = process.communicate()[1].decode()
    assert process.returncode == 0
    assert errors.count("the console failed and is dropped") == 1
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 4


def test_full_device_on_standard_output_ends_no_run(tmp_path):
    with open("/dev/full", "wb") as full:
        process = run(tmp_path, stdout=full)
        errors = process.communicate()[1].decode()
    assert process.returncode == 0
    assert errors.count("dropped") == 1
    assert len(read_json_lines(tmp_path / "samples.jsonl")) == 4


def read_terminal(process, master: int) -> bytes:
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other side has ended
            chunk = b""
        if not chunk:
            process.wait()
            return output
        output += chunk


@pytest.mark.parametrize("locale", ["C", "en_US.UTF-8"])
def test_real_terminal_shows_bar_and_table_in_its_locale(tmp_path, locale):
    master, slave = pty.openpty()
    process = run(tmp_path, stdout=slave, LC_ALL="", LC_CTYPE="", LANG=locale)
    os.close(slave)
    output = read_terminal(process, master)
    assert process.returncode == 0, process.stderr.read()
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", output).decode()
    assert "4/4" in text
    assert "tok/s" in text
    assert "reward 1.00" in text
    assert text.isascii() is (locale == "C")
    assert ("caf\\xe9" in text) is (locale == "C")
    borders = [line for line in text.splitlines() if line.startswith(("|", "\u2502"))]
    assert {len(line.rstrip()) for line in borders} == {len(borders[0].rstrip())}


def test_clock_shows_hours_without_end():
    assert [module._clock(s) for s in (0, 59.9, 61, 3600, 360_000)] == [
        "0:00:00",
        "0:00:59",
        "0:01:01",
        "1:00:00",
        "100:00:00",
    ]
    assert math.isclose(module.PLAIN_INTERVAL, 5.0)


def test_metrics_file_is_json_that_any_reader_takes(tmp_path):
    with Monitor(tmp_path, 1, "sft", console=show()) as mon:
        mon.log(1, {"\u00e9 \u2028": 1e-300})
    (line,) = (tmp_path / "metrics.jsonl").read_text(encoding="ascii").splitlines()
    assert json.loads(line)["\u00e9 \u2028"] == 1e-300
