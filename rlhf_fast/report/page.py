"""The HTML page of a report: one file, no script, nothing loaded from anywhere."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from rlhf_fast.evaluate.statistics import Comparison, Interval
from rlhf_fast.report.content import Report, Sample, Stage, charts_of, curves_of, verdict
from rlhf_fast.report.style import CSS
from rlhf_fast.report.svg import SMOOTH_FROM, line_chart, number, sparkline, win_rate_bar

__all__ = ["duration", "interval_text", "printable", "render", "write_report"]

# The page declares that it loads nothing; a browser then refuses even what a sample text might smuggle in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_VERDICTS = {"better": "better", "worse": "worse", "unclear": "no clear change"}


def write_report(path: Path, report: Report) -> Path:
    """Write the page to ``path`` (complete or not at all) and return it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(render(report))
        os.chmod(scratch, 0o644)  # mkstemp's 0600 would keep a web server or a colleague from reading it
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
    return path


def render(report: Report) -> str:
    """The page as a string. Every text that comes from data or a model is escaped."""
    sections = [
        _head(report),
        _tiles(report),
        _comparison_table(report),
        _samples(report),
        *(_stage_charts(stage) for stage in report.stages),
        _stage_table(report.stages),
        _facts(report),
        _notes(report.notes),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(report.title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n<footer>Written by rlhf_fast. This page is one file and loads nothing.</footer>"
        + "</main></body></html>\n"
    )


def duration(seconds: float) -> str:
    """``48 s``, ``3 min 07 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def interval_text(interval: Interval, *, percent: bool = False) -> tuple[str, str]:
    """(value, ``low to high``); the second is empty where no interval was computed."""

    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else number(value)

    if not interval.has_range:
        return show(interval.value), ""
    return show(interval.value), f"{show(interval.low)} to {show(interval.high)}"


def printable(text: str, instead: str) -> str:
    """Text without control characters (tab and newline stay) and lone surrogates: a model can produce any."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", instead, text)


def _text(value: object) -> str:
    return escape(printable(str(value), "�"))


def _head(report: Report) -> str:
    command = f"<pre><code>{_text(report.command)}</code></pre>" if report.command else ""
    summary = f'<p class="lead">{_text(report.summary)}</p>' if report.summary else ""
    return f"<h1>{_text(report.title)}</h1>{summary}{command}"


def _tiles(report: Report) -> str:
    level = f"({100 * report.confidence:.4g} % interval)"
    tiles: list[str] = []
    for comparison in report.comparisons:
        if comparison.win_rate is not None and len(tiles) < 4:
            value, limits = interval_text(comparison.win_rate, percent=True)
            tiles.append(
                f'<div class="card tile"><div class="name">{_text(report.after_label)} preferred to '
                f"{_text(report.before_label)} by</div><div><strong>{_text(comparison.metric)}</strong></div>"
                f'<div class="big">{value}</div><div class="limits">{limits} {level}</div></div>'
            )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _comparison_table(report: Report) -> str:
    if not report.comparisons:
        return ""
    before, after = report.before_label, report.after_label
    rows, group = [], None
    for comparison in report.comparisons:
        if comparison.group != group:
            group = comparison.group
            rows.append(f'<tr class="group"><th colspan="6" scope="colgroup">{_text(group)}</th></tr>')
        rows.append(_comparison_row(comparison))
    return (
        f"<h2>{_text(before)} and {_text(after)} compared</h2>"
        f"<p>Small figures are {100 * report.confidence:.4g} % bootstrap intervals over prompts. A win rate "
        "of 50 % means that neither is preferred; “no clear change” means that the interval of the change "
        "contains 0.</p>" + _table(["Metric"], [before, after, "Change"], ["Verdict", "Win rate"], rows)
    )


def _comparison_row(comparison: Comparison) -> str:
    small = "".join(f"<small>{_text(t)}</small>" for t in (comparison.unit, comparison.description) if t)
    outcome = verdict(comparison)
    tag = f'<span class="tag {outcome}">{_VERDICTS[outcome]}</span>' if outcome else ""
    figures = (
        _interval(comparison.before),
        _interval(comparison.after),
        _interval(comparison.difference, sign=True),
    )
    return _row(_text(comparison.metric) + small, figures, (tag, _win_rate(comparison.win_rate)))


def _win_rate(rate: Interval | None) -> str:
    if rate is None:
        return ""
    value, limits = interval_text(rate, percent=True)
    clear = "better" if rate.low > 0.5 else "worse" if rate.high < 0.5 else ""
    small = f"<br><small>{limits}</small>" if limits else ""
    bar = win_rate_bar(rate.value, rate.low, rate.high, clear)
    return f'<div class="win">{bar}<span>{value}{small}</span></div>'


def _interval(interval: Interval | None, *, sign: bool = False) -> str:
    if interval is None:
        return ""
    value, limits = interval_text(interval)
    plus = "+" if sign and interval.value > 0 else ""
    return f"{plus}{value}" + (f"<small>{limits}</small>" if limits else "")


