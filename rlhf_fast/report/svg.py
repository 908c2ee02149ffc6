"""Inline SVG: line charts, sparklines and interval bars, styled by the classes of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from rlhf_fast.report.content import Chart, Curve

__all__ = ["SMOOTH_FROM", "compact", "line_chart", "number", "sparkline", "ticks", "win_rate_bar"]

_WIDTH, _HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 40
SMOOTH_FROM = 24  # points from which a running mean is drawn over the raw values


def number(value: float) -> str:
    """Three significant digits, thousands separated; never an exponent for values a reader meets here."""
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    if 0 < size < 0.01:
        return f"{value:.2g}"
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if not text.strip("-0.") else text


def compact(value: float) -> str:
    """A tick label: 1500 -> 1.5k, 0.25 -> 0.25, 2e-05 stays."""
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{suffix}"
    return "0" if size < 1e-12 else f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most ``count`` + 1 round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    if high <= low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / count
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(chart: Chart, curves: Sequence[Curve]) -> str:
    """A chart with axes, grid and a legend where there is more than one line."""
    steps = [x for curve in curves for x, _ in curve.points]
    values = [y for curve in curves for _, y in curve.points]
    x_low, x_high = min(steps), max(steps)
    y_ticks = ticks(min(values), max(values))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x_of(step: float) -> float:
        return _LEFT + (step - x_low) / ((x_high - x_low) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        kind = "zero" if abs(tick) < 1e-12 and y_low < 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{compact(tick)}</text>')
    base = _HEIGHT - _BOTTOM
    for tick in ticks(x_low, x_high):
        if x_low <= tick <= x_high and tick == round(tick):
            x = x_of(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{compact(tick)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="label" x="{middle:.0f}" y="{_HEIGHT - 5}" text-anchor="middle">step</text>')
    for index, curve in enumerate(curves):
        parts += _curve_marks(curve, index % 6, x_of, y_of)
    summary = "; ".join(
        f"{curve.label}: {number(curve.points[0][1])} at step {compact(curve.points[0][0])}, "
        f"{number(curve.points[-1][1])} at step {compact(curve.points[-1][0])}"
        for curve in curves
    )
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(chart.title)}. {escape(summary)}">{"".join(parts)}</svg>'
    )


def sparkline(curve: Curve, width: int = 120, height: int = 24) -> str:
    """The shape of a curve without axes."""
    xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
    spread_x, spread_y = (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1
    scale_x, scale_y = (width - 4) / spread_x, (height - 6) / spread_y
    points = [(2 + (x - min(xs)) * scale_x, height - 3 - (y - min(ys)) * scale_y) for x, y in curve.points]
    return _fixed(width, height, _polyline(points, "line s0"))


def win_rate_bar(value: float, low: float, high: float, verdict: str) -> str:
    """A 0 to 1 scale with a mark at one half, the interval as a bar and the estimate as a dot."""
    width, height = 170, 22

    def x_of(share: float) -> float:
        return 5 + share * (width - 10)

    parts = [
        f'<line class="axis" x1="5" x2="{width - 5}" y1="11" y2="11"/>',
        f'<line class="half" x1="{x_of(0.5):.1f}" x2="{x_of(0.5):.1f}" y1="2" y2="20"/>',
    ]
    if math.isfinite(low) and math.isfinite(high):
        x, span = x_of(low), max(x_of(high) - x_of(low), 1.0)
        parts.append(f'<rect class="range {verdict}" x="{x:.1f}" y="6" width="{span:.1f}" height="10" rx="3"/>')
    parts.append(f'<circle class="dot {verdict}" cx="{x_of(value):.1f}" cy="11" r="3"/>')
    return _fixed(width, height, "".join(parts))


def _fixed(width: int, height: int, content: str) -> str:
    """A small drawing of fixed size that repeats what text beside it says."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg class="spark" {size} aria-hidden="true">{content}</svg>'


def _curve_marks(curve: Curve, color: int, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> list[str]:
    points = [(x_of(x), y_of(y)) for x, y in curve.points]
    smooth = len(points) >= SMOOTH_FROM
    parts = [_polyline(points, f"line s{color}" + (" raw" if smooth else ""))]
    last = points[-1]
    if smooth:
        means = _running_mean([y for _, y in points])
        trend = [(x, y) for (x, _), y in zip(points, means, strict=True)]
        parts.append(_polyline(trend, f"line s{color}"))
        last = trend[-1]
    parts.append(f'<circle class="end s{color}" cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="3"/>')
    if len(points) <= 200:
        # Native tooltips: a wide invisible target per point, no script.
        for (x, y), (step, value) in zip(points, curve.points, strict=True):
            title = f"{escape(curve.label)}, step {compact(step)}: {number(value)}"
            parts.append(f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{title}</title></circle>')
    return parts


def _polyline(points: Sequence[tuple[float, float]], classes: str) -> str:
    return f'<polyline class="{classes}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over about a tenth of the curve; at both ends over what is there of the window."""
    half = max(2, len(values) // 20)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
