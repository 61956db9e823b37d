"""Models and images to measure: a model on real photos, or a shape with random weights and recorded merges."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dymu.bench import shapes
from dymu.bench.replay import KeepAsMany, recorded
from dymu.bench.results import Model
from dymu.errors import UnsupportedModel
from dymu.families.resolve import resolve
from dymu.handle import apply, encoder_of, name_of
from dymu.hooks.trace import pictures_of, trace
from dymu.measure.provenance import fingerprint, thresholds_hash
from dymu.media import images as image_files
from dymu.prompting import pixels_for
from dymu.schedule import fewest
from dymu.thresholds import Thresholds
from dymu.token_map import TokenMap

PHOTOS = Path(__file__).with_name("photos")
CHUNK = 4
"""Photos that are encoded together while only their tokens are counted."""
SQUARE_PX = 448
"""Where a model cuts images into tiles, or takes pictures of any size, photos are squares of this side, so that all
prompts are equally long."""


class Workload(Protocol):
    """A model, images for it, and how to merge them.

    Attributes:
        name: of the model.
        model: without DyMU.
        tokens: of one image in the prompt, unmerged, those between its tiles included.
    """

    name: str
    model: Any
    tokens: int

    def budget(self, asked: int | float) -> int | float:
        """The nearest possible budget, in tokens.

        Raises:
            BadBudget: there is none.
        """
        ...

    def kept(self, budget: int | float) -> list[int]:
        """Tokens left in the prompt of each image of the workload."""
        ...

    def shown(self, images: Sequence[int]) -> dict[str, Tensor]:
        """The model's image arguments for these images, on its device."""
        ...

    def merging(self, budget: int | float, images: Sequence[int]) -> dict[str, Any]:
        """Arguments of `dymu.apply` that say what merges in these images."""
        ...

    def describe(self) -> Model:
        """The model's entry in the result file."""
        ...


