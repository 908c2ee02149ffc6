"""The measurements as text, Markdown and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rlhf_fast.bench.engine import OURS, Row
from rlhf_fast.bench.machine import Machine


def milliseconds(x: float) -> str:
    """Three digits."""
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def times(row: Row) -> list[str]:
    """'name 12.3 x' for every contender, fastest first."""
    order = sorted(row.ratios, key=lambda name: row.ratios[name])
    return [f"{name} {row.ratios[name]:.3g} x{' (other result)' if name in row.different else ''}" for name in order]


def text_row(row: Row) -> str:
    """A few lines for a terminal."""
    lines = [f"\n{row.op}  {row.name}"]
    share = "" if row.share_of_limit is None else f", {100 * row.share_of_limit:.0f} % of the machine's limit"
    if row.rates:
        share += f" ({_beside(row)})"
    if OURS in row.call_ms:
        share += f"; {milliseconds(row.call_ms[OURS])} ms a whole call"
    share += f"; backend {row.backend}" if row.backend else ""
    error = row.errors[OURS]
    lines.append(
        f"  {milliseconds(row.milliseconds[OURS])} ms{share}; worst error {error:.1e} of fp64 ({row.rounds} rounds)"
    )
    if row.peak_bytes.get(OURS, -1) >= 0:
        peaks = ", ".join(f"{name} {n / 2**20:,.0f}" for name, n in row.peak_bytes.items())
        lines.append(f"  peak extra MiB: {peaks}")
    for name in sorted(row.ratios, key=lambda name: row.ratios[name]):
        mark = ", another result" if name in row.different else ""
        lines.append(
            f"  {row.ratios[name]:>8.2f} x  {name} ({milliseconds(row.milliseconds[name])} ms, "
            f"error {row.errors[name]:.1e}{mark})"
        )
    lines += [f"            {name}: not here ({reason})" for name, reason in row.missing.items()]
    lines += [f"  {line}" for line in row.verdicts]
    lines += [f"  MISSED: {line}" for line in row.shortfalls]
    return "\n".join(lines)


def markdown(machine: Machine, rows: Sequence[Row]) -> str:
    """The table of a README: one line per row, missed aims in their own column."""
    out = [*machine.lines(), ""]
    out.append(
        "| op, shape | ms | of the limit, with memory at | slower by | peak extra MiB, ours / least other | error | missed aims |"
    )
    out.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        share = "" if row.share_of_limit is None else f"{100 * row.share_of_limit:.0f} %"
        share += f", {row.rates['read'] / 1e9:.0f} GB/s" if row.rates else ""
        out.append(
            f"| `{row.op}` {row.name} | {milliseconds(row.milliseconds[OURS])} | {share} | {', '.join(times(row))} | "
            f"{_memory(row)} | {row.errors[OURS]:.0e} | {'; '.join(row.shortfalls)} |"
        )
    return "\n".join(out) + "\n"


def device_markdown(head: Sequence[str], rows: Sequence[Row]) -> str:
    """The table of a run on a device, under the lines that describe it."""
    out = [*head, ""]
    out.append(
        "| op, shape | backend | device ms | whole call ms | of the copy rate | slower by, on the device "
        "| peak extra MiB, ours / least other | error | aims |"
    )
    out.append("| --- " * 9 + "|")
    for row in rows:
        share = "" if row.share_of_limit is None else f"{100 * row.share_of_limit:.0f} %"
        call = milliseconds(row.call_ms[OURS]) if OURS in row.call_ms else ""
        others = [line for line in row.shortfalls if not any(v.startswith(line) for v in row.verdicts)]
        out.append(
            f"| `{row.op}` {row.name} | {row.backend} | {milliseconds(row.milliseconds[OURS])} | {call} | {share} | "
            f"{', '.join(times(row))} | {_memory(row)} | {row.errors[OURS]:.0e} | {'; '.join([*row.verdicts, *others])} |"
        )
    return "\n".join(out) + "\n"


def _beside(row: Row) -> str:
    return ", ".join(f"{name} {rate / 1e9:.0f} G{'/s' if name == 'exp' else 'B/s'}" for name, rate in row.rates.items())


def into_readme(path: Path, table: str | None, mark: str = "bench") -> None:
    """Replace what stands between the marks; None: only look for them. Raises ValueError when they are missing."""
    text = path.read_text(encoding="utf-8")
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if start not in text or end not in text:
        raise ValueError(f"bench: {path} has no {start} and {end}")
    if table is None:
        return
    before, _, rest = text.partition(start)
    path.write_text(f"{before}{start}\n{table.strip()}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def _memory(row: Row) -> str:
    if row.peak_bytes.get(OURS, -1) < 0:
        return ""
    others = [n for name, n in row.peak_bytes.items() if name != OURS and not name.startswith("bare")]
    return f"{row.peak_bytes[OURS] / 2**20:,.0f}" + (f" / {min(others) / 2**20:,.0f}" if others else "")


def roofline(machine: Machine, rows: Iterable[Row], path: Path) -> None:
    """Time against the machine's least time, both on logarithmic axes: the diagonal is the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 6))
    drawn = [(row, row.limit_ms) for row in rows if row.limit_ms]
    for row, limit in drawn:
        others = [row.milliseconds[n] for n in row.ratios if n not in row.different]
        axes.plot([limit] * len(others), others, "_", color="0.6", markersize=9)
        axes.plot(limit, row.milliseconds[OURS], "o", color="C0", markersize=5)
        axes.annotate(
            f"{row.op} {row.name}", (limit, row.milliseconds[OURS]), (4, -8), textcoords="offset points", fontsize=5
        )
    if drawn:
        ends = [min(limit for _, limit in drawn) / 2, max(max(r.milliseconds.values()) for r, _ in drawn) * 2]
        axes.plot(ends, ends, color="k", linewidth=0.8, label="limit of this machine")
    axes.plot([], [], "o", color="C0", label=OURS)
    axes.plot([], [], "_", color="0.6", label="others in the same run")
    axes.set(xscale="log", yscale="log", xlabel="least time by memory or arithmetic (ms)", ylabel="measured (ms)")
    axes.set_title(machine.name, fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
