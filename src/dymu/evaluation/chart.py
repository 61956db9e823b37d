"""The picture of a result file: accuracy against tokens, for each kind of question, and against time; and KL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dymu.evaluation.methods import FORMER, METHODS, UNTOUCHED
from dymu.evaluation.summary import ALL, RowSummary, Share
from dymu.evaluation.tables import series
from dymu.measure.charts import Chart

_OF_SCHEDULE = {"constant": "#56b4e9", "linear": "#1b2a49"}
"""Colours of DToMe on schedules other than the default."""
_LINES = {
    "exact": "-",
    "representative": (0, (6, 1)),
    "compact": "--",
    "original": "-.",
    FORMER: "-.",
    "restore": (0, (3, 1, 1, 1)),
    "none": ":",
}
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
    compared = any(ALL in summary.divergence for summary in summaries)
    count = len(kinds) + timed + compared
    columns = min(COLUMNS, count)
    chart = Chart(-(-count // columns), columns, PANEL_INCHES)
    panels = list(chart.panels.flat)
    for panel, kind in zip(panels, kinds, strict=False):
        _panel(chart, panel, summaries, _accuracy(kind), _tokens)
        panel.set_title(f"{'all kinds' if kind == ALL else kind} (n = {summaries[0].accuracy[kind].n})", fontsize=10)
        panel.set_xlabel("image tokens, mean")
    if timed:
        panel = panels[len(kinds)]
        _panel(chart, panel, summaries, _accuracy(ALL), lambda summary: summary.costs and summary.costs.first_token_ms)
        panel.set_title("all kinds, against time", fontsize=10)
        panel.set_xlabel("encoder + prefill, ms")
    if compared:
        panel = panels[count - 1]
        rows = [summary for summary in summaries if summary.row != UNTOUCHED]
        _panel(chart, panel, rows, lambda summary: summary.divergence.get(ALL), _tokens)
        lows = [row.divergence[ALL].low for row in rows if ALL in row.divergence]
        if lows and min(lows) > 0:
            panel.set_yscale("log")
        panel.set_title("KL(untouched ‖ method), all kinds", fontsize=10)
        panel.set_xlabel("image tokens, mean")
        panel.set_ylabel("nats per token of the answer")
    for panel in panels[count:]:
        panel.set_visible(False)
    chart.save(path, legend_columns=4)


def _tokens(summary: RowSummary) -> float:
    return summary.tokens_mean


def _accuracy(kind: str) -> Callable[[RowSummary], Share | None]:
    def percent(summary: RowSummary) -> Share | None:
        share = summary.accuracy.get(kind)
        return share and Share(100 * share.mean, 100 * share.low, 100 * share.high, share.n)

    return percent


def _panel(
    chart: Chart,
    panel: Any,
    summaries: Sequence[RowSummary],
    y_of: Callable[[RowSummary], Share | None],
    x_of: Callable[[RowSummary], Any],
) -> None:
    """Draw one curve for each `series`, and a level for the untouched model."""
    curves: dict[str, list[RowSummary]] = {}
    for summary in summaries:
        if summary.row != UNTOUCHED:
            curves.setdefault(series(summary.row), []).append(summary)
        elif (level := y_of(summary)) is not None:
            panel.axhline(level.mean, color="black", linewidth=1, label="untouched")
    for name, curve in curves.items():
        by_budget = sorted(curve, key=lambda summary: summary.row.budget)
        points = [
            (x, y.mean, y.low, y.high)
            for summary in by_budget
            if (x := x_of(summary)) is not None and (y := y_of(summary)) is not None
        ]
        if not points:
            continue
        row = curve[0].row
        colour = METHODS[row.method].colour
        if row.method == "dtome":
            colour = _OF_SCHEDULE.get(row.schedule, colour)
        chart.curve(
            panel, points, label=name, color=colour, linestyle=_LINES[row.unmerge], marker=_MARKS.get(row.schedule, "D")
        )
    panel.set_ylabel("right answers, %")
