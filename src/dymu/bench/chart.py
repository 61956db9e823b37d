"""The picture of a result file: time relative to the untouched model against image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dymu.bench.summary import PARTS, CellSummary
from dymu.bench.variants import UNTOUCHED
from dymu.errors import DymuError
from dymu.measure.charts import GREY, PALETTE, Chart

PANEL_INCHES = (3.2, 2.6)


def draw_chart(cells: Sequence[CellSummary], path: Path) -> None:
    """Write the picture; its ending (.png, .svg, .pdf) says how. A row of panels for each prompt and batch.

    Raises:
        DymuError: matplotlib is not installed, or no cell holds times.
    """
    measured = [cell for cell in cells if not cell.left_out]
    if not measured:
        raise DymuError("no cell of this result file holds times, so there is nothing to draw; let it run on.")
    rows = list(dict.fromkeys((cell.prompt, cell.batch) for cell in measured))
    chart = Chart(len(rows), len(PARTS), PANEL_INCHES, share_x=True)
    for panels, (prompt, batch) in zip(chart.panels, rows, strict=True):
        chosen = [cell for cell in measured if (cell.prompt, cell.batch) == (prompt, batch)]
        for panel, part in zip(panels, PARTS, strict=True):
            _panel(chart, panel, chosen, part)
        panels[0].set_ylabel(f"{prompt}, batch {batch}\ntime / untouched", fontsize=8)
    for panel, name in zip(chart.panels[0], PARTS.values(), strict=True):
        panel.set_title(name, fontsize=10)
    for panel in chart.panels[-1]:
        panel.set_xlabel("tokens per image, mean", fontsize=8)
    chart.save(path, legend_columns=3)


def _panel(chart: Chart, panel: Any, cells: Sequence[CellSummary], part: str) -> None:
    """One line for each variant with its quartiles, one for the counted FLOPs, and the untouched model at 1."""
    cells = sorted(cells, key=lambda cell: cell.tokens)
    panel.axhline(1, color="black", linewidth=1)
    names = [line.variant.name for line in cells[0].lines if line.variant != UNTOUCHED]
    for colour, name in zip(PALETTE * len(names), names, strict=False):
        ratios = [
            (cell.tokens, line.ratios[part])
            for cell in cells
            for line in cell.lines
            if line.variant.name == name and part in line.ratios
        ]
        if ratios:
            points = [(tokens, ratio.ratio, ratio.low, ratio.high) for tokens, ratio in ratios]
            chart.curve(panel, points, label=name, color=colour, marker="o")
    counted = [(cell.tokens, cell.flop_ratios[part]) for cell in cells if part in cell.flop_ratios]
    if counted:
        panel.plot(*zip(*counted, strict=True), color=GREY, linestyle=":", marker="x", label="FLOPs, counted")
    panel.set_ylim(bottom=0)
