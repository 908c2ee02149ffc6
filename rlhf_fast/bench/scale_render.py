"""The curves of `rlhf-fast bench --scale` as text, Markdown and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.bench.engine import OURS
from rlhf_fast.bench.machine import Machine
from rlhf_fast.bench.render import milliseconds
from rlhf_fast.bench.scale import Curve, Line, fits

Measured = Sequence[tuple[Curve, Mapping[str, Line]]]
FLOOR = 2**20
"""Bytes; less memory is drawn as this much, as the system counts in pages."""


def short(x: float) -> str:
    """1k, 64k, 1M."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if x >= size:
            return f"{x / size:g}{unit}"
    return f"{x:g}"


def _unit(seconds: float) -> str:
    for size, unit in ((1e-3, "ms"), (1e-6, "us")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def text(curve: Curve, lines: Mapping[str, Line]) -> str:
    """A few lines for a terminal."""
    out = [f"\n{curve.op} {curve.name} against {curve.axis} ({curve.held})"]
    for name, line in lines.items():
        times = "  ".join(f"{short(x)} {milliseconds(1e3 * s)}" for x, s in zip(line.xs, line.seconds, strict=True))
        out.append(f"  {name}, ms: {times}")
        indent = " " * (len(name) + 4)
        if line.peaks and curve.axis != "threads":
            peaks = "  ".join(f"{short(x)} {p / 2**20:,.0f}" for x, p in zip(line.xs, line.peaks, strict=True))
            out.append(f"{indent}MiB: {peaks}")
        if line.left_out:
            out.append(f"{indent}left out for memory: {', '.join(map(short, line.left_out))}")
        time = fits(curve.axis, line)["seconds"]
        if time is not None:
            out.append(f"{indent}exponent {time['exponent']:.2f}, {_straight(time)}, kinks: {_kinks(time) or 'none'}")
    return "\n".join(out)


def _straight(fit: Mapping[str, Any]) -> str:
    return f"{fit['deviation']:.2f} x its median at {short(fit['at'])}"


def _kinks(fit: Mapping[str, Any]) -> str:
    return ", ".join(f"{short(a)} to {short(b)} {ratio:.2f} x" for a, b, ratio in fit["kinks"])


def markdown(machine: Machine, measured: Measured) -> str:
    """The table of a README: a row for each curve, plain PyTorch in brackets, and the speed-ups in a line."""
    head = ("op", "against", "ms at the last (plain)", "per unit", "exponent (plain)", "furthest", "kinks per unit")
    out = [*machine.lines(), "", "| " + " | ".join((*head, "peak extra MiB (plain)")) + " |"]
    out.append("| " + " | ".join("---" for _ in (*head, "")) + " |")
    speed_ups = []
    for curve, lines in measured:
        ours, plain = lines[OURS], next(line for name, line in lines.items() if name != OURS)
        name = f"`{curve.op}` {curve.name}".strip()
        if curve.axis == "threads":
            speed_ups.append(f"{name} {ours.seconds[0] / ours.seconds[-1]:.2f} x")
            continue
        fit, other = (fits(curve.axis, line) for line in (ours, plain))
        time, plain_time = fit["seconds"], other["seconds"]
        cells = [name, f"{curve.axis} to {short(ours.xs[-1])} ({curve.held})"]
        cells.append(milliseconds(1e3 * ours.seconds[-1]) + _beside(plain, ours, plain.seconds, 1e3))
        cells.append(_unit(ours.seconds[-1] / ours.xs[-1]))
        cells.append("" if time is None else f"{time['exponent']:.2f}")
        cells[-1] += "" if plain_time is None else f" ({plain_time['exponent']:.2f})"
        cells += ["", ""] if time is None else [_straight(time), _kinks(time)]
        cells.append(f"{ours.peaks[-1] / 2**20:,.0f}" + _beside(plain, ours, plain.peaks, 2**-20) if ours.peaks else "")
        out.append("| " + " | ".join(cells) + " |")
    if speed_ups:
        out += ["", f"On {measured[-1][0].xs[-1]} threads instead of one: {', '.join(speed_ups)}."]
    return "\n".join(out) + "\n"


def _beside(plain: Line, ours: Line, values: Sequence[float], unit: float) -> str:
    """The last value of plain PyTorch in brackets, and where that is when its memory ended earlier."""
    if not values:
        return ""
    at = "" if plain.xs[-1] == ours.xs[-1] else f" at {short(plain.xs[-1])}"
    return f" ({milliseconds(unit * values[-1])}{at})"


def picture(machine: Machine, measured: Measured, path: Path) -> None:
    """Small multiples on logarithmic axes: time and memory of each op against tokens and classes, speed-up against threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, Curve, Mapping[str, Line]]] = []
    for curve, lines in measured:
        if curve.axis != "threads":
            panels.append(("time", curve, lines))
            if any(line.peaks for line in lines.values()):
                panels.append(("memory", curve, lines))
    threads = [(curve, lines[OURS]) for curve, lines in measured if curve.axis == "threads"]
    count = len(panels) + bool(threads)
    columns = min(4, count)
    figure, grid = pyplot.subplots(
        -(-count // columns), columns, figsize=(3.6 * columns, 2.9 * -(-count // columns) + 0.7), squeeze=False
    )
    cells = iter(grid.flat)
    for what, curve, lines in panels:
        _panel(next(cells), what, curve, lines)
    if threads:
        _speed_up(next(cells), threads)
    for rest in cells:
        rest.axis("off")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    top = 1 - 0.55 / figure.get_figheight()
    title = f"{machine.name}, {machine.threads} threads, fp32"
    place: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, top)}
    figure.legend(handles, labels, ncols=3, frameon=False, fontsize=9, title=title, title_fontsize=9, **place)
    figure.tight_layout(rect=(0, 0, 1, top), h_pad=1.2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(axes: Any, what: str, curve: Curve, lines: Mapping[str, Line]) -> None:
    from matplotlib.ticker import FuncFormatter

    ours, (plain_name, plain) = lines[OURS], next((n, line) for n, line in lines.items() if n != OURS)
    drawn = {}
    for line, label, style in (
        (ours, OURS, {"color": "C0", "marker": "o"}),
        (plain, "plain PyTorch", {"color": "C1", "marker": "s", "linestyle": "--"}),
    ):
        values = [1e3 * s for s in line.seconds] if what == "time" else [max(FLOOR, p) / 2**20 for p in line.peaks]
        drawn[label] = dict(zip(line.xs, values, strict=True))
        axes.plot(line.xs, values, markersize=3.5, linewidth=1.2, label=label, **style)
    if what == "time":
        for i, points in enumerate(drawn.values()):
            middle = statistics.median(y / x for x, y in points.items()) if points else 0
            named = {"label": "time in proportion"} if i else {}
            axes.plot([*points], [middle * x for x in points], color="0.5", linewidth=0.8, linestyle=":", **named)
    both = drawn["plain PyTorch"].keys() & drawn[OURS].keys()
    note = f"{plain_name}: left out at {', '.join(map(short, plain.left_out))} (memory)" if plain.left_out else ""
    if both:
        x = max(both)
        ratio = drawn["plain PyTorch"][x] / drawn[OURS][x]
        over = "more than " if what == "memory" and ours.peaks[ours.xs.index(x)] <= FLOOR else ""
        times = f"{plain_name} / {OURS} at {short(x)}: {over}{milliseconds(ratio)} x"
        note = f"{times}\n{note}" if note else times
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(f"{curve.axis} ({curve.held})", fontsize=7)
    axes.set_ylabel("ms" if what == "time" else "peak extra MiB (at least 1)", fontsize=7)
    axes.set_title(f"{curve.op}: {what}\n{curve.name}".strip(), fontsize=8)
    axes.tick_params(labelsize=7)
    xs = sorted({*ours.xs, *plain.xs})
    axes.set_xticks(xs[:: -(-len(xs) // 6)])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_ylim(top=axes.get_ylim()[1] * 4)
    axes.text(0.03, 0.97, note, transform=axes.transAxes, fontsize=6.5, va="top", color="0.25")


def _speed_up(axes: Any, threads: Sequence[tuple[Curve, Line]]) -> None:
    last = max(max(line.xs) for _, line in threads)
    for curve, line in threads:
        label = f"{curve.op} {curve.name}"
        axes.plot(line.xs, [line.seconds[0] / s for s in line.seconds], "o-", markersize=3.5, linewidth=1, label=label)
    axes.plot([1, last], [1, last], color="0.5", linewidth=0.7, linestyle=":")
    axes.set(xticks=threads[0][1].xs, ylim=(0.9, 1 + 1.5 * (last - 1)))
    axes.set_xlabel("threads", fontsize=7)
    axes.set_ylabel("times as fast as one thread", fontsize=7)
    axes.set_title(f"{OURS}: threads", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, frameon=False, loc="upper left")
    axes.grid(color="0.92", linewidth=0.6)
