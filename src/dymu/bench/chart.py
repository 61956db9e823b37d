"""The picture of a result file: time relative to the untouched model against image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dymu.bench.summary import PARTS, CellSummary
from dymu.bench.variants import UNTOUCHED
from dymu.errors import DymuError

# Okabe and Ito's colours, which most colour-blind people can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PANEL_INCHES = (3.2, 2.6)


def draw_chart(cells: Sequence[CellSummary], path: Path) -> None:
    """Write the picture; its ending (.png, .svg, .pdf) says how. A row of panels for each layout and batch.

    Raises:
        DymuError: matplotlib is not installed, or no cell holds times.
    """
    measured = [cell for cell in cells if not cell.left_out]
    if not measured:
        raise DymuError("no cell of this result file holds times, so there is nothing to draw; let it run on.")
    try:
        import matplotlib
    except ImportError as error:
        raise DymuError("drawing charts takes matplotlib: install it with `pip install 'dymu[charts]'`.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(dict.fromkeys((cell.layout, cell.batch) for cell in measured))
    figure, grid = pyplot.subplots(
        len(rows), len(PARTS), squeeze=False, layout="constrained", sharex=True,
        figsize=(len(PARTS) * PANEL_INCHES[0], len(rows) * PANEL_INCHES[1] + 0.6),
    )  # fmt: skip
    for row, (layout, batch) in enumerate(rows):
        chosen = [cell for cell in measured if (cell.layout, cell.batch) == (layout, batch)]
        for panel, (part, name) in zip(grid[row], PARTS.items(), strict=True):
            _panel(panel, chosen, part)
            panel.set_title(name if row == 0 else "", fontsize=10)
        grid[row][0].set_ylabel(f"{layout}, batch {batch}\ntime / untouched", fontsize=8)
    for panel in grid[-1]:
        panel.set_xlabel("tokens per image, mean", fontsize=8)
    labelled = {
        label: handle for panel in grid.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _panel(panel: Any, cells: Sequence[CellSummary], part: str) -> None:
    """One line for each variant with its quartiles, one for the counted FLOPs, and the untouched model at 1."""
    cells = sorted(cells, key=lambda cell: cell.tokens)
    panel.axhline(1, color="black", linewidth=1)
    names = [line.variant.name for line in cells[0].lines if line.variant != UNTOUCHED]
    for colour, name in zip(_COLOURS * len(names), names, strict=False):
        points = [
            (cell.tokens, line.ratios[part])
            for cell in cells
            for line in cell.lines
            if line.variant.name == name and part in line.ratios
        ]
        if points:
            panel.errorbar(
                [tokens for tokens, _ in points], [found.ratio for _, found in points],
                yerr=[[max(found.ratio - found.low, 0) for _, found in points],
                      [max(found.high - found.ratio, 0) for _, found in points]],
                label=name, color=colour, marker="o", markersize=4, linewidth=1.4, elinewidth=0.6,
            )  # fmt: skip
    counted = [(cell.tokens, cell.flop_ratios[part]) for cell in cells if part in cell.flop_ratios]
    if counted:
        panel.plot(*zip(*counted, strict=True), color="#999999", linestyle=":", marker="x", label="FLOPs, counted")
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
