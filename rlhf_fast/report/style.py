"""Style sheet of the report: one column, system fonts, light or dark as the reader prefers."""

from __future__ import annotations

__all__ = ["CSS"]

_COLORS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2230; --soft: #586173; --line: #dfe3ea; --grid: #e9ecf1;
  --good: #0b7a4b; --bad: #b3261e; --flat: #586173;
  --good-bg: #e3f4ec; --bad-bg: #fbe9e7; --flat-bg: #eceff4;
  --s0: #2457d6; --s1: #c2570c; --s2: #0b7a4b; --s3: #8b3fc7; --s4: #b0216f; --s5: #4d6b00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161d; --card: #1a2029; --ink: #e7ebf2; --soft: #a3adbd; --line: #313a48; --grid: #28303c;
    --good: #5fd39e; --bad: #ff8f85; --flat: #a3adbd;
    --good-bg: #153527; --bad-bg: #432220; --flat-bg: #28303c;
    --s0: #7da6ff; --s1: #ffa15c; --s2: #5fd39e; --s3: #cc99ff; --s4: #ff8cc6; --s5: #bfd467;
  }
}
"""

_LAYOUT = """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 48px 0 12px; letter-spacing: -0.005em; }
p { margin: 0 0 12px; max-width: 76ch; }
.lead { font-size: 1.08rem; color: var(--soft); }
small { color: var(--soft); }
code, pre {
  font-family: ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; font-size: 0.88rem;
}
pre { background: var(--flat-bg); border-radius: 8px; padding: 10px 14px; overflow-x: auto; margin: 12px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; }
.tiles { margin-top: 24px; }
.tile { padding: 16px 18px; }
.tile .name { color: var(--soft); font-size: 0.9rem; }
.tile .big { font-size: 2rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile .limits { font-size: 0.86rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; align-items: start; }
ul { padding-left: 1.2em; margin: 0; }
li { margin: 0 0 6px; max-width: 82ch; }
details { margin: 14px 0; }
summary { cursor: pointer; color: var(--soft); font-size: 0.92rem; padding: 4px 0; }
footer { margin-top: 48px; font-size: 0.85rem; color: var(--soft); }
"""

_TABLES = """
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 9px 16px; vertical-align: middle; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: 0.86rem; white-space: nowrap; }
tbody th { font-weight: 600; }
tbody th small { display: block; font-weight: 400; font-size: 0.82rem; line-height: 1.35; max-width: 40ch; }
th.n, td.n { text-align: right; white-space: nowrap; }
td.n small { display: block; font-size: 0.8rem; line-height: 1.3; }
tr.group th {
  background: var(--flat-bg); color: var(--soft); font-size: 0.78rem; text-transform: uppercase;
  letter-spacing: 0.05em; padding-top: 5px; padding-bottom: 5px;
}
.win { display: flex; align-items: center; gap: 10px; white-space: nowrap; }
.win span { min-width: 8.2em; }
.tag { display: inline-block; border-radius: 99px; padding: 1px 10px; font-size: 0.82rem; font-weight: 600; }
.tag { white-space: nowrap; }
.tag.better { color: var(--good); background: var(--good-bg); }
.tag.worse { color: var(--bad); background: var(--bad-bg); }
.tag.unclear { color: var(--flat); background: var(--flat-bg); }
details table td, details table th { padding: 4px 14px; font-size: 0.88rem; }
.facts th { width: 30%; font-weight: 500; color: var(--soft); }
.facts td { overflow-wrap: anywhere; }
.time { display: flex; height: 14px; border-radius: 7px; overflow: hidden; gap: 2px; margin: 0 0 14px; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
"""

_CHARTS = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px 12px; display: flex; flex-direction: column; }
figure h3 { margin: 0; font-size: 0.98rem; }
figure .unit { font-size: 0.82rem; color: var(--soft); }
figcaption { font-size: 0.82rem; color: var(--soft); line-height: 1.4; padding-top: 4px; }
figcaption { margin-top: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0; font-size: 0.82rem; }
.legend { color: var(--soft); }
.legend i {
  display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle;
}
svg { display: block; }
svg.chart { width: 100%; height: auto; margin: 4px 0; }
.tick, .label { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--grid); }
.zero, .axis { stroke: var(--soft); stroke-opacity: 0.6; }
.half { stroke: var(--soft); stroke-dasharray: 2 2; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.line.raw { stroke-width: 1; stroke-opacity: 0.38; }
.spark .line { stroke-width: 1.5; }
.hit { fill: transparent; }
.hit:hover { fill: var(--soft); fill-opacity: 0.5; }
.range { fill: var(--flat); fill-opacity: 0.35; }
.range.better { fill: var(--good); }
.range.worse { fill: var(--bad); }
.dot { fill: var(--flat); }
.dot.better { fill: var(--good); }
.dot.worse { fill: var(--bad); }
""" + "".join(
    f".line.s{i} {{ stroke: var(--s{i}); }} .end.s{i} {{ fill: var(--s{i}); }} "
    f".legend .s{i}, .b{i} {{ background: var(--s{i}); }}\n"
    for i in range(6)
)

_SAMPLES = """
.samples { display: grid; gap: 14px; }
.sample { padding: 16px 18px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; }
.answer { border-left: 3px solid var(--line); padding-left: 12px; min-width: 0; }
.answer.after { border-color: var(--s0); }
.answer .who { font-size: 0.78rem; color: var(--soft); text-transform: uppercase; letter-spacing: 0.05em; }
.answer .text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 2px 0 6px; max-width: none; }
.answer .given { color: var(--soft); }
.chips { display: flex; flex-wrap: wrap; gap: 4px 12px; font-size: 0.82rem; color: var(--soft); }
.chips b { color: var(--ink); font-variant-numeric: tabular-nums; }
"""

_MEDIA = """
@media (max-width: 760px) {
  .pair, .two { grid-template-columns: 1fr; }
  main { padding: 24px 14px; }
  .charts { grid-template-columns: 1fr; }
}
@media print {
  :root { --page: #fff; }
  main { max-width: none; padding: 0; }
  figure, .sample, .tile, tr { break-inside: avoid; }
}
"""

CSS = _COLORS + _LAYOUT + _TABLES + _CHARTS + _SAMPLES + _MEDIA
