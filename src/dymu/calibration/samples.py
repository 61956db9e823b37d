"""Sample images on their way into the encoder."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dymu.errors import BadImage, DymuError
from dymu.families.encoders import LoneEncoder
from dymu.families.resolve import Parts
from dymu.files import expanded
from dymu.hooks import encoder
from dymu.media.images import in_folder, load
from dymu.merging.encoder_layer import Angles

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor | Mapping[str, Any]
"""An image as `dymu.media.images.load` takes it, or a folder of images."""


@dataclass(frozen=True)
class Inputs:
    """What the model's `get_image_features`, or the encoder itself, takes for one image, with `shape_only` pixels, and
    its number of pictures.

    Attributes:
        angles: by which the encoder rotates the patches of each, if it does.
    """

    kwargs: dict[str, Any]
    pictures: int
    angles: Angles | None = None

    @property
    def pixels(self) -> Tensor:
        """A tensor with their shape and no memory."""
        pixels: Tensor = self.kwargs["pixel_values"]
        return pixels


def shape_only(*shape: int) -> Tensor:
    """A tensor with that shape and no memory."""
    return torch.zeros((), dtype=torch.bool, device="cpu").expand(shape)


class _Stop(Exception):
    """Ends a vision encoder's forward at its first layer."""


def _embed(parts: Parts | LoneEncoder, kwargs: dict[str, Any]) -> tuple[Tensor, Angles | None]:
    """What the first encoder layer gets: patches [pictures, T, C], and their angles; from the arguments of
    `get_image_features`, or of the encoder.

    The model itself is run and stopped there, so that its ways of cutting and embedding need not be known.
    """
    taken: list[tuple[Tensor, Angles | None]] = []

    thread = threading.get_ident()

    def take(_layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if threading.get_ident() != thread:  # somebody else asks the same model
            return
        taken.append((args[0] if args else named["hidden_states"], named.get(parts.tower_kind.angles or "")))
        raise _Stop

    parameter = next(parts.tower.parameters())
    pixels = kwargs["pixel_values"].to(parameter.device, parameter.dtype)
    hook = parts.encoder_modules[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        if isinstance(parts, LoneEncoder):
            parts.tower(pixels, **{name: value for name, value in kwargs.items() if name != "pixel_values"})
        else:
            parts.inner.get_image_features(**{**kwargs, "pixel_values": pixels})
    except _Stop:
        pass
    finally:
        hook.remove()
    return taken[0]


def transform_of(transform: Any) -> Callable[..., dict[str, Tensor]]:
    """What makes pixels of images, from what makes a tensor [3, height, width] of one, as of timm and open_clip.

    Raises:
        DymuError: it cannot be called.
    """
    if not callable(transform):
        raise DymuError(
            f"a {type(transform).__name__} makes no pixels of images: give what turns a PIL image into a tensor "
            "[3, height, width], such as timm's or open_clip's transform, or a processor of transformers."
        )
    return lambda images, **_: {"pixel_values": torch.stack([transform(image) for image in images])}


def processor_of(processor: Any, kind: str) -> Any:
    """What makes pixels of images, from a model's processor, or given as such.

    Args:
        kind: `image` or `video`.

    Raises:
        DymuError: it is neither.
    """
    to_pixels = getattr(processor, f"{kind}_processor", processor)
    if not callable(to_pixels) or f"{kind}s" not in inspect.signature(to_pixels).parameters:
        raise DymuError(
            f"a {type(processor).__name__} makes no pixels of {kind}s: give the model's processor, as "
            f"AutoProcessor.from_pretrained gives it, or its {kind} processor."
        )
    return to_pixels


class Samples:
    """Sample images on their way into the encoder; gone through once.

    Attributes:
        expected: how many there are, as far as that is known ahead.
        used: how many could be used so far.
        skipped: those that could not, and why.
        left_out: of each folder, what was left out, in words.
    """

    def __init__(self, image_processor: Any, images: Any, parts: Parts | LoneEncoder) -> None:
        one = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image | Mapping)
        dimensions = 4 if isinstance(images, memoryview) else getattr(images, "ndim", 4)
        one = one or dimensions in (2, 3)
        if hasattr(images, "read") and not one:
            raise BadImage(f"a {type(images).__name__} is an open file: give its path, or the bytes read from it.")
        if not one and (not isinstance(images, Iterable) or dimensions == 0):
            raise BadImage(f"a {type(images).__name__} holds no images: give a folder, or a list of images or paths.")
        self._images: Iterable[ImageSource] = [images] if one else images
        self._processor, self._parts = image_processor, parts
        takes: Any = parts.tower if isinstance(parts, LoneEncoder) else parts.inner
        takes = type(takes).forward if isinstance(parts, LoneEncoder) else type(takes).get_image_features
        self._takes = {"pixel_values", *inspect.signature(takes).parameters}
        self._size: tuple[int, ...] | None = None
        self.expected: int | None = None
        with suppress(Exception):  # a length serves the bar alone
            self.expected = len(self._images) if isinstance(self._images, Sized) else None
        self.used = 0
        self.skipped: list[dict[str, str]] = []
        self.left_out: list[str] = []

    def batches(self, size: int, advance: Callable[[], object]) -> Iterator[tuple[Tensor, list[Inputs]]]:
        """Embedded pictures [B, T, C] of some images, at least `size` of them but for the last; `advance` is called
        after each image."""
        waiting: list[Tensor] = []
        inputs: list[Inputs] = []
        for number, source in enumerate(self._each(), 1):
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

    def _each(self) -> Iterator[ImageSource]:
        """The images, those in folders one by one."""
        for source in self._images:
            if isinstance(source, str | os.PathLike) and os.path.isdir(expanded(source)):
                try:
                    files, left_out = in_folder(Path(source))
                except BadImage as error:
                    self.skipped.append({"image": str(source), "why": str(error).removeprefix(f"{source} ")})
                    continue
                self.left_out += [left_out] if left_out else []
                if self.expected is not None:
                    self.expected += len(files) - 1
                yield from files
            else:
                yield source

    def _embedded(self, source: ImageSource, number: int) -> tuple[Tensor, Inputs] | None:
        """One image, or None where it cannot be read."""
        named = source if isinstance(source, str | os.PathLike) else getattr(source, "filename", "")
        name = str(named or f"image {number}")
        try:
            image = load(source, name).image
        except BadImage as error:
            self.skipped.append({"image": name, "why": str(error).removeprefix(f"{name} ")})
            return None
        processed = self._processor(images=[image], return_tensors="pt")
        kwargs = {key: value for key, value in processed.items() if key in self._takes}
        kind = self._parts.tower_kind
        asked = ("pixel_values", "image_sizes" if self._parts.cuts_images else None, kind.shapes, kind.present)
        needed = [name for name in asked if name is not None]
        missing = [name for name in needed if name not in kwargs]
        if missing:
            raise DymuError(
                f"a {type(self._processor).__name__} makes no {' and no '.join(missing)}, which this model needs: give "
                "the model's own processor, as AutoProcessor.from_pretrained gives it."
            )
        pixels = kwargs["pixel_values"]
        size: tuple[int, ...] = tuple(pixels.shape[-2:])
        if isinstance(self._parts, LoneEncoder) and kind.shapes is not None:
            size = encoder.pictures_of(self._parts, pixels.shape, kwargs).grids[0]
        self._size = self._size or size
        if size != self._size:
            sizes = " and ".join(f"{width} × {height}" for height, width in (self._size, size))
            raise DymuError(
                f"the image processor makes pictures of different sizes ({sizes} "
                f"{'patches' if kind.shapes else 'pixels'}), which calibration does not know yet; set it to one size."
            )
        embedded, angles = _embed(self._parts, kwargs)
        if kind.shapes is not None:
            embedded = embedded[:, : self._parts.prefix + size[0] * size[1]]
        return embedded, Inputs({**kwargs, "pixel_values": shape_only(*pixels.shape)}, len(embedded), angles)

    def why_none(self) -> str:
        """For an error: why there is nothing to calibrate on."""
        if not self.skipped:
            return "none was given; give a folder, or a list of images or paths."
        first = self.skipped[0]
        return f"all {len(self.skipped)} were skipped, the first because {first['image']} {first['why']}"
