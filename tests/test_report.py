"""The HTML report and its console tables."""

from __future__ import annotations

import io
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from rlhf_fast.evaluate.statistics import compare
from rlhf_fast.report import (
    Chart,
    Comparison,
    Interval,
    Report,
    Sample,
    Series,
    Stage,
    console_tables,
    machine_facts,
    print_comparisons,
    read_metrics,
    render,
    write_report,
)
from rlhf_fast.report.content import Curve, charts_of, curves_of, verdict
from rlhf_fast.report.page import duration
from rlhf_fast.report.svg import compact, line_chart, number, ticks

EVIL = "<script>alert('x')</script> \"&amp;\" [red]m[/red] \x1b[31m\x07 \ud800 é"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements in order, their text, and whether every one was closed by its own end tag."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and all(a.get(k) == v for k, v in attributes.items()) for t, a in self.tags)


def ppo_records(steps: int = 30) -> list[dict[str, float]]:
    return [
        {
            "step": i + 1,
            "time": 1e9 + i,
            "score": i / 10,
            "reward": i / 20,
            "judge/IMDb half B": 0.5 + i / 100,
            "judge/VADER": -0.1 + i / 50,
            "kl": i / 3,
            "entropy": 3 - i / 50,
            "ppo/clip_fraction": 0.1,
            "ppo/value_clip_fraction": 0.0,
            "ppo/explained_variance": -0.2 + i / 30,
            "length": 24.0,
            "tokens_per_second": 400.0 + i,
        }
        for i in range(steps)
    ]


@pytest.fixture
def report() -> Report:
    generator = np.random.default_rng(0)
    before = generator.normal(0, 1, 60)
    return Report(
        title="A run & its results",
        summary="One summary.",
        comparisons=[
            compare("half B", before, before + 0.5, description="a classifier"),
            compare("lexicon", before, before - 0.5),
            compare("coin", before, generator.normal(0, 1, 60)),
            compare("KL", np.zeros(60), np.full(60, 9.5), higher_is_better=None, group="Price", unit="nats"),
            Comparison("distinct-2", Interval(0.81), Interval(0.7), group="Price"),
        ],
        samples=[Sample("A prompt", " was bad", " was good", {"half B": 0.25}, {"half B": 0.875})],
        stages=[
            Stage("SFT", 61.0, [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.5}], {"rate": "0.001"}),
            Stage("PPO", 3725.0, ppo_records()),
        ],
        configuration={"seed": 0, "optim": {"lr": 0.001, "betas": (0.9, 0.95)}},
        machine={"Processor": "some CPU"},
        notes=["Human preference was not measured."],
        command="make demo",
        before_label="SFT",
        after_label="PPO",
    )


# --- the page


def test_the_page_is_well_formed_and_says_everything_it_was_given(report):
    page = Page(render(report))
    assert page.open == []
    for text in (
        "A run & its results",
        "One summary.",
        "make demo",
        "half B",
        "a classifier",
        "Price",
        "A prompt",
        " was bad",
        " was good",
        "0.250",
        "0.875",
        "1 min 01 s",
        "1 h 02 min",
        "optim.betas",
        "(0.9, 0.95)",
        "some CPU",
        "Human preference was not measured.",
    ):
        assert text in page.text, text


def test_the_page_loads_nothing_and_runs_nothing(report):
    html = render(report)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript:|\ssrc=|\shref=|\son\w+=", html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "form", "a"})
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_text_from_outside_is_escaped_and_freed_of_control_characters(tmp_path):
    evil = Report(
        title=EVIL,
        summary=EVIL,
        comparisons=[Comparison(EVIL, Interval(1.0), Interval(2.0), group=EVIL, unit=EVIL, description=EVIL)],
        samples=[Sample(EVIL, EVIL, EVIL, {EVIL: 1.0}, {EVIL: 2.0})],
        stages=[Stage(EVIL, 1.0, [{"step": 1, EVIL: 1.0}, {"step": 2, EVIL: 2.0}], {EVIL: EVIL}, EVIL)],
        configuration={EVIL: EVIL},
        machine={EVIL: EVIL},
        notes=[EVIL],
        command=EVIL,
        before_label=EVIL,
        after_label=EVIL,
    )
    page = Page(write_report(tmp_path / "r.html", evil).read_text(encoding="utf-8"))
    assert page.open == [] and page.count("script") == 0
    clean = "<script>alert('x')</script> \"&amp;\" [red]m[/red] �[31m� � é"
    assert page.text.count(clean) >= 15
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page.text)


def test_charts_carry_their_axis_unit_and_a_spoken_summary(report):
    page = Page(render(report))
    labels = [a["aria-label"] for t, a in page.tags if t == "svg" and a.get("role") == "img"]
    assert "Loss. training: 4.00 at step 1, 3.50 at step 2" in labels
    assert any("IMDb half B: 0.500 at step 1, 0.790 at step 30; VADER: -0.100" in label for label in labels)
    titles = (
        "Reward",
        "Judges",
        "KL to the reference",
        "Entropy",
        "Clip fraction",
        "Response length",
        "Throughput",
    )
    for title in titles:
        assert any(label.startswith(f"{title}.") for label in labels), title
    assert "nats per completion" in page.text and "tokens per second" in page.text
    assert page.text.count("step") >= len(labels)


