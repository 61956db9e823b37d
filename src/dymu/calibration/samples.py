"""Sample images on their way into the encoder."""

from __future__ import annotations

import inspect
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dymu.errors import BadImage, DymuError
from dymu.families.encoders import LoneEncoder
from dymu.families.resolve import Modality, Parts
from dymu.files import expanded, first_line
from dymu.hooks import encoder
from dymu.hooks.refusals import refuse_absent_patches, refuse_late_windows
from dymu.hooks.trace import StandIn, pictures_of
from dymu.media.features import features
from dymu.media.images import in_folder, load
from dymu.merging import Pictures
from dymu.merging.encoder_layer import Angles
from dymu.prompting import pixels_for, placeholder_of

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor | Mapping[str, Any]
"""An image as `dymu.media.images.load` takes it, or a folder of images."""


@dataclass(frozen=True)
class Inputs:
    """One image: what the model's `get_image_features`, or the encoder itself, takes for it, with `shape_only` pixels;
    the pictures that the encoder gets of it; and what its own pixels are like, see `dymu.media.features`."""

    kwargs: dict[str, Any]
    pictures: Pictures
    features: tuple[float, ...]


@dataclass(frozen=True)
class Embedded:
    """Some images as the first encoder layer gets them.

    Attributes:
        images: their arguments.
        pictures: of all of them.
        x: see `dymu.choices.Arrangement`.
        angles, window: see `Pictures.enter`.
        windowed: for each layer that may merge, whether it attends within windows.
    """

    images: list[Inputs]
    pictures: Pictures
    x: Tensor
    angles: Angles | None
    window: Tensor | None
    windowed: tuple[bool, ...]

    @property
    def alike(self) -> tuple[int, ...]:
        """What has the same can go through the encoder together."""
        pictures = self.pictures
        return {"batch": pictures.grids[0], "padded": (pictures.length,)}.get(pictures.arrangement, ())

    @classmethod
    def joined(cls, parts: Sequence[Embedded]) -> Embedded:
        """Of several that are `alike`."""
        first, arrangement = parts[0], parts[0].pictures.arrangement
        pictures = replace(first.pictures, grids=tuple(grid for part in parts for grid in part.pictures.grids))
        in_a_row = arrangement in ("packed", "raster")
        angles = first.angles
        if angles is not None and arrangement != "batch":
            every = [part.angles for part in parts if part.angles is not None]
            cos, sin = (
                [one.flatten(0, -2) if in_a_row else one for one in of_all] for of_all in zip(*every, strict=True)
            )
            angles = torch.cat(cos), torch.cat(sin)
        return cls(
            images=[image for part in parts for image in part.images],
            pictures=pictures,
            x=torch.cat([part.x for part in parts], -2 if in_a_row else 0),
            angles=angles,
            window=_joined_windows(parts),
            windowed=tuple(any(of_layer) for of_layer in zip(*(part.windowed for part in parts), strict=True)),
        )


def _joined_windows(parts: Sequence[Embedded]) -> Tensor | None:
    """int64 [units], the window of each; a picture without windows is one."""
    if all(part.window is None for part in parts):
        return None
    windows, count = [], 0
    for part in parts:
        window = part.window
        if window is None:
            length = part.pictures.layout(part.x.device).length
            window = torch.arange(len(length), device=length.device).repeat_interleave(length)
        windows.append(window + count)
        count += int(window[-1]) + 1
    return torch.cat(windows)


