"""Sample images on their way into the encoder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dymu.errors import BadImage, DymuError
from dymu.families.resolve import Parts
from dymu.media.images import load

ImageSource = str | os.PathLike[str] | Image.Image


@dataclass(frozen=True)
class Inputs:
    """What the model's `get_image_features` takes for one image, with `shape_only` pixels, and its number of
    pictures."""

    kwargs: dict[str, Any]
    pictures: int

    @property
    def pixels(self) -> Tensor:
        """A tensor with their shape and no memory."""
        pixels: Tensor = self.kwargs["pixel_values"]
        return pixels


def shape_only(*shape: int) -> Tensor:
    """A tensor with that shape and no memory."""
    return torch.zeros((), dtype=torch.bool).expand(shape)


class _Stop(Exception):
    """Ends a vision encoder's forward at its first layer."""


def _embed(parts: Parts, kwargs: dict[str, Any]) -> Tensor:
    """The input [pictures, T, C] of the first encoder layer, from the arguments of `get_image_features`.

    The model itself is run and stopped there, so that its ways of cutting and embedding need not be known.
    """
    taken: list[Tensor] = []

    def take(_layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        taken.append(args[0] if args else named["hidden_states"])
        raise _Stop

    parameter = next(parts.tower.parameters())
    pixels = kwargs["pixel_values"].to(parameter.device, parameter.dtype)
    hook = parts.encoder_modules[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        parts.inner.get_image_features(**{**kwargs, "pixel_values": pixels})
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
        waiting: list[Tensor] = []
        inputs: list[Inputs] = []
        for number, source in enumerate(self._images, 1):
            sample = self._embedded(source, number)
            advance()
            if sample is not None:
                self.used += 1
                waiting.append(sample[0])
                inputs.append(sample[1])
            if sum(map(len, waiting)) >= size:
                yield torch.cat(waiting), inputs
                waiting, inputs = [], []
        if waiting:
            yield torch.cat(waiting), inputs

    def _embedded(self, source: ImageSource, number: int) -> tuple[Tensor, Inputs] | None:
        """One image, or None where it cannot be read."""
        name = getattr(source, "filename", "") or f"image {number}" if isinstance(source, Image.Image) else str(source)
        try:
            image = load(source if isinstance(source, Image.Image) else Path(source)).image
        except BadImage as error:
            self.skipped.append({"image": name, "why": str(error).removeprefix(f"{name} ")})
            return None
        processed = self._processor(images=[image], return_tensors="pt")
        kwargs = {key: value for key, value in processed.items() if key in self._takes}
        pixels = kwargs["pixel_values"]
        self._size = self._size or pixels.shape[-2:]
        if pixels.shape[-2:] != self._size:
            sizes = " and ".join(f"{width} × {height}" for height, width in (self._size, pixels.shape[-2:]))
            raise DymuError(
                f"the image processor makes pictures of different sizes ({sizes} pixels), which calibration does not "
                "know yet; set it to one size."
            )
        embedded = _embed(self._parts, kwargs)
        return embedded, Inputs({**kwargs, "pixel_values": shape_only(*pixels.shape)}, len(embedded))

    def why_none(self) -> str:
        """For an error: why there is nothing to calibrate on."""
        if not self.skipped:
            return "none was given; give paths or PIL images."
        first = self.skipped[0]
        return f"all {len(self.skipped)} were skipped, the first because {first['image']} {first['why']}"
