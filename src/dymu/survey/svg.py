"""Small charts as SVG within a page, whose style sheet gives their colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 22, 38
"""Margins around what is plotted."""

Range = tuple[float, float]


class Chart:
    """One panel.

    Args:
        x, y: the least and the greatest value shown.
        x_label, y_label: what the axes show.
    """

    def __init__(self, x: Range, y: Range, x_label: str, y_label: str) -> None:
        self._x, self._y = _wide(x), _wide(y)
        self._labels = x_label, y_label
        self._marks: list[str] = []

    def bars(self, edges: Sequence[float], heights: Sequence[int]) -> None:
        """A histogram; each bar tells its numbers to a pointer."""
        bottom = self._down(0)
        for left, right, height in zip(edges, edges[1:], heights, strict=False):
            if not height:
                continue
            x, top = self._across(left), self._down(height)
            width = max(self._across(right) - x - 0.8, 0.6)
            title = f"{left:,.0f} to {right:,.0f}: {height:,}"
            self._marks.append(
                f'<rect class="bar" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}">'
                f"<title>{title}</title></rect>"
            )

    def points(self, x: Sequence[float], y: Sequence[float]) -> None:
        """Dots, the smaller the more they are; as one path, which is a tenth of the bytes of circles."""
        width = min(max(70 / math.sqrt(len(x)), 1.3), 4)
        path = "".join(f"M{self._across(a):.1f} {self._down(b):.1f}h0" for a, b in zip(x, y, strict=True))
        self._marks.append(f'<path class="dots" stroke-width="{width:.1f}" d="{path}"/>')

    def line(self, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
        """A straight line, cut where the panel ends; `kind`: its class in the style sheet."""
        (x0, y0), (x1, y1) = start, end
        self._marks.append(
            f'<line class="{kind}" x1="{self._across(x0):.1f}" y1="{self._down(y0):.1f}" '
            f'x2="{self._across(x1):.1f}" y2="{self._down(y1):.1f}"/>'
        )

    def vertical(self, x: float, label: str, kind: str) -> None:
        """A line from bottom to top with a label above it."""
        self.line((x, self._y[0]), (x, self._y[1]), kind)
        across = self._across(x)
        anchor = "start" if across < LEFT + 60 else "end" if across > WIDTH - 60 else "middle"
        self._marks.append(f'<text x="{across:.1f}" y="{TOP - 4}" text-anchor="{anchor}">{escape(label)}</text>')

    def svg(self, title: str) -> str:
        """The panel; `title` says what it shows to who cannot see it."""
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        axes = [f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>']
        for value in ticks(self._x):
            x = self._across(value)
            axes.append(f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>')
            axes.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_short(value)}</text>')
        for value in ticks(self._y):
            y = self._down(value)
            axes.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            axes.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_short(value)}</text>')
        across, up = map(escape, self._labels)
        axes.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{across}</text>')
        axes.append(
            f'<text transform="translate(10 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{up}</text>'
        )
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
            + "".join([*axes, *self._marks])
            + "</svg>"
        )

    def _across(self, value: float) -> float:
        low, high = self._x
        return LEFT + (min(max(value, low), high) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def _down(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (min(max(value, low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def ticks(span: Range, about: int = 5) -> list[float]:
    """Round values within a range, some `about` of them."""
    low, high = span
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _wide(span: Range) -> Range:
    """A range with some width."""
    low, high = span
    return (low, high) if high > low else (low, low + 1)


def _short(value: float) -> str:
    """A tick in few letters."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.6g}"