def shape_only(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of True with that shape and no memory."""
    return torch.ones((), dtype=torch.bool, device=device).expand(shape)


def _without_memory(x: Any) -> Any:
    """What holds one value everywhere, as masks may, without the memory for it."""
    if not isinstance(x, Tensor) or x.numel() < 2 or not bool((x == x.flatten()[0]).all()):
        return x
    return x.flatten()[0].clone().expand(x.shape)


class _Stop(Exception):
    """Ends a vision encoder's forward once all is known that is asked of it."""


def _first_layer(parts: Parts | LoneEncoder, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What the first encoder layer gets, from the arguments of `get_image_features`, or of the encoder: the patches,
    and what else by name.

    The model itself is run and stopped there, so that its ways of cutting and embedding need not be known.
    """
    taken: list[tuple[Tensor, dict[str, Any]]] = []
    thread = threading.get_ident()

    def take(_layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if threading.get_ident() != thread:  # somebody else asks the same model
            return
        if parts.tower_kind.arrangement == "batch" and parts.tower_kind.present is None:
            refuse_absent_patches(named.get("attention_mask", args[1] if len(args) > 1 else None))
        taken.append((args[0] if args else named["hidden_states"], named))
        raise _Stop

    hook = parts.encoder_modules[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        if isinstance(parts, LoneEncoder):
            parts.tower(kwargs["pixel_values"], **{key: kwargs[key] for key in kwargs if key != "pixel_values"})
        else:
            parts.inner.get_image_features(**kwargs)
    except _Stop:
        pass
    finally:
        hook.remove()
    return taken[0]


def _all_layers(parts: Parts, kwargs: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
    """What every encoder layer that may merge gets, see `_first_layer`, were each to return its input."""
    taken: list[tuple[Tensor, dict[str, Any]]] = []
    depth = max(parts.feature_layers())

    def layer(x: Tensor, *_: Any, **named: Any) -> Tensor:
        taken.append((x, named))
        if len(taken) == depth:
            raise _Stop
        return x

    inner = StandIn(parts.inner, {f"{parts.family.tower}.{parts.tower_kind.layers}": (layer,) * depth})
    with suppress(_Stop):
        type(parts.inner).get_image_features(inner, **kwargs)
    return taken


def arguments_for(parts: Parts | LoneEncoder, modality: Modality, processor: Any, processed: Mapping[str, Any]) -> Any:
    """What `get_image_features` or `get_video_features`, or an encoder by itself, takes of what a processor made: by
    name, on the encoder's device, pixels in its type.

    Raises:
        DymuError: something that the model needs is not among it.
    """
    kind, pixels = parts.tower_kind, "pixel_values" if modality == "image" else "pixel_values_videos"
    if isinstance(parts, LoneEncoder):
        takes = inspect.signature(type(parts.tower).forward).parameters
        needed = [pixels, *(name for name in (kind.shapes, kind.present) if name is not None)]
    else:
        takes = inspect.signature(getattr(type(parts.inner), f"get_{modality}_features")).parameters
        needed = [name for name, taken in takes.items() if taken.default is inspect.Parameter.empty and taken.kind < 2]
        needed = needed[1:]  # without self
        if parts.family.grid is not None and kind.arrangement != "batch":
            needed.append(parts.family.grid.format(modality=modality))
    missing = [name for name in needed if name not in processed]
    if missing:
        raise DymuError(
            f"a {_named(processor)} makes no {' and no '.join(missing)}, which this model needs: give the "
            "model's own processor, as AutoProcessor.from_pretrained gives it."
        )
    like = next(parts.tower.parameters())
    arguments = {key: value for key, value in processed.items() if key in takes or key == pixels}
    arguments = {key: value.to(like.device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    return {**arguments, pixels: arguments[pixels].to(like.dtype)}


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
    if kind == "video" or to_pixels is processor or not placeholder_of(processor):
        return to_pixels

    def of_images(images: Sequence[Image.Image], **_: Any) -> Any:
        return pixels_for(processor, images)

    of_images.__name__ = type(processor).__name__
    return of_images


def _named(to_pixels: Any) -> str:
    return getattr(to_pixels, "__name__", type(to_pixels).__name__)


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
        self.expected: int | None = None
        with suppress(Exception):  # a length serves the bar alone
            self.expected = len(self._images) if isinstance(self._images, Sized) else None
        self.used = 0
        self.skipped: list[dict[str, str]] = []
        self.left_out: list[str] = []

    def batches(self, size: int, advance: Callable[[], object]) -> Iterator[Embedded]:
        """Some images at a time, of at least `size` pictures but for the last ones; `advance` is called after each
        image."""
        waiting: dict[tuple[int, ...], list[Embedded]] = {}
        for number, source in enumerate(self._each(), 1):
            sample = self._embedded(source, number)
            advance()
            if sample is None:
                continue
            self.used += 1
            together = waiting.setdefault(sample.alike, [])
            together.append(sample)
            if sum(len(one.pictures.grids) for one in together) >= size:
                yield Embedded.joined(waiting.pop(sample.alike))
        for together in waiting.values():
            yield Embedded.joined(together)

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

    def _embedded(self, source: ImageSource, number: int) -> Embedded | None:
        """One image, or None where it cannot be read."""
        named = source if isinstance(source, str | os.PathLike) else getattr(source, "filename", "")
        name = str(named or f"image {number}")
        try:
            image = load(source, name).image
        except BadImage as error:
            self.skipped.append({"image": name, "why": str(error).removeprefix(f"{name} ")})
            return None
        parts = self._parts
        kwargs = arguments_for(parts, "image", self._processor, self._processor(images=[image], return_tensors="pt"))
        pixels, segments = kwargs["pixel_values"], parts.tower_kind.segments
        try:
            one = segments is None or isinstance(parts, LoneEncoder)
            layers = [_first_layer(parts, kwargs)] if one else _all_layers(parts, kwargs)  # type: ignore[arg-type]
        except DymuError:
            raise
        except ValueError as error:
            raise DymuError(
                f"the model does not take what a {_named(self._processor)} makes of {name} "
                f"({first_line(error)}); give the model's own processor, as AutoProcessor.from_pretrained gives it."
            ) from error
        x, others = layers[0]
        if isinstance(parts, LoneEncoder):
            pictures = encoder.pictures_in(parts, pixels.shape, kwargs)
            x = x[:, : parts.prefix + math.prod(pictures.grids[0])]
        else:
            pictures = pictures_of(parts, "image", kwargs, shape_only(len(x), *pixels.shape[-3:]))
        windows = [None if segments is None else pictures.window(of_layer[segments]) for _, of_layer in layers]
        for window in windows:
            refuse_late_windows(windows[0], window)
        kwargs["pixel_values"] = shape_only(*pixels.shape, device=pixels.device)
        windowed = [window is not None for window in windows] * (max(parts.feature_layers()) // len(windows))
        return Embedded(
            images=[Inputs({key: _without_memory(value) for key, value in kwargs.items()}, pictures, features(image))],
            pictures=pictures,
            x=x,
            angles=others.get(parts.tower_kind.angles or ""),
            window=windows[0],
            windowed=tuple(windowed),
        )


def why_none(skipped: Sequence[dict[str, str]]) -> str:
    """For an error: why there is nothing to calibrate on."""
    if not skipped:
        return "none was given; give a folder, or a list of images or paths."
    first = skipped[0]
    return f"all {len(skipped)} were skipped, the first because {first['image']} {first['why']}"
