"""What a report holds: plain dataclasses, the reader of metrics files, and the catalogue of curves."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from rlhf_fast.evaluate.statistics import Comparison

__all__ = [
    "CHARTS",
    "Chart",
    "Curve",
    "Report",
    "Sample",
    "Series",
    "Stage",
    "charts_of",
    "curves_of",
    "machine_facts",
    "read_metrics",
    "verdict",
]

Metrics = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Series:
    """A line of a chart: the first of ``keys`` in the metrics; one ending in ``*`` is a line per match."""

    keys: tuple[str, ...]
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines that share an axis. ``unit`` labels the axis; ``note`` says in a sentence how to read it."""

    title: str
    series: tuple[Series, ...]
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A line to draw: (step, value) points, ascending in step, finite."""

    label: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Stage:
    """A part of the run. ``metrics``: its metrics.jsonl, or the records themselves; ``details``: facts for
    the table.

    ``charts`` replaces the catalogue :data:`CHARTS`.
    """

    name: str
    seconds: float
    metrics: Path | Metrics | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    charts: tuple[Chart, ...] | None = None


@dataclass(frozen=True)
class Sample:
    """Two answers to one prompt, with the scores of the judges by name."""

    prompt: str
    before: str
    after: str
    before_scores: Mapping[str, float] = field(default_factory=dict)
    after_scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Everything on the page, top to bottom. Absent parts are left out of it."""

    title: str
    summary: str = ""
    comparisons: Sequence[Comparison] = ()
    samples: Sequence[Sample] = ()
    stages: Sequence[Stage] = ()
    configuration: Mapping[str, object] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    command: str = ""
    before_label: str = "before"
    after_label: str = "after"
    confidence: float = 0.95


def _one(*keys: str, label: str = "") -> Series:
    return Series(keys, label)


CHARTS: tuple[Chart, ...] = (
    Chart(
        "Loss",
        (_one("loss", "train/loss", label="training"), _one("eval_loss", "eval/loss", label="held out")),
        "nats per token or pair",
        "Falls while the model still learns from its data.",
    ),
    Chart(
        "Pair accuracy",
        (_one("accuracy", label="training"), _one("eval_accuracy", label="held out")),
        "share of pairs",
        "How often the preferred text gets the higher score. 0.5 is guessing.",
    ),
    Chart(
        "Reward",
        (_one("score", label="score of the reward model"), _one("reward", label="score minus KL penalty")),
        "per completion",
        "What PPO maximises. It should rise; that alone does not prove better text.",
    ),
    Chart(
        "Judges",
        (_one("judge/*", "judges/*"),),
        "mean score",
        "Judges that training does not see. They should rise with the reward; a gap is over-optimisation.",
    ),
    Chart(
        "KL to the reference",
        (_one("kl", "objective/kl"),),
        "nats per completion",
        "How far the policy has moved from where it started.",
    ),
    Chart(
        "Entropy",
        (_one("entropy", "policy/entropy"),),
        "nats per token",
        "Uncertainty of the policy. A fall towards 0 means that it repeats itself.",
    ),
    Chart(
        "Clip fraction",
        (
            _one("ppo/clip_fraction", "clip_fraction", label="policy"),
            _one("ppo/value_clip_fraction", "value_clip_fraction", label="value"),
        ),
        "share of tokens",
        "Tokens whose update PPO cut off. Below 0.2 is healthy for the policy.",
    ),
    Chart(
        "Explained variance of the value head",
        (_one("ppo/explained_variance", "explained_variance"),),
        "share",
        "How well the value head predicts returns: 1 is perfect, 0 no better than their mean.",
    ),
    Chart(
        "Step size",
        (_one("ppo/approx_kl", "approx_kl"),),
        "approximate KL, nats",
        "Change of the policy within one update.",
    ),
    Chart(
        "Response length",
        (_one("length", "response_length"),),
        "tokens",
        "If it climbs together with the reward, the policy may be buying reward with length.",
    ),
    Chart(
        "PPO losses",
        (
            _one("ppo/policy_loss", "policy_loss", label="policy"),
            _one("ppo/value_loss", "value_loss", label="value"),
        ),
        "loss",
        "The policy loss hovers around 0 by construction; the value loss should fall.",
    ),
    Chart("KL coefficient", (_one("kl_coef"),), "coefficient", "Weight of the KL penalty in the reward."),
    Chart(
        "Gradient norm",
        (_one("grad_norm", "ppo/grad_norm"),),
        "L2 norm",
        "Before clipping. A jump to ten times its usual size is a warning.",
    ),
    Chart(
        "Throughput",
        (_one("tokens_per_second", "tokens/s", "throughput", "perf/tokens_per_second"),),
        "tokens per second",
    ),
)

