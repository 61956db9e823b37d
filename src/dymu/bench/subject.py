"""What is measured: a model on real photos, or a shape with random weights that merges as real photos were merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from dymu.apply import apply, encoder_of, name_of
from dymu.bench import shapes
from dymu.bench.replay import recorded
from dymu.errors import UnsupportedModel
from dymu.evaluate.run import fingerprint, short_hash
from dymu.families import FAMILIES, resolve
from dymu.placement import place, seen_by
from dymu.tasks.scenes import evaluation_pack
from dymu.thresholds import Thresholds
from dymu.token_map import TokenMap

CHUNK = 4
"""Photos that are encoded together while only their tokens are counted."""
SQUARE_PX = 448
"""Where a model cuts images into tiles, photos are squares of this side, so that all prompts are equally long."""


class Subject(Protocol):
    """A model, images for it, and how to merge them.

    Attributes:
        name: of the model.
        model: without DyMU.
        tokens: of one image in the prompt, unmerged, those between its tiles included.
    """

    name: str
    model: Any
    tokens: int

    def budget(self, wanted: int | float) -> int | float:
        """The budget that is measured where this one is wanted, in tokens.

        Raises:
            BadBudget: it cannot be had.
        """
        ...

    def kept(self, budget: int | float) -> list[int]:
        """Tokens left in the prompt of each image that there is."""
        ...

    def shown(self, images: Sequence[int]) -> dict[str, Tensor]:
        """What the model takes, besides words, to see images by their numbers; on its device."""
        ...

    def merging(self, budget: int | float, images: Sequence[int]) -> dict[str, Any]:
        """What `dymu.apply` is to merge these images by."""
        ...

    def describe(self) -> dict[str, Any]:
        """For the result file: what tells this model from others."""
        ...


class Shape:
    """A shape that comes with the library, random weights, recorded merges.

    Where an image is several pictures, each is merged as another photo was: the image's own and those that follow it.

    Raises:
        UnsupportedModel: no merges fit its pictures, or it puts others into the prompt than these.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.name = name
        self.model = shapes.build(shapes.config(name), device, dtype, seed)
        self._image = shapes.image(name)
        parts = resolve(self.model, FAMILIES)
        vision = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        self._recorded = recorded(patches)
        shown = self.shown([0])
        unmerged = TokenMap.identity(self._image.pictures, parts.prefix + patches, device)
        (item,) = place(parts, "image", (), shown, unmerged, seen_by(shown["pixel_values"].flatten(0, -4), patches))
        self.tokens = len(item.leaders)
        pictured = self._image.pictures * patches
        if item.mixes or int(item.patch.sum()) != pictured:
            raise UnsupportedModel(
                f"the shape {name} crops or shrinks its image, so recorded merges do not say what is left of it; "
                "show it one that its pictures cover."
            )
        self._learned = self.tokens - pictured

    def budget(self, wanted: int | float) -> int:
        return self._image.pictures * self._recorded.budget_near(wanted, self._image.pictures)

    def kept(self, budget: int | float) -> list[int]:
        of_photos = self._recorded.kept(int(budget) // self._image.pictures)
        return [
            self._learned + sum(of_photos[photo] for photo in self._photos(image)) for image in range(len(of_photos))
        ]

    def shown(self, images: Sequence[int]) -> dict[str, Tensor]:
        side, pictures = self.model.config.vision_config.image_size, self._image.pictures
        generator = torch.Generator().manual_seed(0)
        cut = (len(images),) if pictures == 1 else (len(images), pictures)
        pixels = torch.randn(*cut, 3, side, side, generator=generator)
        given = {name: torch.tensor([value] * len(images)) for name, value in self._image.given.items()}
        given = {name: value.to(self.model.device) for name, value in given.items()}
        return {"pixel_values": pixels.to(self.model.device, self.model.dtype), **given}

    def merging(self, budget: int | float, images: Sequence[int]) -> dict[str, Any]:
        photos = [photo for image in images for photo in self._photos(image)]
        return {"merge": self._recorded.rule(int(budget) // self._image.pictures, photos)}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "weights": "random", "merges": "recorded from real photos"}

    def _photos(self, image: int) -> list[int]:
        """Those whose merges an image's pictures take."""
        return [(image + picture) % len(self._recorded.photos) for picture in range(self._image.pictures)]


class Pretrained:
    """A model with its own weights and thresholds, on the photos that merges were recorded from."""

    def __init__(self, model: Any, processor: Any, thresholds: Thresholds) -> None:
        self.name, self.model = name_of(model), model
        thresholds.check_fits(encoder_of(resolve(model, FAMILIES)))
        self._processor, self._thresholds, self._tiles = processor.image_processor, thresholds, False
        self._tiles = self._processed([0])["pixel_values"].ndim > 4
        self.tokens = _image_tokens(model, self.shown([0]))
        self._counted: dict[int | float, list[int]] = {}

    def budget(self, wanted: int | float) -> float:
        return self._thresholds.tokens_for(wanted)

    @torch.inference_mode()
    def kept(self, budget: int | float) -> list[int]:
        if budget in self._counted:
            return self._counted[budget]
        found = self._counted[budget] = []
        with apply(self.model, self._thresholds, budget=budget) as handle:
            for start in range(0, len(recorded().photos), CHUNK):
                photos = range(start, min(start + CHUNK, len(recorded().photos)))
                self.model.get_image_features(**self.shown(photos))
                found += handle.last.kept
        return found

    def shown(self, images: Sequence[int]) -> dict[str, Tensor]:
        shown = {name: value.to(self.model.device) for name, value in self._processed(images).items()}
        return {**shown, "pixel_values": shown["pixel_values"].to(self.model.dtype)}

    def merging(self, budget: int | float, images: Sequence[int]) -> dict[str, Any]:
        return {"thresholds": self._thresholds, "budget": budget}

    def describe(self) -> dict[str, Any]:
        decided = [[entry.budget, entry.thresholds] for entry in self._thresholds.calibrated]
        return {
            "name": self.name,
            "weights": fingerprint(self.model),
            "merges": f"its own, by thresholds {short_hash(decided)}",
        }

    def _processed(self, photos: Sequence[int]) -> dict[str, Tensor]:
        pack = evaluation_pack()
        pictures = [pack.picture(recorded().photos[photo]).convert("RGB") for photo in photos]
        if self._tiles:
            pictures = [ImageOps.fit(picture, (SQUARE_PX, SQUARE_PX)) for picture in pictures]
        return dict(self._processor(images=pictures, return_tensors="pt"))


def spread(kept: Sequence[int], count: int) -> list[int]:
    """Numbers of `count` photos that stand for all: sorted by tokens kept and cut into as many equal parts, each part's
    photo nearest to its mean.

    More than there are go round again.
    """
    order = np.argsort(kept, kind="stable")
    turns, rest = divmod(count, len(order))
    chosen = [int(photo) for photo in order] * turns
    for part in np.array_split(order, rest) if rest else ():
        tokens = np.array([kept[photo] for photo in part])
        chosen.append(int(part[np.abs(tokens - tokens.mean()).argmin()]))
    return chosen


@torch.inference_mode()
def _image_tokens(model: Any, shown: dict[str, Tensor]) -> int:
    return len(model.get_image_features(**shown, return_dict=True).pooler_output[0])
