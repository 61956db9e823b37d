"""Drawings of what merged, on one sheet: by image and budget, or after every encoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from dymu.counts import Count
from dymu.handle import apply
from dymu.reducers import ThresholdMerge
from dymu.report import Report
from dymu.survey.encode import Encoder
from dymu.thresholds import Thresholds

CELL = 672
"""Pixels of the longer side of a drawing, so that small images are shown as large as others."""

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
        ValueError: see `by_budget`.
    """
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


def _drawn(report: Report, image: Image.Image) -> Drawn:
    drawing = report.draw(image, slice(None))
    drawing.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return drawing, sum(report.kept), sum(report.original)
