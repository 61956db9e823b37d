"""The picture of a result file: accuracy against tokens, for each kind of question, and against time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dymu.evaluation.methods import FORMER, METHODS, UNTOUCHED
from dymu.evaluation.summary import ALL, RowSummary
from dymu.evaluation.tables import series
from dymu.measure.charts import Chart

_OF_SCHEDULE = {"constant": "#56b4e9", "linear": "#1b2a49"}
"""Colours of DToMe on schedules other than the default."""
_LINES = {"exact": "-", "compact": "--", "original": "-.", FORMER: "-.", "none": ":"}
_MARKS = {"reverse_linear": "o", "linear": "v", "constant": "s", "": "D"}
PANEL_INCHES = (3.4, 2.8)
COLUMNS = 4


def draw_chart(summaries: Sequence[RowSummary], path: Path) -> None:
    """Write the picture; its ending (.png, .svg, .pdf) says how.

    Raises:
        DymuError: matplotlib is not installed.
    """
    kinds = list(summaries[0].accuracy)
    timed = any(summary.costs for summary in summaries)
    count = len(kinds) + timed
    columns = min(COLUMNS, count)
    chart = Chart(-(-count // columns), columns, PANEL_INCHES)
    panels = list(chart.panels.flat)
    for panel, kind in zip(panels, kinds, strict=False):
        _panel(chart, panel, summaries, kind, lambda summary: summary.tokens_mean)
        panel.set_title(f"{'all kinds' if kind == ALL else kind} (n = {summaries[0].accuracy[kind].n})", fontsize=10)
        panel.set_xlabel("image tokens, mean")
    if timed:
        panel = panels[len(kinds)]
        _panel(chart, panel, summaries, ALL, lambda summary: summary.costs and summary.costs.first_token_ms)
        panel.set_title("all kinds, against time", fontsize=10)
        panel.set_xlabel("encoder + prefill, ms")
    for panel in panels[count:]:
        panel.set_visible(False)
    chart.save(path, legend_columns=4)


def _panel(
    chart: Chart,
    panel: Any,
    summaries: Sequence[RowSummary],
    kind: str,
    x_of: Callable[[RowSummary], Any],
) -> None:
    """Draw one curve for each `series`, and a level for the untouched model."""
    curves: dict[str, list[RowSummary]] = {}
    for summary in summaries:
        if summary.row != UNTOUCHED:
            curves.setdefault(series(summary.row), []).append(summary)
        elif kind in summary.accuracy:
            panel.axhline(100 * summary.accuracy[kind].mean, color="black", linewidth=1, label="untouched")
    for name, curve in curves.items():
        by_budget = sorted(curve, key=lambda summary: summary.row.budget)
        shares = [(x, summary.accuracy[kind]) for summary in by_budget if (x := x_of(summary)) is not None]
        if not shares:
            continue
        row = curve[0].row
        colour = METHODS[row.method].colour
        if row.method == "dtome":
            colour = _OF_SCHEDULE.get(row.schedule, colour)
        points = [(x, 100 * share.mean, 100 * share.low, 100 * share.high) for x, share in shares]
        chart.curve(panel, points, label=name, color=colour, linestyle=_LINES[row.unmerge], marker=_MARKS[row.schedule])
    panel.set_ylabel("right answers, %")
