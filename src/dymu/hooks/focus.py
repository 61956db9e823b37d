"""What a user has in focus, as patches of the pictures that an encoder gets."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dymu.errors import BadFocus
from dymu.files import first_line
from dymu.media import masks
from dymu.merging import Pictures
from dymu.reducers import Focus, Reducer, Shown

LEAST_RANGE = 1.0
"""Of a processor's pixels, whose standard deviation is about 1, from black to white; pictures of less stay pale."""

Finder = Callable[[Image.Image], Any]
"""From a picture to a mask [height, width], numbers above 0 where it matters."""

PART = 0.1
"""Of a patch that must be in focus, at least, for the patch to be."""


@dataclass(frozen=True, eq=False)
class Regions:
    """Parts of a picture, in widths and heights of it.

    Attributes:
        boxes: float [n, 4]: left, top, right, bottom; a point is a box of no size.
        mask: float [height, width]; instead of boxes.
    """

    boxes: np.ndarray | None = None
    mask: np.ndarray | None = None

    def within(self, location: np.ndarray) -> np.ndarray:
        """bool [N], whether each patch is in focus, by what it shows, [N, 4]; see `Shown.location`."""
        there = ~np.isnan(location).any(1)
        left, top, right, bottom = np.nan_to_num(location).T[:, :, None]
        if self.boxes is not None:
            box = self.boxes.T[:, None]
            across = np.minimum(right, box[2]) - np.maximum(left, box[0])
            down = np.minimum(bottom, box[3]) - np.maximum(top, box[1])
            smaller = np.minimum((right - left) * (bottom - top), (box[2] - box[0]) * (box[3] - box[1]))
            inside = (across >= 0) & (down >= 0) & (across * down >= PART * smaller)
            return np.asarray(there & inside.any(1))
        assert self.mask is not None
        height, width = self.mask.shape
        total = np.pad(self.mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        begin = [
            np.clip(np.floor(at * size), 0, size - 1).astype(int)[:, 0] for at, size in ((top, height), (left, width))
        ]
        end = [
            np.clip(np.ceil(at * size), start + 1, size).astype(int)
            for at, size, start in ((bottom[:, 0], height, begin[0]), (right[:, 0], width, begin[1]))
        ]
        (row, column), (down_to, across_to) = begin, end
        summed = total[down_to, across_to] - total[row, across_to] - total[down_to, column] + total[row, column]
        return np.asarray(there & (summed / ((down_to - row) * (across_to - column)) >= PART))


Spec = Finder | Regions | None


NAMED: dict[str, Finder] = {"text": masks.text, "edges": masks.edges}


def spec_of(focus: Any) -> Spec:
    """What is in focus in one image, or in all alike.

    Args:
        focus: `text` or `edges`; a function from a picture, as the encoder sees it, to a mask of its height and width;
            a box (left, top, right, bottom), or a sequence of boxes or of points (x, y), in widths and heights of the
            user's picture; or a mask of it [height, width], an array. None: nothing.

    Raises:
        BadFocus: it is none of these, or lies outside the picture.
    """
    if focus is None:
        return None
    if isinstance(focus, str):
        if focus not in NAMED:
            raise BadFocus(f"unknown focus {focus!r}; choose {' or '.join(NAMED)}, or give boxes, points or a mask.")
        if focus == "text" and not masks.detects_text():
            masks.text(Image.new("RGB", (32, 32)))  # which says what is missing
        return NAMED[focus]
    if isinstance(focus, Image.Image):
        focus = np.asarray(focus.convert("L"), np.float32) / 255
    if isinstance(focus, Tensor):
        focus = focus.detach().cpu().numpy()
    if isinstance(focus, np.ndarray) and focus.ndim == 2:
        if focus.shape[1] in (2, 4) and focus.dtype != bool:
            raise BadFocus(
                f"an array {list(focus.shape)} may be boxes, points or a very small mask: give boxes and points as a "
                "tuple of tuples, and a small mask as one of bool."
            )
        mask = np.asarray(focus, np.float64)
        if not mask.size or not np.isfinite(mask).all():
            raise BadFocus(f"a mask is of numbers [height, width], and this one {list(mask.shape)} has none, or NaN.")
        return Regions(mask=np.clip(mask, 0, 1))
    if callable(focus):
        finder: Finder = focus
        return finder
    try:
        flat = isinstance(focus[0], numbers.Real)
        boxes = np.asarray([focus] if flat else list(focus), np.float64)
    except (TypeError, ValueError, IndexError, KeyError):
        boxes = np.empty(0)
    if boxes.ndim != 2 or boxes.shape[1] not in (2, 4):
        raise BadFocus(
            "a focus is a box (left, top, right, bottom), points (x, y), a mask, a function or a name, not "
            f"{' '.join(repr(focus).split())[:80]}."
        )
    boxes = np.concatenate((boxes, boxes), 1) if boxes.shape[1] == 2 else boxes
    if not ((boxes >= 0) & (boxes <= 1)).all() or (boxes[:, :2] > boxes[:, 2:]).any():
        raise BadFocus(
            f"{focus!r} lies outside the picture, whose left, top, right and bottom are 0, 0, 1 and 1: give parts of "
            "its width and height, left ahead of right and top ahead of bottom."
        )
    return Regions(boxes=boxes)


@dataclass(frozen=True, eq=False)
class InFocus:
    """What is in focus in the images of a call.

    Attributes:
        specs: one for all, or one for each.
        inside: see `Focus`.
    """

    specs: Spec | tuple[Spec, ...]
    inside: Reducer | None = None

    def around(self, rule: Reducer) -> Reducer:
        """The rule with this in focus."""
        return Focus(rule, self.inside)

    def grids(
        self, shown: Shown, which: Callable[[Shown], slice], pictures: Pictures, apart: bool, patch: tuple[int, int]
    ) -> list[Tensor] | None:
        """Of every picture bool [rows, columns] of its units; None: nothing is in focus.

        Args:
            which: of the specs, if there is one for each image, those of what is shown.
            pictures: that are shown.
            apart: whether the location of a tile's patches is that in the tile.
            patch: rows and columns of a patch, in pixels.

        Raises:
            BadFocus: there are more of them than images, or fewer; or it is not known where they lie.
        """
        if isinstance(self.specs, tuple):
            shown.check_by_image()
            own = self.specs[which(shown)]
            if len(own) != len(shown.items):
                raise BadFocus(
                    f"{len(own)} focuses were given for {len(shown.items)} {'videos' if shown.video else 'images'}; "
                    "give one for each, images first, or None."
                )
            specs: list[Spec] = [own[item] for item in shown.item]
        else:
            specs = [self.specs] * len(shown.grids)
        if all(spec is None for spec in specs):
            return None
        grids, locations = list[Tensor](), None
        for number, (spec, (rows, columns)) in enumerate(zip(specs, shown.grids, strict=True)):
            if isinstance(spec, Regions):
                if apart and len(shown.items[shown.item[number]]) > 1:
                    raise BadFocus(
                        "this model does not put the tiles of an image together, so that it is not known where a box "
                        "or mask lies in them: give a function from a tile to its mask."
                    )
                if locations is None:
                    by_layers = [boxes[:count] for boxes, count in zip(shown.location.cpu(), shown.counts, strict=True)]
                    locations = pictures.by_rows(torch.cat(by_layers)).split(list(shown.counts))
                found = spec.within(locations[number].double().numpy()).reshape(rows, columns)
            elif spec is None:
                found = np.zeros((rows, columns), bool)
            else:
                found = _found(spec, _image(shown.pixels[number], pictures, number, patch), rows, columns)
            grids.append(torch.from_numpy(found))
        return grids


def _found(finder: Finder, image: Image.Image, rows: int, columns: int) -> np.ndarray:
    try:
        mask = finder(image)
    except BadFocus:
        raise
    except Exception as error:
        raise BadFocus(
            f"the focus function failed ({type(error).__name__}: {first_line(error)}); try it on a picture of "
            f"{image.width} × {image.height} pixels."
        ) from error
    if mask is None:
        return np.zeros((rows, columns), bool)
    mask = np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask, np.float32)
    if mask.shape != (image.height, image.width) or not np.isfinite(mask).all():
        raise BadFocus(
            f"the focus function answered a mask of {list(mask.shape)} for a picture of {image.height} rows and "
            f"{image.width} columns; answer one finite number for each pixel."
        )
    return masks.on_grid(np.clip(mask, 0, 1), rows, columns) >= PART


def _image(pixels: Tensor, pictures: Pictures, number: int, patch: tuple[int, int]) -> Image.Image:
    """A picture as the encoder sees it, from black to white."""
    pixels = pixels.detach().float().cpu()
    (rows, columns), (height, width), side = pictures.grids[number], patch, pictures.side
    if pixels.ndim == 2:
        if pictures.arrangement == "padded":
            patches = pixels.view(rows * columns, height, width, 3).permute(0, 3, 1, 2)
        else:
            patches = pixels.view(rows * columns, 3, -1, height, width)[:, :, 0]
        if pictures.arrangement == "packed":
            by_unit = patches.view(rows // side, columns // side, side, side, 3, height, width)
            patches = by_unit.permute(0, 2, 1, 3, 4, 5, 6)
        grid = patches.reshape(rows, columns, 3, height, width)
        pixels = grid.permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width)
    pixels = pixels[:, : rows * height, : columns * width]
    if len(pixels) != 3:
        pixels = pixels.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = pixels.aminmax()
    levels = (pixels - low) / (high - low).clamp(min=LEAST_RANGE) * 255
    return Image.fromarray(levels.byte().permute(1, 2, 0).numpy())