_NOT_METRICS = frozenset({"step", "time", "timestamp", "wall_time", "elapsed", "epoch"})


def read_metrics(source: Path | Metrics | None) -> list[dict[str, float]]:
    """Records of a metrics.jsonl file, one per step in ascending order; the last record of a repeated step
    wins.

    A run that was killed and resumed repeats steps, and its last line may be cut short: such a final line is
    left out. Raises ``ValueError`` with file and line for anything else that is not a JSON object with a
    numeric ``step``.
    """
    if source is None:
        return []
    records: list[Mapping[str, object]] = []
    if isinstance(source, (str, os.PathLike)):
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    continue
                raise ValueError(f"{source}:{number}: not JSON: {error}") from None
            if not isinstance(record, dict) or not _is_number(record.get("step")):
                raise ValueError(f"{source}:{number}: expected an object with a numeric step")
            records.append(record)
    else:
        records = list(source)
    by_step: dict[float, dict[str, float]] = {}
    for record in records:
        numbers = {key: float(value) for key, value in record.items() if _is_number(value)}
        by_step.setdefault(numbers["step"], {}).update(numbers)
    return [by_step[step] for step in sorted(by_step)]


def charts_of(stage: Stage) -> list[tuple[Chart, list[Curve]]]:
    """Charts of a stage with at least one line of two points; a single value joins such a line as a dot."""
    records = read_metrics(stage.metrics)
    found = []
    for chart in CHARTS if stage.charts is None else stage.charts:
        curves = [curve for series in chart.series for curve in _lines(series, records)]
        if any(len(curve.points) > 1 for curve in curves):
            found.append((chart, curves))
    return found


def curves_of(stage: Stage) -> list[Curve]:
    """Every metric of a stage as a curve, by name."""
    records = read_metrics(stage.metrics)
    keys = dict.fromkeys(key for record in records for key in record if key not in _NOT_METRICS)
    return [curve for key in sorted(keys) if (curve := _curve(key, key, records))]


def verdict(comparison: Comparison) -> str:
    """``better``, ``worse``, ``unclear`` (the interval of the difference holds 0) or, without one, empty."""
    difference = comparison.difference
    if comparison.higher_is_better is None or difference is None or not difference.has_range:
        return ""
    if difference.low <= 0 <= difference.high:
        return "unclear"
    return "better" if (difference.low > 0) == comparison.higher_is_better else "worse"


def machine_facts() -> dict[str, str]:
    """Processor, memory and versions of this machine, for :attr:`Report.machine`; no host or user name."""
    import torch

    from rlhf_fast._version import __version__

    facts = {"Processor": _processor(), "Threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["Memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    facts["System"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    facts["rlhf_fast"] = __version__
    facts["PyTorch"] = torch.__version__
    return facts


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _lines(series: Series, records: Metrics) -> list[Curve]:
    for key in series.keys:
        if key.endswith("*"):
            names = dict.fromkeys(name for record in records for name in record if name.startswith(key[:-1]))
            curves = [_curve(name, name[len(key) - 1 :], records) for name in names]
        else:
            curves = [_curve(key, series.label or key, records)]
        if found := [curve for curve in curves if curve is not None]:
            return found
    return []


def _curve(key: str, label: str, records: Metrics) -> Curve | None:
    points = tuple((r["step"], r[key]) for r in records if key in r and math.isfinite(r[key]))
    return Curve(label, points) if points else None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
