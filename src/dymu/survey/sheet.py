"""Drawings of what merged, on one sheet: by image and budget, or after every encoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from dymu.counts import Count
from dymu.families.encoders import parts_of
from dymu.handle import apply, check_fits
from dymu.media.contact_sheet import GAP, contact_sheet
from dymu.reducers import ThresholdMerge
from dymu.report import Report
from dymu.survey.encode import Encoder
from dymu.thresholds import Thresholds

CELL = 672
"""Pixels of the longer side of a drawing, so that small images are shown as large as others."""
LONGEST = 4096
"""Pixels of the longer side of a sheet, at most."""
NARROWEST = 64
"""Pixels of the width of a drawing on a sheet, below which nothing can be seen."""
IN_A_ROW = 5
"""Drawings of a single row that stay in it."""
_LABEL = 40
"""More pixels than a label is high."""

Drawn = tuple[Image.Image, int, int]
"""A drawing, the tokens kept, and all of them."""


def by_budget(
    model: Any, processor: Any, thresholds: Thresholds, budgets: Sequence[float], images: Sequence[Image.Image]
) -> list[list[Drawn]]:
    """For each image, what merged of it at each budget.

    Raises:
        ValueError: the model does not take an image, or it cannot be drawn on; see `Report.draw`.
    """
    with apply(model, thresholds, budget=budgets[0]) as handle:
        encoder = Encoder(model, processor, handle)
        drawn: list[list[Drawn]] = []
        for image in images:
            drawn.append([])
            for budget in budgets:
                handle.budget = budget
                drawn[-1].append(_drawn(encoder([image])[0], image))
        return drawn


def by_layer(
    model: Any, processor: Any, thresholds: Thresholds, budget: float, images: Sequence[Image.Image]
) -> list[list[Drawn]]:
    """For each image, what has merged after each encoder layer; where the family merges once more in the prompt, also
    after that.

    Raises:
        BadThresholds: they are of another encoder.
        ValueError: see `by_budget`.
    """
    check_fits(thresholds, parts_of(model))
    rule, _ = Count(budget).rule(thresholds)
    assert isinstance(rule, ThresholdMerge)
    ways = [
        replace(rule, thresholds=rule.thresholds[:layers], images=(), frames=())
        for layers in range(1, len(rule.thresholds) + 1)
    ]
    drawn: list[list[Drawn]] = [[] for _ in images]
    for way in [*ways, *([rule] if rule.images else [])]:
        with apply(model, merge=way) as handle:
            encoder = Encoder(model, processor, handle)
            for of_image, image in zip(drawn, images, strict=True):
                of_image.append(_drawn(encoder([image])[0], image))
    return drawn


def sheet(rows: Sequence[Sequence[Image.Image]], labels: Sequence[Sequence[str]]) -> Image.Image:
    """Drawings in rows, all of one width, each with its label right below it; those of a single row in several rows
    where they are many.

    Args:
        rows: of equal length. The drawings of a row have one size.

    Raises:
        ValueError: there is no room for so many.
    """
    if len(rows) == 1:
        columns = len(rows[0]) if len(rows[0]) <= IN_A_ROW else None
        return contact_sheet(rows[0], columns, labels[0], LONGEST)
    across = (LONGEST - GAP) // len(rows[0]) - GAP
    down = (LONGEST - len(rows) * (_LABEL + 2 * GAP)) / sum(row[0].height / row[0].width for row in rows)
    width = min(CELL, across, int(down))
    if width < NARROWEST:
        raise ValueError(f"{len(rows)} rows of {len(rows[0])} do not fit on one sheet: give fewer images or budgets")
    sheets = []
    for row, texts in zip(rows, labels, strict=True):
        height = max(round(row[0].height * width / row[0].width), 1)
        sized = [drawing.resize((width, height), Image.Resampling.LANCZOS) for drawing in row]
        sheets.append(contact_sheet(sized, len(row), texts, longest=LONGEST))
    whole = Image.new("RGB", (sheets[0].width, sum(one.height for one in sheets)), "white")
    top = 0
    for one in sheets:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def _drawn(report: Report, image: Image.Image) -> Drawn:
    drawing = report.draw(image, slice(None))
    drawing.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return drawing, sum(report.kept), sum(report.original)
