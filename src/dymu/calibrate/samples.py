"""Sample images on their way into the encoder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dymu.errors import BadImage, DymuError
from dymu.families import Parts
from dymu.images import load

ImageSource = str | os.PathLike[str] | Image.Image


@dataclass(frozen=True)
class Inputs:
    """What the model's `get_image_features` takes for one image, without its pixels, and its number of pictures."""

    given: dict[str, Any]
    pictures: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every picture."""
        height, width = self.given["pixel_values"].shape[-2:]
        return height, width


def spans(images: Sequence[Inputs]) -> list[tuple[int, int]]:
    """Where the pictures of each image begin and end."""
    ends = list(accumulate(image.pictures for image in images))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def hollow(*shape: int) -> Tensor:
    """What looks like pixels and takes no memory."""
    return torch.zeros((), dtype=torch.bool).expand(shape)


class _Stop(Exception):
    """Ends a vision encoder's forward at its first layer."""


def _embed(parts: Parts, given: dict[str, Any]) -> Tensor:
    """What the first encoder layer would be given, [pictures, T, C], for what `get_image_features` is given.

    The model itself is run and stopped there, so that its ways of cutting and embedding need not be known.
    """
    taken: list[Tensor] = []

    def take(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    parameter = next(parts.tower.parameters())
    pixels = given["pixel_values"].to(parameter.device, parameter.dtype)
    hook = parts.encoder_modules[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        parts.inner.get_image_features(**{**given, "pixel_values": pixels})
    except _Stop:
        pass
    finally:
        hook.remove()
    return taken[0]


class Samples:
    """Sample images on their way into the encoder; gone through once.

    Attributes:
        expected: how many there are, if that is known ahead.
        used: how many could be used so far.
        skipped: those that could not, and why.
    """

    def __init__(self, image_processor: Any, images: Iterable[ImageSource], parts: Parts) -> None:
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        self._processor, self._images, self._parts = image_processor, images, parts
        self._takes = inspect.signature(type(parts.inner).get_image_features).parameters
        self._size: torch.Size | None = None
        self.expected = len(images) if isinstance(images, Sized) else None
        self.used = 0
        self.skipped: list[dict[str, str]] = []

    def batches(self, size: int, advance: Callable[[], object]) -> Iterator[tuple[Tensor, list[Inputs]]]:
        """Embedded pictures [B, T, C] of some images, at least `size` of them but for the last; `advance` is called
        after each image."""
        waiting: list[tuple[Tensor, Inputs]] = []
        for number, source in enumerate(self._images, 1):
            found = self._embedded(source, number)
            advance()
            if found is not None:
                self.used += 1
                waiting.append(found)
            if sum(image.pictures for _, image in waiting) >= size:
                yield torch.cat([embedded for embedded, _ in waiting]), [image for _, image in waiting]
                waiting = []
        if waiting:
            yield torch.cat([embedded for embedded, _ in waiting]), [image for _, image in waiting]

    def _embedded(self, source: ImageSource, number: int) -> tuple[Tensor, Inputs] | None:
        """One image, or None where it cannot be read."""
        name = getattr(source, "filename", "") or f"image {number}" if isinstance(source, Image.Image) else str(source)
        try:
            image = load(source if isinstance(source, Image.Image) else Path(source)).image
        except BadImage as error:
            self.skipped.append({"image": name, "why": str(error).removeprefix(f"{name} ")})
            return None
        made = self._processor(images=[image], return_tensors="pt")
        given = {key: value for key, value in made.items() if key in self._takes}
        pixels = given["pixel_values"]
        self._size = self._size or pixels.shape[-2:]
        if pixels.shape[-2:] != self._size:
            raise DymuError(
                f"the image processor makes pictures of different sizes ({_by(self._size)} and "
                f"{_by(pixels.shape[-2:])} pixels), which calibration does not know yet; set it to one size."
            )
        embedded = _embed(self._parts, given)
        return embedded, Inputs({**given, "pixel_values": hollow(*pixels.shape)}, len(embedded))

    def why_none(self) -> str:
        """For an error: why there is nothing to calibrate on."""
        if not self.skipped:
            return "none was given; give paths or PIL images."
        first = self.skipped[0]
        return f"all {len(self.skipped)} were skipped, the first because {first['image']} {first['why']}"


def _by(size: torch.Size) -> str:
    return f"{size[1]} × {size[0]}"
