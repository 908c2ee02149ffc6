"""The before/after table and the samples of a report on the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_fast.evaluate.statistics import Comparison, Interval
from rlhf_fast.report.content import Report, Sample, verdict
from rlhf_fast.report.page import duration, printable
from rlhf_fast.report.svg import number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

__all__ = ["console_tables", "print_comparisons"]

_WIDE = 110  # columns from which units and the intervals of both sides fit
_STYLES = {"better": "green", "worse": "red", "unclear": "dim", "": ""}


def console_tables(report: Report, console: Console | None = None, *, samples: int = 10) -> None:
    """Print the comparison, the time per stage and up to ``samples`` samples.

    Standard output unless a ``console`` is given. Under 110 columns the table leaves out units and the
    intervals of both sides; those of the change and of the win rate stay.
    """
    from rich.console import Console

    console = console or Console()
    encoding = console.encoding
    if report.comparisons:
        console.print(_comparisons(report, encoding, console.width))
    if report.stages:
        console.print(_stages(report, encoding))
    for sample in report.samples[:samples]:
        console.print(_sample(sample, report, encoding))


def print_comparisons(
    comparisons: Sequence[Comparison],
    *,
    before: str,
    after: str,
    confidence: float = 0.95,
    console: Console | None = None,
) -> None:
    """Print the before/after table alone; ``before`` and ``after`` name its columns."""
    report = Report("", comparisons=comparisons, before_label=before, after_label=after, confidence=confidence)
    console_tables(report, console)


def _comparisons(report: Report, encoding: str, width: int) -> Table:
    from rich.table import Table

    wide = width >= _WIDE
    table = Table(title=f"{100 * report.confidence:.4g} % intervals over prompts", **_table_style())
    # No column may end in an ellipsis: a terminal without Unicode cannot print one.
    table.add_column("metric", overflow="fold")
    for heading in (report.before_label, report.after_label, "change", "win rate"):
        table.add_column(_text(heading, encoding), justify="right", no_wrap=True, overflow="crop")
    table.add_column("verdict", no_wrap=True, overflow="crop")
    for row in report.comparisons:
        outcome = verdict(row)
        metric = _text(row.metric, encoding)
        if row.unit and wide:
            metric.append_text(_text(f"\n{row.unit}", encoding, "dim"))
        table.add_row(
            metric,
            _cell(row.before, limits=wide),
            _cell(row.after, limits=wide),
            _cell(row.difference, sign=True),
            _cell(row.win_rate, percent=True),
            _text(outcome, encoding, _STYLES[outcome]),
        )
    return table


def _cell(interval: Interval | None, *, percent: bool = False, sign: bool = False, limits: bool = True) -> Text:
    from rich.text import Text

    if interval is None:
        return Text()
    value, low, high = (
        f"{100 * x:.1f}" if percent else number(x) for x in (interval.value, interval.low, interval.high)
    )
    cell = Text(("+" if sign and interval.value > 0 else "") + value + (" %" if percent else ""))
    return cell.append(f"\n[{low}, {high}]", style="dim") if limits and interval.has_range else cell


def _stages(report: Report, encoding: str) -> Table:
    from rich.table import Table

    table = Table(title="time per stage", **_table_style())
    table.add_column("stage")
    table.add_column("time", justify="right")
    for stage in report.stages:
        table.add_row(_text(stage.name, encoding), duration(stage.seconds))
    table.add_row("total", duration(sum(stage.seconds for stage in report.stages)), style="bold")
    return table


def _sample(sample: Sample, report: Report, encoding: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.ROUNDED, show_header=False, expand=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1, overflow="fold")
    table.add_row("prompt", _text(sample.prompt, encoding, "bold"))
    sides = (
        (report.before_label, sample.before, sample.before_scores),
        (report.after_label, sample.after, sample.after_scores),
    )
    for label, answer, scores in sides:
        cell = _text(answer.strip(), encoding)
        if scores:
            figures = "  ".join(f"{name} {number(value)}" for name, value in scores.items())
            cell.append_text(_text(f"\n{figures}", encoding, "dim"))
        table.add_row(_text(label, encoding), cell)
    return table


def _table_style() -> dict[str, Any]:
    from rich import box

    return {"box": box.SIMPLE_HEAD, "padding": (0, 1), "title_style": "bold"}


def _text(text: str, encoding: str, style: str = "") -> Text:
    """Text, never str: a completion may hold console markup, control codes, or letters the terminal lacks."""
    from rich.text import Text

    shown = text.encode(encoding, "replace").decode(encoding)
    return Text(printable(shown, "?"), style=style)