class Shape:
    """A shape that comes with the library, with random weights and recorded merges.

    Where an image is several pictures, each is merged like another photo: the image's own and those that follow it.
    Where the model regroups patches, only how many merge is as recorded, see `dymu.bench.replay`.

    Raises:
        UnsupportedModel: no merges fit its pictures, or it crops or shrinks its image.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.name = name
        self.model = shapes.build(shapes.config(name), device, dtype, seed)
        self._image = shapes.image(name)
        parts = resolve(self.model)
        shown = self.shown([0])
        pixels = shown["pixel_values"]
        is_cut = parts.tower_kind.arrangement == "packed"
        pictures = pictures_of(parts, "image", shown, pixels if is_cut else pixels.reshape(-1, *pixels.shape[-3:]))
        rows, columns = pictures.unit_grids[0]
        tokens = rows * columns
        self._recorded = recorded(tokens) if self._image.units is None else recorded()
        self._scale = tokens / self._recorded.tokens
        depth = max(parts.feature_layers())
        self._fewest = math.ceil(fewest(tokens, depth, alike=True))
        self._cut = shapes.cut(name, {"encoder": depth, "decoder": len(parts.decoder_layers)})
        unmerged = TokenMap.identity(self._image.pictures, parts.prefix + tokens, device)
        colours = [torch.zeros(3, rows, columns, device=device)] * self._image.pictures
        (item,) = trace(parts, "image", (), shown, pictures, unmerged, colours)
        self.tokens = len(item.leaders)
        pictured = self._image.pictures * tokens
        if item.mixes or int(item.patch.sum()) != pictured:
            raise UnsupportedModel(
                f"the shape {name} crops or shrinks its image, so recorded merges do not say what is left of it; "
                "show it one that its pictures cover."
            )
        self._learned = self.tokens - pictured

    def budget(self, asked: int | float) -> int:
        return round(self._image.pictures * self._scale * self._near(asked))

    def kept(self, budget: int | float) -> list[int]:
        of_photos = self._of_photos(budget)
        return [
            self._learned + sum(of_photos[photo] for photo in self._photos(image)) for image in range(len(of_photos))
        ]

    def shown(self, images: Sequence[int]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self._image.pixels is None:
            side, pictures = self.model.config.vision_config.image_size, self._image.pictures
            first, *rest = (1, 3, side, side) if pictures == 1 else (1, pictures, 3, side, side)
        else:
            first, *rest = self._image.pixels
        pixels = torch.randn(len(images) * first, *rest, generator=generator)
        arguments = {
            name: torch.tensor([value] * len(images), device=self.model.device)
            for name, value in self._image.arguments.items()
        }
        return {"pixel_values": pixels.to(self.model.device, self.model.dtype), **arguments}

    def merging(self, budget: int | float, images: Sequence[int]) -> dict[str, Any]:
        photos = [photo for image in images for photo in self._photos(image)]
        if self._image.units is None:
            return {"merge": self._recorded.rule(self._near(budget), photos)}
        of_photos = self._of_photos(budget)
        return {"merge": KeepAsMany(tuple(of_photos[photo] for photo in photos))}

    def describe(self) -> Model:
        recorded_from = "recorded from real photos"
        if self._image.units is not None:
            recorded_from = "as many as recorded from real photos, the most similar by these weights"
        return Model(self.name, f"random, {self._cut}" if self._cut else "random", recorded_from)

    def _near(self, budget: int | float) -> int:
        """The recorded budget, of one photo, that is nearest to one of an image."""
        is_part = isinstance(budget, float) and budget <= 1
        return self._recorded.budget_near(budget if is_part else budget / self._scale, self._image.pictures)

    def _of_photos(self, budget: int | float) -> list[int]:
        """Tokens left of a picture that merges as each photo did."""
        if self._image.units is None:
            return self._recorded.kept(self._near(budget))
        return [max(round(self._scale * kept), self._fewest) for kept in self._recorded.kept(self._near(budget))]

    def _photos(self, image: int) -> list[int]:
        """The photos whose merges the pictures of an image take."""
        return [(image + picture) % len(self._recorded.photos) for picture in range(self._image.pictures)]


class Pretrained:
    """A pretrained model with thresholds, on real photos.

    Args:
        images: files; None: the photos that come with the library.

    Raises:
        BadThresholds: they are of another encoder.
        BadImage: one of the images cannot be used.
    """

    def __init__(
        self, model: Any, processor: Any, thresholds: Thresholds, images: Sequence[Path] | None = None
    ) -> None:
        self.name, self.model = name_of(model), model
        parts = resolve(model)
        thresholds.check_fits(encoder_of(parts), parts.family.cuts_images, max(parts.prefix, parts.dropped()))
        files = images or [PHOTOS / Path(photo).name for photo in recorded().photos]
        self._photos = [image_files.load(file).image for file in files]
        self._processor, self._thresholds, self._inner = processor, thresholds, parts.inner
        own_sizes = parts.family.grid is not None and parts.tower_kind.arrangement != "batch"
        self._square = parts.family.cuts_images or own_sizes
        with torch.inference_mode(), apply(model, thresholds, budget=max(thresholds.budgets)) as handle:
            self._inner.get_image_features(**self.shown([0]))
            self.tokens = sum(handle.last.original)
        self._counted: dict[int | float, list[int]] = {}

    def budget(self, asked: int | float) -> float:
        return self._thresholds.tokens_for(asked)

    @torch.inference_mode()
    def kept(self, budget: int | float) -> list[int]:
        if budget in self._counted:
            return self._counted[budget]
        kept = self._counted[budget] = []
        with apply(self.model, self._thresholds, budget=budget) as handle:
            for start in range(0, len(self._photos), CHUNK):
                photos = range(start, min(start + CHUNK, len(self._photos)))
                self._inner.get_image_features(**self.shown(photos))
                kept += np.array(handle.last.kept).reshape(len(photos), -1).sum(1).tolist()
        return kept

    def shown(self, images: Sequence[int]) -> dict[str, Tensor]:
        shown = {name: value.to(self.model.device) for name, value in self._processed(images).items()}
        return {**shown, "pixel_values": shown["pixel_values"].to(self.model.dtype)}

    def merging(self, budget: int | float, images: Sequence[int]) -> dict[str, Any]:
        return {"thresholds": self._thresholds, "budget": budget}

    def describe(self) -> Model:
        merges = f"its own, by thresholds {thresholds_hash(self._thresholds)}"
        return Model(self.name, fingerprint(self.model), merges)

    def _processed(self, photos: Sequence[int]) -> dict[str, Tensor]:
        pictures: list[Image.Image] = [self._photos[photo] for photo in photos]
        if self._square:
            pictures = [ImageOps.fit(picture, (SQUARE_PX, SQUARE_PX)) for picture in pictures]
        processed = pixels_for(self._processor, pictures)
        takes = inspect.signature(type(self._inner).get_image_features).parameters
        return {name: value for name, value in processed.items() if name in takes}


def spread(kept: Sequence[int], count: int) -> list[int]:
    """Indices of `count` representative photos: of each of `count` equal parts by tokens kept, the nearest to its mean.

    If `count` is larger than the number of photos, every photo comes once for each full turn.
    """
    order = np.argsort(kept, kind="stable")
    turns, rest = divmod(count, len(order))
    chosen = [int(photo) for photo in order] * turns
    for part in np.array_split(order, rest) if rest else ():
        tokens = np.array([kept[photo] for photo in part])
        chosen.append(int(part[np.abs(tokens - tokens.mean()).argmin()]))
    return chosen
