"""What a run shows and records: progress bar, metrics in JSONL and TensorBoard, sampled completions.

A sink that fails (disk full, closed pipe, missing package) is dropped with one warning; training goes on.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "tensorboard"
PLAIN_INTERVAL = 5.0
"""Seconds between lines where the output is not a terminal."""
SHOWN_CHARACTERS = {"prompt": 160, "completion": 400}
"""Longest text of a table cell; the files keep all of it."""
_WINDOW = 20
# Control characters, which could drive the terminal, and marks that reverse the writing direction.
_UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_log = logging.getLogger(__name__)


class Monitor:
    """Sinks of one run, open inside a `with` block.

    folder: gets metrics.jsonl, samples.jsonl (one JSON object per line) and tensorboard/. total_steps:
    where the bar ends. title: what the bar is called. start_step: step the run resumes from; later lines of
    an earlier attempt are removed, so that each step stands once. console: where to show things (standard
    output). silent: show and record nothing, on a rank that is not the first.
    """

    def __init__(
        self,
        folder: str | Path,
        total_steps: int,
        title: str,
        *,
        start_step: int = 0,
        console: Console | None = None,
        silent: bool = False,
    ) -> None:
        self.folder, self.total_steps, self.title = Path(folder), total_steps, title
        self.start_step = start_step
        self._console, self._silent = console, silent
        self._sinks: dict[str, Any] = {}
        self._files: set[str] = set()
        self._step = start_step
        self._note = ""
        self._shown = -math.inf

    def __enter__(self) -> Monitor:
        self._start_clock()
        if self._silent:
            return self
        self._open("metrics file", lambda: _JsonLines(self.folder / METRICS, self.start_step))
        self._open("samples file", lambda: _JsonLines(self.folder / SAMPLES, self.start_step))
        self._open("TensorBoard", self._open_tensorboard)
        self._open("console", lambda: _Screen(self._console, self))
        self._start_clock()  # TensorBoard takes seconds to import
        return self

    def _start_clock(self) -> None:
        # A clock that only goes forward: a changed wall clock must not bend rates.
        self._began = time.monotonic()
        self._ticks: deque[tuple[float, int, int]] = deque([(self._began, self._step, 0)], maxlen=_WINDOW + 1)
        self._tokens = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self._step > self.start_step:
            self._use("console", lambda screen: screen.progress(self._line(), last=True))
        for name in list(self._sinks):
            self._use(name, lambda sink: sink.close())
        self._sinks.clear()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers of a step. A number that is not finite becomes null in the file.

        Raises TypeError for a value that is not a number.
        """
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError):
                got = f"{type(value).__name__} for {name!r}"
                raise TypeError(f"Monitor.log: argument 'metrics' got {got}, expected a number") from None
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._use("metrics file", lambda file: file.write({"step": step, "time": round(time.time(), 3), **finite}))

        def scalars(writer: Any) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        self._use("TensorBoard", scalars)

    def advance(self, step: int, *, tokens: int = 0, text: str = "") -> None:
        """Move the bar to `step` steps done.

        Tokens: processed since the last call. text: short news of the run.
        """
        self._step, self._note = step, _safe(text)
        self._tokens += tokens
        self._ticks.append((time.monotonic(), step, self._tokens))
        self._use("console", lambda screen: screen.progress(self._line()))

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """.

        Show and record sampled completions: mappings with prompt, completion, reward and any further
        columns.
        """
        copies = [dict(row) for row in rows]
        lines = [{"step": step, **{name: _plain(value) for name, value in row.items()}} for row in copies]
        self._use("samples file", lambda file: [file.write(line) for line in lines])
        self._use("console", lambda screen: screen.samples(f"{self.title} step {step}", copies))

    def lines(self, file: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Record JSON objects of a step in a further file of the folder, made when it is first named."""
        if file not in self._files and not self._silent:
            self._files.add(file)
            self._open(file, lambda: _JsonLines(self.folder / file, self.start_step))
        copies = [{"step": step, **row} for row in rows]
        self._use(file, lambda sink: [sink.write(row) for row in copies])

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps; 0 before the first."""
        (t0, _, n0), (t1, _, n1) = self._ticks[0], self._ticks[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the run began or resumed."""
        return time.monotonic() - self._began

    @property
    def remaining(self) -> float | None:
        """Seconds to the last step at the pace of the last steps, counted down since then.

        None before the first.
        """
        (t0, s0, _), (t1, s1, _) = self._ticks[0], self._ticks[-1]
        if s1 <= s0:
            return None
        return max(0.0, (self.total_steps - s1) * (t1 - t0) / (s1 - s0) - (time.monotonic() - t1))

    def _line(self) -> dict[str, str]:
        rate, left = self.tokens_per_second, self.remaining
        return {
            "title": self.title,
            "steps": f"{self._step}/{self.total_steps}",
            "rate": f"{rate:,.0f} tok/s" if rate else "",
            "elapsed": _clock(self.elapsed),
            "left": "-:--:--" if left is None else _clock(left),
            "note": self._note,
        }

    def _open(self, name: str, make: Callable[[], Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sinks[name] = make()
        except Exception as error:
            _warn(name, error)

    def _use(self, name: str, action: Callable[[Any], object]) -> None:
        sink = self._sinks.get(name)
        if sink is None:
            return
        try:
            action(sink)
        except Exception as error:
            del self._sinks[name]
            _warn(name, error)
            if isinstance(sink, _Screen):
                sink.abandon()

    def _open_tensorboard(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        purge = self.start_step + 1 if self.start_step else None
        return SummaryWriter(str(self.folder / TENSORBOARD), purge_step=purge, flush_secs=10)


def _warn(name: str, error: Exception) -> None:
    message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    _log.warning("the %s failed and is dropped; the run goes on (%s)", name, message)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, samples.jsonl and the like; a last line cut short by a kill is left out."""
    lines = Path(path).read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


class _JsonLines:
    """Appends JSON lines, each in one write.

    Opening removes a torn last line and lines after `start_step`.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        if path.exists():
            kept = [row for row in read_json_lines(path) if row["step"] <= start_step]
            content = b"".join(_encode(row) for row in kept)
            if content != path.read_bytes():
                new = path.with_suffix(".new")
                new.write_bytes(content)
                os.replace(new, path)
        self._file: BinaryIO = open(path, "ab", buffering=0)  # noqa: SIM115  closed by the monitor

    def write(self, row: Mapping[str, Any]) -> None:
        line = _encode(row)
        if self._file.write(line) != len(line):
            raise OSError("short write")

    def close(self) -> None:
        self._file.close()


def _encode(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


class _Screen:
    """The console: a live bar on a terminal, else a plain line every few seconds."""

    def __init__(self, console: Console | None, monitor: Monitor) -> None:
        self._wrapper: io.TextIOWrapper | None = None
        self._console = console or self._standard_console()
        # Escaped before the layout, else escapes would bend columns; rich's own ellipsis is not ASCII either.
        self._ascii = not self._console.encoding.startswith("utf")
        self._plain_at = -math.inf
        self._plain_last: dict[str, str] | None = None
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24 if self._console.width >= 100 else 10),
                *(_Live(monitor, key) for key in ("steps", "rate", "elapsed", "left")),
                _Live(
                    monitor,
                    "note",
                    Column(ratio=1, no_wrap=True, overflow="crop" if self._ascii else "ellipsis"),
                ),
                console=self._console,
                refresh_per_second=2,
                expand=True,
            )
            self._task = self._progress.add_task(monitor.title, total=monitor.total_steps, completed=monitor.start_step)
            self._progress.start()

    def _standard_console(self) -> Console:
        stream = sys.stdout
        buffer = getattr(stream, "buffer", None)
        if _ascii_only(stream) and buffer is not None:
            stream.flush()
            self._wrapper = io.TextIOWrapper(buffer, "ascii", "backslashreplace", write_through=True)
            return _console(self._wrapper, stream.isatty())
        return _console(stream, stream.isatty())

    def progress(self, line: Mapping[str, str], last: bool = False) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=int(line["steps"].split("/")[0]), refresh=True)
            return
        now = time.monotonic()
        if now - self._plain_at < PLAIN_INTERVAL and not last:
            return
        news = {k: v for k, v in line.items() if k not in ("elapsed", "left", "rate")}
        if last and news == self._plain_last:
            return
        self._plain_at, self._plain_last = now, news
        parts = [
            line["title"],
            line["steps"],
            line["rate"],
            f"elapsed {line['elapsed']}",
            f"left {line['left']}",
        ]
        text = "  ".join(filter(None, [*parts, line["note"]]))
        self._console.print(Text(text), soft_wrap=True)
        self._console.file.flush()

    def samples(self, title: str, rows: list[dict[str, Any]]) -> None:
        self._console.print(_table(title, rows, self._ascii))
        self._console.file.flush()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._wrapper is not None:
            self._wrapper.detach()

    def abandon(self) -> None:
        """Stop drawing on an output that is gone, and keep the interpreter from failing on it at exit."""
        try:
            if self._progress is not None:
                self._progress.live.stop()
        except Exception:
            _log.debug("the bar could not be stopped", exc_info=True)
        try:
            if self._console.file in (sys.stdout, self._wrapper):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, sys.stdout.fileno())
                os.close(null)
        except (OSError, ValueError):
            _log.debug("standard output could not be redirected", exc_info=True)


class _Live(ProgressColumn):
    """One field of the monitor's line, fresh at every redraw."""

    def __init__(self, monitor: Monitor, key: str, column: Column | None = None) -> None:
        super().__init__(column or Column(no_wrap=True))
        self._monitor, self._key = monitor, key

    def render(self, task: Task) -> Text:
        text = self._monitor._line()[self._key]
        return Text(f"left {text}" if self._key == "left" else text, style="dim" if self._key == "elapsed" else "")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would end the program here


def _console(stream: Any, terminal: bool) -> Console:
    width = None if terminal or os.environ.get("COLUMNS") else 110
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def _ascii_only(stream: Any) -> bool:
    """The user asked for the C locale, or the output cannot carry more. Python itself turns C into UTF-8."""
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG") or ""
    return not encoding.startswith("utf") or locale in ("C", "POSIX")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _safe(text: str) -> str:
    return _UNSAFE.sub(lambda m: " " if m[0] in "\t\r" else m[0].encode("unicode_escape").decode(), text)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return (value if isinstance(value, int) else number) if math.isfinite(number) else None


def _table(title: str, rows: list[dict[str, Any]], ascii_only: bool) -> Table:
    names = list(dict.fromkeys(["prompt", "completion", "reward", *(name for row in rows for name in row)]))
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in names:
        text = name in SHOWN_CHARACTERS
        width = 40 if name == "prompt" else None
        table.add_column(name, justify="left" if text else "right", max_width=width, overflow="fold", no_wrap=not text)
    for row in rows:
        cells = [_cell(name, row.get(name, "")) for name in names]
        if ascii_only:
            cells = [cell.encode("ascii", "backslashreplace").decode() for cell in cells]
        table.add_row(*map(Text, cells))
    return table


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, str):
        value = _plain(value)
        return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
    limit = SHOWN_CHARACTERS.get(name, 60)
    if len(value) > limit:
        # The end of a prompt and the beginning of a completion are what meet.
        value = f"...{value[-limit:]}" if name == "prompt" else f"{value[:limit]}..."
    return _safe(value)