def test_metrics_that_no_chart_knows_are_still_in_the_table_of_all_metrics():
    stage = Stage("x", 1.0, [{"step": 1, "odd/metric": 1.0}, {"step": 2, "odd/metric": 7.5}])
    page = Page(render(Report("t", stages=[stage])))
    assert "All 1 metrics of this stage" in page.text and "odd/metric" in page.text and "7.50" in page.text


def test_an_empty_report_is_a_title_and_nothing_else():
    page = Page(render(Report("only a title")))
    assert page.open == [] and page.count("table") == page.count("svg") == page.count("h2") == 0


def test_verdicts_follow_the_interval_of_the_difference(report):
    assert [verdict(c) for c in report.comparisons] == ["better", "worse", "unclear", "", ""]
    page = Page(render(report))
    assert "no clear change" in page.text
    assert page.count("span", **{"class": "tag better"}) == page.count("span", **{"class": "tag worse"}) == 1
    falling = Comparison("loss", Interval(2), Interval(1), difference=Interval(-1, -1.5, -0.5), higher_is_better=False)
    assert verdict(falling) == "better"


def test_the_headline_tiles_are_the_win_rates(report):
    page = Page(render(report))
    assert page.count("div", **{"class": "card tile"}) == 3
    assert re.search(r"PPO preferred to SFT by\s*half B\s*100\.0 %", page.text)


def test_a_failed_write_leaves_the_old_page_and_no_scraps(tmp_path, report, monkeypatch):
    path = write_report(tmp_path / "out" / "report.html", Report("old"))

    def broken(report):
        raise RuntimeError("boom")

    monkeypatch.setattr("rlhf_fast.report.page.render", broken)
    with pytest.raises(RuntimeError, match="boom"):
        write_report(path, report)
    assert "old" in path.read_text(encoding="utf-8")
    assert os.listdir(path.parent) == ["report.html"]


# --- metrics


def test_a_resumed_run_counts_each_step_once_and_the_last_record_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0}]
    lines += [{"step": 3, "loss": 1.0}, {"step": 4, "loss": 0.5, "note": "text", "flag": True}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n\n{"step": 5, "lo')
    assert read_metrics(path) == [
        {"step": 1.0, "loss": 3.0},
        {"step": 2.0, "loss": 2.0},
        {"step": 3.0, "loss": 1.0},
        {"step": 4.0, "loss": 0.5},
    ]
    assert read_metrics(None) == []


@pytest.mark.parametrize("line", ["{oops", "[1, 2]", '{"loss": 1.0}', '{"step": "two"}'])
def test_a_malformed_line_is_named_by_file_and_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


def test_values_that_are_not_finite_are_gaps_not_points(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = enumerate(("1.0", "NaN", "2.0", "Infinity"), start=1)
    path.write_text("\n".join(f'{{"step": {i}, "kl": {value}}}' for i, value in values))
    assert curves_of(Stage("x", 1.0, path)) == [Curve("kl", ((1.0, 1.0), (3.0, 2.0)))]
    assert "nan" not in render(Report("t", stages=[Stage("x", 1.0, path)])).lower().replace("nance", "")


def test_a_series_takes_its_first_known_key_and_a_star_matches_all():
    records = [{"step": i, "b": 1.0 * i, "c": 2.0 * i, "j/x": 3.0, "j/y": 4.0} for i in (1, 2)]
    charts = (
        Chart("one", (Series(("a", "b", "c"), "line"),)),
        Chart("star", (Series(("j/*",)),)),
        Chart("none", (Series(("z", "y/*")),)),
    )
    found = charts_of(Stage("x", 1.0, records, charts=charts))
    assert [(chart.title, [c.label for c in curves]) for chart, curves in found] == [
        ("one", ["line"]),
        ("star", ["x", "y"]),
    ]
    assert found[0][1][0].points == ((1.0, 1.0), (2.0, 2.0))


def test_a_single_value_joins_a_line_but_makes_no_chart_of_its_own():
    records = [{"step": 1, "accuracy": 0.5}, {"step": 2, "accuracy": 0.75, "eval_accuracy": 0.7, "kl": 1.0}]
    found = charts_of(Stage("x", 1.0, records))
    assert [chart.title for chart, _ in found] == ["Pair accuracy"]
    assert [c.points for c in found[0][1]] == [((1.0, 0.5), (2.0, 0.75)), ((2.0, 0.7),)]


# --- drawing


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline class="[^"]*" points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in points.split()] for points in found]


def test_a_line_is_drawn_to_scale_inside_its_axes():
    (line,) = polylines(line_chart(Chart("c", ()), [Curve("x", ((0, 0.0), (5, 5.0), (10, 10.0)))]))
    xs, ys = zip(*line, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11) and xs[0] == 52.0
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11) and ys[0] > ys[2]
    assert ys[0] == 196.0 and ys[2] == 14.0  # 0 and 10 are the outer ticks: on the axis and at the top


@pytest.mark.parametrize("points", [((1, 2.0), (2, 2.0)), ((1, 0.0), (2, 0.0)), ((3, -1e-7), (4, 1e9))])
def test_constant_and_extreme_lines_stay_inside_the_drawing(points):
    svg = line_chart(Chart("c", ()), [Curve("x", points)])
    for line in polylines(svg):
        assert all(0 <= x <= 420 and 0 <= y <= 236 and math.isfinite(x + y) for x, y in line)


def test_long_curves_get_a_running_mean_that_halves_their_noise():
    noisy = Curve("x", tuple((i, float(i % 2)) for i in range(40)))
    raw, mean = polylines(line_chart(Chart("c", ()), [noisy]))
    assert len(raw) == len(mean) == 40
    spread = [max(y for _, y in line) - min(y for _, y in line) for line in (raw, mean)]
    assert spread[1] < spread[0] / 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (-0.13, 0.62, [-0.2, 0, 0.2, 0.4, 0.6, 0.8]),
        (3.41, 3.59, [3.4, 3.45, 3.5, 3.55, 3.6]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected, abs=1e-9)


def test_ticks_of_a_constant_surround_it():
    for value in (0.0, 24.0, -3e-5):
        found = ticks(value, value)
        assert found[0] < value < found[-1] and len(found) <= 8


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.000"),
        (-0.0001, "-0.0001"),
        (0.12345, "0.123"),
        (-3.14159, "-3.14"),
        (24, "24.0"),
        (317.4, "317"),
        (12345.6, "12,346"),
        (2e-5, "2e-05"),
        (math.nan, "n/a"),
        (math.inf, "n/a"),
    ],
)
def test_numbers_are_shown_with_three_significant_digits(value, text):
    assert number(value) == text


