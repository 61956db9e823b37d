"""The picture of a result file: accuracy against tokens, for each kind of question, and against time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dymu.errors import DymuError
from dymu.evaluate.rows import UNTOUCHED
from dymu.evaluate.summary import ALL, RowSummary
from dymu.evaluate.tables import series

# Okabe and Ito's colours, which most colour-blind people can tell apart.
_COLOURS = {"dtome": "#0072b2", "tome": "#d55e00", "pool": "#009e73", "random": "#999999", "downscale": "#cc79a7"}
_OF_SCHEDULE = {"constant": "#56b4e9", "linear": "#1b2a49"}
"""Of DToMe, where it is not the usual one."""
_LINES = {"exact": "-", "compact": "--", "compact-unsized": "-.", "none": ":"}
_MARKS = {"reverse_linear": "o", "linear": "v", "constant": "s", "": "D"}
PANEL_INCHES = (3.4, 2.8)
COLUMNS = 4


def draw_chart(summaries: Sequence[RowSummary], path: Path) -> None:
    """Write the picture; its ending (.png, .svg, .pdf) says how.

    Raises:
        DymuError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DymuError("drawing charts takes matplotlib: install it with `pip install 'dymu[charts]'`.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(summaries[0].accuracy)
    timed = any(found.costs for found in summaries)
    panels = len(kinds) + timed
    columns = min(COLUMNS, panels)
    lines = -(-panels // columns)
    figure, grid = pyplot.subplots(
        lines, columns, squeeze=False, layout="constrained",
        figsize=(columns * PANEL_INCHES[0], lines * PANEL_INCHES[1] + 1.2),
    )  # fmt: skip
    axes = list(grid.flat)
    for panel, kind in zip(axes, kinds, strict=False):
        _panel(panel, summaries, kind, lambda found: found.tokens_mean)
        panel.set_title(f"{'all kinds' if kind == ALL else kind} (n = {summaries[0].accuracy[kind].n})", fontsize=10)
        panel.set_xlabel("image tokens, mean")
    if timed:
        panel = axes[len(kinds)]
        _panel(panel, summaries, ALL, _first_token_ms)
        panel.set_title("all kinds, against time", fontsize=10)
        panel.set_xlabel("encoder + prefill, ms")
    for panel in axes[panels:]:
        panel.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _first_token_ms(found: RowSummary) -> float | None:
    return None if found.costs is None else found.costs.encoder_ms + found.costs.prefill_ms


def _panel(panel: Any, summaries: Sequence[RowSummary], kind: str, x_of: Callable[[RowSummary], float | None]) -> None:
    """One curve for each way of having fewer tokens, and a level for the untouched model."""
    curves: dict[str, list[RowSummary]] = {}
    for found in summaries:
        if found.row != UNTOUCHED:
            curves.setdefault(series(found.row), []).append(found)
        elif kind in found.accuracy:
            panel.axhline(100 * found.accuracy[kind].mean, color="black", linewidth=1, label="untouched")
    for name, curve in curves.items():
        by_budget = sorted(curve, key=lambda found: found.row.budget)
        points = [(x, found.accuracy[kind]) for found in by_budget if (x := x_of(found)) is not None]
        row = curve[0].row
        colour = _COLOURS[row.method]
        if row.method == "dtome":
            colour = _OF_SCHEDULE.get(row.schedule, colour)
        panel.errorbar(
            [x for x, _ in points],
            [100 * share.mean for _, share in points],
            yerr=[[100 * (s.mean - s.low) for _, s in points], [100 * (s.high - s.mean) for _, s in points]],
            label=name, color=colour, linestyle=_LINES[row.unmerge], marker=_MARKS[row.schedule],
            markersize=4, linewidth=1.4, elinewidth=0.6, capsize=0,
        )  # fmt: skip
    panel.set_ylabel("right answers, %")
    panel.spines[["top", "right"]].set_visible(False)
