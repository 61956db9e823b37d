"""Count what pictures keep at several budgets, batch by batch, going on where an earlier run was stopped."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from dymu.captioning.sources import Source
from dymu.errors import BadImage, BadThresholds
from dymu.files import escaped, first_line
from dymu.handle import Handle, name_of
from dymu.measure.progress import Bar
from dymu.measure.provenance import fingerprint, short_hash, thresholds_hash, versions
from dymu.media.features import SIDE, features
from dymu.media.images import load
from dymu.survey.encode import Encoder
from dymu.survey.file import FORMAT, Header, Row, StatsFile
from dymu.survey.page import THUMBNAIL, Thumbnail
from dymu.survey.summary import AtBudget
from dymu.thresholds import Thresholds

PIXELS = 32_000_000
"""Of images that are held at a time, at least; so that eight large photos do not fill the memory."""


class Counter:
    """A model whose encoder counts what pictures keep.

    Args:
        model, processor: of transformers.
        handle: of DyMU on this model, with these thresholds.
        budgets: in image tokens.
    """

    def __init__(
        self, model: Any, processor: Any, handle: Handle, thresholds: Thresholds, budgets: Sequence[float]
    ) -> None:
        self.encoder, self.handle, self.budgets = Encoder(model, processor, handle), handle, list(budgets)
        self._model, self._processor, self._thresholds = model, processor, thresholds
        self.forecasts = _forecasts(thresholds, self.budgets[0])

    def header(self, sources: Sequence[str]) -> Header:
        """What the counts depend on; `sources`: see `Header`."""
        forecasts = msgspec.to_builtins(self._thresholds.forecasts) if self.forecasts else None
        return Header(
            dymu_stats=FORMAT,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            sources=[escaped(source) for source in sources],
            model=name_of(self._model),
            weights=fingerprint(self._model),
            dtype=str(self._model.dtype).removeprefix("torch."),
            processor=short_hash(self._processor.image_processor.to_dict()),
            thresholds=thresholds_hash(self._thresholds),
            forecasts=short_hash(forecasts) if forecasts else "",
            budgets=self.budgets,
            versions=versions("torch", "transformers", "pillow"),
        )

    def __call__(self, batch: Sequence[Source]) -> list[Row]:
        """A row for each picture; one that cannot be used has an error."""
        rows: list[Row] = []
        held: dict[str, Image.Image] = {}
        for source in batch:
            try:
                held[source.name] = load(source.path, source.name).image
            except BadImage as error:
                rows.append(Row(source.name, error=str(error).replace(str(source.path), source.name, 1)))
            if sum(image.width * image.height for image in held.values()) > PIXELS:
                rows += self._counted(held)
                held = {}
        rows += self._counted(held)
        _give_memory_back()
        return rows

    def thumbnails(self, pictures: Sequence[tuple[Row, Path]], at: AtBudget) -> list[Thumbnail]:
        """Pictures with what merged at a budget drawn on them, or as they are where that cannot be; those that are gone
        since they were counted are left out."""
        drawn = []
        self.handle.budget = at.budget
        for row, path in pictures:
            with suppress(BadImage):
                picture = load(path, row.image).image
                with suppress(ValueError):
                    picture = self.encoder([picture])[0].draw(picture, slice(None))
                picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
                drawn.append(Thumbnail(picture, row.image, row.kept[self.budgets.index(at.budget)], row.tokens))
        return drawn

    def _counted(self, images: dict[str, Image.Image]) -> list[Row]:
        if not images:
            return []
        kept: list[list[int]] = []
        try:
            for budget in self.budgets:
                self.handle.budget = budget
                reports = self.encoder(list(images.values()))
                kept.append([sum(item.budgeted for item in report.items) for report in reports])
            tokens = [sum(int(item.patch.sum()) for item in report.items) for report in reports]
        except ValueError as error:
            if len(images) > 1:  # one that the processor does not take keeps no other from being counted
                return [row for name, image in images.items() for row in self._counted({name: image})]
            (name,) = images
            why = f"{name} is not taken by the model ({first_line(error)}): give it another size or form."
            return [Row(name, error=why)]
        return [
            self._row(name, image, full, list(of_image))
            for (name, image), full, of_image in zip(images.items(), tokens, zip(*kept, strict=True), strict=True)
        ]

    def _row(self, name: str, image: Image.Image, tokens: int, kept: list[int]) -> Row:
        row = Row(name, tokens, kept, math.exp(features(image)[0]) / SIDE**2)
        if self.forecasts:
            told = [self._thresholds.forecast(image, budget, tokens=tokens) for budget in self.budgets]
            row.expected = [round(forecast.expected, 2) for forecast in told]
            row.reserve = [forecast.reserve for forecast in told]
        return row


def survey(
    counted: Callable[[Sequence[Source]], list[Row]],
    header: Header,
    sources: Sequence[Source],
    path: Path,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Row]:
    """Count what the file has no counts of yet, and append it.

    Args:
        counted: such as a `Counter`.
        header: see `Counter.header`.
        path: the file of counts; a part of this very run is continued.

    Returns:
        The rows of all pictures, those of earlier runs too.

    Raises:
        BadResults, BadOutput: see `StatsFile`.
    """
    with StatsFile(path, header) as file, Bar(progress) as bar:
        there = {name for name, row in file.rows.items() if row.error is None}
        left = [source for source in sources if source.name not in there]
        todo = bar.add_task("pictures", total=len(sources), completed=len(sources) - len(left))
        for start in range(0, len(left), batch_size):
            rows = counted(left[start : start + batch_size])
            for row in rows:
                file.add(row)
            bar.advance(todo, len(rows))
        return [file.rows[source.name] for source in sources]


def _give_memory_back() -> None:
    """Have the C library give freed memory back, where it can: each picture keeps another number of tokens, so what
    its layers free leaves gaps of all sizes. Without this, 2,000 pictures of the demo model took 2.6 GiB."""
    trim = getattr(ctypes.pythonapi, "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forecasts(thresholds: Thresholds, budget: float) -> bool:
    """Whether the thresholds tell beforehand what pictures keep, in a way that this version knows."""
    try:
        thresholds.forecast(Image.new("RGB", (8, 8)), budget, tokens=1)
    except BadThresholds:
        return False
    return True