def test_tick_labels_and_durations_are_short():
    assert [compact(x) for x in (0.0, 1500.0, 2e6, 0.25, 2e-5)] == ["0", "1.5k", "2M", "0.25", "2e-05"]
    assert [duration(s) for s in (0.04, 9.96, 59.7, 61, 3599, 7500)] == [
        "0.0 s",
        "10 s",
        "1 min 00 s",
        "1 min 01 s",
        "59 min 59 s",
        "2 h 05 min",
    ]


# --- console


def printed(call, *, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    call(Console(file=stream, width=width, force_terminal=False))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_the_console_shows_values_intervals_verdicts_samples_and_times(report):
    text = printed(lambda console: console_tables(report, console), width=130)
    row = next(line for line in text.splitlines() if line.strip().startswith("half B"))
    assert "+0.500" in row and "100.0 %" in row and "better" in row
    assert "[0.500, 0.500]" in text and "[100.0, 100.0]" in text and "(nats)" not in text and "nats" in text
    assert "distinct-2" in text and "0.810" in text
    assert "1 min 01 s" in text and "1 h 02 min" in text and "total" in text
    assert "was good" in text and "half B 0.875" in text


def test_a_terminal_of_80_columns_cuts_nothing_off(report):
    text = printed(lambda console: console_tables(report, console))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for word in ("half B", "lexicon", "distinct-2", "better", "worse", "unclear", "[0.500, 0.500]"):
        assert word in text


def test_an_ascii_terminal_and_hostile_text_print_without_error_or_markup():
    evil = Report(
        "t",
        samples=[Sample(EVIL, EVIL, EVIL, {EVIL: 1.0})],
        comparisons=[Comparison(EVIL, Interval(1.0), Interval(2.0))],
        stages=[Stage(EVIL, 1.0)],
        before_label="vorhér",
    )
    for encoding in ("ascii", "utf-8"):
        text = printed(lambda console: console_tables(evil, console), width=160, encoding=encoding)
        assert "[red]m[/red]" in text and "\x1b" not in text and "\x07" not in text
        assert ("é" in text) == (encoding == "utf-8")


def test_the_number_of_samples_on_the_console_is_limited(report):
    many = Report("t", samples=[Sample(f"prompt{i}.", "a", "b") for i in range(5)])
    text = printed(lambda console: console_tables(many, console, samples=2))
    assert "prompt1." in text and "prompt2." not in text


def test_comparisons_can_be_printed_alone(report):
    text = printed(lambda c: print_comparisons(report.comparisons[:1], before="base", after="tuned", console=c))
    assert "base" in text and "tuned" in text and "half B" in text and "time per stage" not in text


def test_machine_facts_name_the_hardware_and_versions_but_no_host_or_user():
    import platform

    import torch

    facts = machine_facts()
    assert facts["PyTorch"] == torch.__version__ and platform.python_version() in facts["System"]
    assert facts["Processor"] and "GiB" in facts["Memory"]
    host = platform.node()
    assert not host or all(host not in value for value in facts.values())