def _table(names: Sequence[str], figures: Sequence[str], others: Sequence[str], rows: Iterable[str]) -> str:
    """A scrolling table; ``figures`` head right-aligned columns."""
    columns = [(name, "") for name in names] + [(name, ' class="n"') for name in figures]
    columns += [(name, "") for name in others]
    heads = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in columns)
    body = "".join(rows)
    return f'<div class="card scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(head: str, figures: Iterable[str], others: Iterable[str] = ()) -> str:
    """A table row of finished markup."""
    cells = "".join(f'<td class="n">{cell}</td>' for cell in figures) + "".join(f"<td>{cell}</td>" for cell in others)
    return f'<tr><th scope="row">{head}</th>{cells}</tr>'


def _samples(report: Report) -> str:
    if not report.samples:
        return ""
    cards = "".join(_sample(sample, report) for sample in report.samples)
    return (
        "<h2>Samples</h2><p>The same prompts, answered by both. The prompt is repeated in grey.</p>"
        f'<div class="samples">{cards}</div>'
    )


def _sample(sample: Sample, report: Report) -> str:
    sides = (
        ("before", report.before_label, sample.before, sample.before_scores),
        ("after", report.after_label, sample.after, sample.after_scores),
    )
    given = f'<span class="given">{_text(sample.prompt)}</span>'
    answers = "".join(
        f'<div class="answer {kind}"><div class="who">{_text(label)}</div>'
        f'<p class="text">{given}{_text(answer)}</p>{_chips(scores)}</div>'
        for kind, label, answer, scores in sides
    )
    return f'<article class="card sample"><div class="pair">{answers}</div></article>'


def _chips(scores: Mapping[str, float]) -> str:
    chips = "".join(f"<span>{_text(name)} <b>{number(value)}</b></span>" for name, value in scores.items())
    return f'<div class="chips">{chips}</div>' if chips else ""


def _stage_charts(stage: Stage) -> str:
    figures = []
    for chart, curves in charts_of(stage):
        legend = ""
        if len(curves) > 1:
            entries = "".join(
                f'<span><i class="s{i % 6}"></i>{_text(curve.label)}</span>' for i, curve in enumerate(curves)
            )
            legend = f'<div class="legend">{entries}</div>'
        unit = f'<div class="unit">{_text(chart.unit)}</div>' if chart.unit else ""
        note = f"<figcaption>{_text(chart.note)}</figcaption>" if chart.note else ""
        drawing = line_chart(chart, curves)
        figures.append(f'<figure class="card"><h3>{_text(chart.title)}</h3>{unit}{legend}{drawing}{note}</figure>')
    every = curves_of(stage)
    if not every:
        return ""
    description = f"<p>{_text(stage.description)}</p>" if stage.description else ""
    if any(len(curve.points) >= SMOOTH_FROM for curve in every):
        description += "<p>Thin lines are the single steps, thick lines their running mean.</p>"
    rows = []
    for curve in every:
        values = [value for _, value in curve.points]
        figures_of = (number(x) for x in (values[0], values[-1], min(values), max(values)))
        rows.append(_row(f"<code>{_text(curve.label)}</code>", figures_of, (sparkline(curve),)))
    return (
        f'<h2>Curves: {_text(stage.name)}</h2>{description}<div class="charts">{"".join(figures)}</div>'
        f"<details><summary>All {len(every)} metrics of this stage</summary>"
        + _table(["Metric"], ["First", "Last", "Lowest", "Highest"], ["Course"], rows)
        + "</details>"
    )


def _stage_table(stages: Sequence[Stage]) -> str:
    if not stages:
        return ""
    total = sum(stage.seconds for stage in stages)
    bar = "".join(
        f'<i class="b{i % 6}" style="flex:{max(stage.seconds, total / 400):.2f}"></i>' for i, stage in enumerate(stages)
    )
    columns = list(dict.fromkeys(key for stage in stages for key in stage.details))
    rows = [
        _row(
            f'<span class="swatch b{i % 6}"></span>{_text(stage.name)}',
            (duration(stage.seconds), *(_text(stage.details.get(column, "")) for column in columns)),
        )
        for i, stage in enumerate(stages)
    ]
    rows.append(_row("Total", (duration(total), *("" for _ in columns))))
    return f'<h2>Where the time went</h2><div class="time" aria-hidden="true">{bar}</div>' + _table(
        ["Stage"], ["Time", *columns], [], rows
    )


def _facts(report: Report) -> str:
    cards = []
    for title, entries in (("Machine", report.machine), ("Configuration", _flat(report.configuration))):
        rows = "".join(_row(_text(name), (), (_text(value),)) for name, value in entries.items())
        if rows:
            table = f'<div class="card scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'
            cards.append(f"<div><h2>{title}</h2>{table}</div>")
    return f'<div class="two">{"".join(cards)}</div>' if cards else ""


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in notes)
    return f"<h2>What was measured, and what was not</h2><ul>{items}</ul>" if items else ""


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings as ``a.b.c`` names."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = value
    return flat
