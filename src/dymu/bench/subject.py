"""What is measured: a model on real photos, or a shape with random weights that merges as real photos were merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dymu.apply import apply, encoder_of, name_of
from dymu.bench import shapes
from dymu.bench.replay import recorded
from dymu.evaluate.run import fingerprint, short_hash
from dymu.families import FAMILIES, resolve
from dymu.tasks.scenes import evaluation_pack
from dymu.thresholds import Thresholds

CHUNK = 4
"""Photos that are encoded together while only their tokens are counted."""


class Subject(Protocol):
    """A model, pictures for it, and how to merge them.

    Attributes:
        name: of the model.
        model: without DyMU.
        tokens: of one image in the prompt, unmerged.
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
        """Image tokens left of each photo."""
        ...

    def pixels(self, photos: Sequence[int]) -> Tensor:
        """[images, 3, height, width] of photos by their numbers, on the model's device."""
        ...

    def merging(self, budget: int | float, photos: Sequence[int]) -> dict[str, Any]:
        """What `dymu.apply` is to merge these photos by."""
        ...

    def describe(self) -> dict[str, Any]:
        """For the result file: what tells this model from others."""
        ...


class Shape:
    """A shape that comes with the library, random weights, recorded merges."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.name = name
        self.model = shapes.build(shapes.config(name), device, dtype, seed)
        self.tokens = _image_tokens(self.model, self.pixels([0]))

    def budget(self, wanted: int | float) -> int:
        return recorded().budget_near(wanted)

    def kept(self, budget: int | float) -> list[int]:
        return recorded().kept(int(budget))

    def pixels(self, photos: Sequence[int]) -> Tensor:
        side = self.model.config.vision_config.image_size
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(photos), 3, side, side, generator=generator).to(self.model.device, self.model.dtype)

    def merging(self, budget: int | float, photos: Sequence[int]) -> dict[str, Any]:
        return {"merge": recorded().rule(int(budget), photos)}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "weights": "random", "merges": "recorded from real photos"}


class Pretrained:
    """A model with its own weights and thresholds, on the photos that merges were recorded from."""

    def __init__(self, model: Any, processor: Any, thresholds: Thresholds) -> None:
        self.name, self.model = name_of(model), model
        thresholds.check_fits(encoder_of(resolve(model, FAMILIES)))
        self._processor, self._thresholds = processor.image_processor, thresholds
        self.tokens = _image_tokens(model, self.pixels([0]))
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
                self.model.get_image_features(pixel_values=self.pixels(photos))
                found += handle.last.kept
        return found

    def pixels(self, photos: Sequence[int]) -> Tensor:
        pack = evaluation_pack()
        files = [recorded().photos[photo] for photo in photos]
        images = [pack.picture(file).convert("RGB") for file in files]
        pixels: Tensor = self._processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def merging(self, budget: int | float, photos: Sequence[int]) -> dict[str, Any]:
        return {"thresholds": self._thresholds, "budget": budget}

    def describe(self) -> dict[str, Any]:
        decided = [[entry.budget, entry.thresholds] for entry in self._thresholds.calibrated]
        return {
            "name": self.name,
            "weights": fingerprint(self.model),
            "merges": f"its own, by thresholds {short_hash(decided)}",
        }


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
def _image_tokens(model: Any, pixels: Tensor) -> int:
    return len(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0])
