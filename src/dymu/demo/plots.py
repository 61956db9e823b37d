"""Charts of the page, as SVG that takes the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dymu.demo.html import text

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44


@dataclass(frozen=True)
class Dot:
    """One point, with what it says, and the interval around its y."""

    x: float
    y: float
    about: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Dots of one kind.

    Attributes:
        colour: as CSS writes it; empty: the page's accent.
        line: whether they are joined.
        hollow: whether they are rings, and what joins them is dotted.
        level: whether the only dot is a line across all x.
    """

    name: str
    dots: Sequence[Dot]
    colour: str = ""
    line: bool = False
    hollow: bool = False
    level: bool = False


def plot(title: str, x_label: str, y_label: str, series: Sequence[Series], from_zero: bool = True) -> str:
    """A chart with its legend."""
    dots = [dot for one in series for dot in one.dots]
    if not dots:
        return ""
    ends = [end for dot in dots for end in (dot.y, dot.low, dot.high) if end is not None]
    x_ticks = _ticks(0.0 if from_zero else min(dot.x for dot in dots), max(dot.x for dot in dots))
    y_ticks = _ticks(0.0 if from_zero else min(ends), max(ends))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at_x(value: float) -> float:
        return LEFT + wide * (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def at_y(value: float) -> float:
        return TOP + high * (1 - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    drawn = []
    for tick in y_ticks:
        drawn.append(
            f'<line class="dymu-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>'
        )
        drawn.append(f'<text x="{LEFT - 7}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        drawn.append(f'<text x="{at_x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:g}</text>')
    drawn.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 6}" text-anchor="middle">{text(x_label)}</text>')
    drawn.append(
        f'<text x="14" y="{TOP + high / 2}" text-anchor="middle" transform="rotate(-90 14 {TOP + high / 2})">'
        f"{text(y_label)}</text>"
    )
    for one in series:
        drawn.append(_drawn(one, at_x, at_y))
    said = f"{title}. " + "; ".join(f"{one.name}: {len(one.dots)}" for one in series)
    keys = "".join(f"<li>{_key(one)}{text(one.name)}</li>" for one in series if one.dots)
    return (
        f'<figure class="dymu-figure dymu-plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(said)}">{"".join(drawn)}</svg><ul class="dymu-legend">{keys}</ul></figure>'
    )


def _key(one: Series) -> str:
    kind = " dymu-dash" if one.level else " dymu-ring" if one.hollow else ""
    return f'<span class="dymu-key{kind}" style="{_style(one)}"></span>'


def _drawn(one: Series, at_x: object, at_y: object) -> str:
    assert callable(at_x)
    assert callable(at_y)
    parts = []
    if one.level and one.dots:
        y = at_y(one.dots[0].y)
        parts.append(f'<line class="dymu-line dymu-level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    elif one.line and len(one.dots) > 1:
        points = " ".join(f"{at_x(dot.x):.1f},{at_y(dot.y):.1f}" for dot in one.dots)
        dotted = " dymu-dotted" if one.hollow else ""
        parts.append(f'<polyline class="dymu-line{dotted}" points="{points}"/>')
    for dot in () if one.level else one.dots:
        if dot.low is not None and dot.high is not None:
            parts.append(
                f'<line class="dymu-line" x1="{at_x(dot.x):.1f}" x2="{at_x(dot.x):.1f}" y1="{at_y(dot.low):.1f}" '
                f'y2="{at_y(dot.high):.1f}"/>'
            )
        kind = "dymu-dot dymu-hollow" if one.hollow else "dymu-dot"
        parts.append(
            f'<circle class="{kind}" cx="{at_x(dot.x):.1f}" cy="{at_y(dot.y):.1f}" r="5">'
            f"<title>{text(dot.about)}</title></circle>"
        )
    return f'<g style="{_style(one)}">{"".join(parts)}</g>'


def _style(one: Series) -> str:
    return f"--dymu-series:{one.colour}" if one.colour else ""


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / 5
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, max(last, first + 1) + 1)]


def bars_over_time(values: Sequence[int], most: Sequence[int], what: str) -> str:
    """One bar for each frame, its tokens of all that it has."""
    count = max(len(values), 1)
    each, high = (WIDTH - LEFT - RIGHT) / count, HEIGHT - TOP - BOTTOM
    ticks = _ticks(0.0, max(*most, 1))
    drawn = []
    for tick in ticks:
        y = TOP + high * (1 - tick / ticks[-1])
        drawn.append(f'<line class="dymu-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for number, (value, full) in enumerate(zip(values, most, strict=True)):
        x = LEFT + each * (number + 0.12)
        for kind, size in (("dymu-whole", full), ("dymu-part", value)):
            tall = high * size / ticks[-1]
            drawn.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{TOP + high - tall:.1f}" width="{each * 0.76:.1f}" '
                f'height="{tall:.1f}"><title>frame {number + 1}: {value} of {full}</title></rect>'
            )
        if count <= 16 or number % (count // 8) == 0:
            drawn.append(
                f'<text x="{x + each * 0.38:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number + 1}</text>'
            )
    drawn.append(f'<text x="{LEFT + (WIDTH - LEFT - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">frame</text>')
    said = f"{what}: " + ", ".join(map(str, values))
    return (
        f'<figure class="dymu-figure dymu-plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(said)}">{"".join(drawn)}</svg></figure>'
    )
