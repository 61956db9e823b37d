"""Colours, panels, curves and files of all charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dymu.errors import DymuError

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which most colour-blind people can tell apart."""
GREY = "#999999"


class Chart:
    """A grid of panels with one legend below.

    Args:
        rows, columns: of panels.
        panel_inches: width and height of one.
        share_x: whether all panels have one horizontal axis.

    Raises:
        DymuError: matplotlib is not installed.
    """

    def __init__(self, rows: int, columns: int, panel_inches: tuple[float, float], *, share_x: bool = False) -> None:
        try:
            import matplotlib
        except ImportError as error:
            raise DymuError("drawing charts takes matplotlib: install it with `pip install 'dymu[charts]'`.") from error
        matplotlib.use("Agg")
        from matplotlib import pyplot

        self._pyplot = pyplot
        size = (columns * panel_inches[0], rows * panel_inches[1] + 0.6 + 0.1 * rows)
        self.figure, self.panels = pyplot.subplots(
            rows, columns, squeeze=False, layout="constrained", sharex=share_x, figsize=size
        )
        for panel in self.panels.flat:
            panel.spines[["top", "right"]].set_visible(False)

    def curve(self, panel: Any, points: list[tuple[float, float, float, float]], **look: Any) -> None:
        """Draw points (x, y, low, high) with the intervals from low to high."""
        x, y, _, _ = zip(*points, strict=True)
        errors = [[max(y - low, 0) for _, y, low, _ in points], [max(high - y, 0) for _, y, _, high in points]]
        panel.errorbar(x, y, yerr=errors, markersize=4, linewidth=1.4, elinewidth=0.6, **look)

    def save(self, path: Path, legend_columns: int) -> None:
        """Write the picture; the path's ending (.png, .svg, .pdf) says how."""
        labelled = {
            label: handle
            for panel in self.panels.flat
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        self.figure.legend(
            labelled.values(), labelled.keys(), loc="outside lower center",
            ncols=min(legend_columns, len(labelled)), fontsize=8, frameon=False,
        )  # fmt: skip
        self.figure.savefig(path, dpi=130)
        self._pyplot.close(self.figure)
