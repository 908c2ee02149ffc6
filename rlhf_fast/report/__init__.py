"""One self-contained HTML page, and the same tables on the console, about a run and what it changed.

report = Report(title=..., stages=[...], comparisons=[...], samples=[...])
write_report(path, report)
console_tables(report)
"""

from __future__ import annotations

from rlhf_fast.evaluate.statistics import Comparison, Interval
from rlhf_fast.report.console import console_tables, print_comparisons
from rlhf_fast.report.content import Chart, Report, Sample, Series, Stage, machine_facts, read_metrics
from rlhf_fast.report.page import render, write_report

__all__ = [
    "Chart",
    "Comparison",
    "Interval",
    "Report",
    "Sample",
    "Series",
    "Stage",
    "console_tables",
    "machine_facts",
    "print_comparisons",
    "read_metrics",
    "render",
    "write_report",
]
