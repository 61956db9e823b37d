"""The picture of what merged: each group of patches outlined and filled with its mean colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from dymu.media.images import load

Pixels = NDArray[np.float32]
"""[height, width, 3], 0 to 255."""
Labels = NDArray[np.int64]
"""[rows, columns] or [height, width]: a group's number, -1 where there is none."""

SHORTEST, LONGEST = 672, 2048
"""Least and most pixels of the picture's longer side."""

LEVELS = 64
"""Colour levels (of 255) in one unit of what the encoder saw: processors divide colours 0 to 1 by about 1/4."""

_ALIKE = 0.9
"""Correlation of patch colours from which two pictures count as the same."""
_FLAT, _NEARLY_FLAT = 2.0, 4.0
"""Standard deviations (of 255) below which patch colours say nothing, and that those of an equal picture may reach."""


@dataclass(frozen=True)
class Fit:
    """How a processor fitted an image into what the encoder sees.

    `box` is what the grid of patches covers, (left, top, right, bottom) in widths and heights of the image: it is
    within 0 to 1 where the image was cropped, and reaches beyond where it was padded.
    """

    name: str
    box: tuple[float, float, float, float]

    def covered(self, height: float, width: float) -> Fit:
        """The same where the patches cover these parts of it, from the upper left corner."""
        left, top, right, bottom = self.box
        return Fit(self.name, (left, top, left + (right - left) * width, top + (bottom - top) * height))


def draw(image: Image.Image, group: Labels, seen: Pixels, covered: tuple[float, float] = (1.0, 1.0)) -> Image.Image:
    """Draw the groups of an image's patches on it.

    Args:
        image: of any mode.
        group: the group of each patch; -1 where the language model does not get it.
        seen: [rows, columns, 3], each patch as the encoder saw it; only differences between patches matter.
        covered: the part of the fitted image's height and width that the patches cover.

    Returns:
        An RGB picture in the image's proportions, its longer side `SHORTEST` to `LONGEST` pixels. Groups of several
        patches are filled with their mean colour, single patches keep their pixels, what the encoder did not see is
        dimmed.

    Raises:
        BadImage: the image cannot be used at all.
        ValueError: it is not the one that was seen.
    """
    picture, fit = recognise(image, seen, covered)
    longer = max(picture.size)
    scale = min(max(longer, SHORTEST), LONGEST) / longer
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    pixels = np.asarray(picture.resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    labels = _labels(group, fit, size)
    return Image.fromarray(_outline(_fill(pixels, labels, group), labels))


def draw_seen(group: Labels, seen: Pixels) -> Image.Image:
    """The same where the image is not at hand: coarse, in the colours of the patches, scaled to 0 to 255."""
    rows, columns = group.shape
    side = max(SHORTEST // 2 // max(rows, columns), 1)
    spread = float(seen.max() - seen.min()) or 1.0
    pixels = ((seen - seen.min()) / spread * 255).repeat(side, 0).repeat(side, 1)
    labels = _labels(group, Fit("squash", (0, 0, 1, 1)), (columns * side, rows * side))
    return Image.fromarray(_outline(_fill(pixels, labels, group), labels))


def blended(images: Sequence[Image.Image]) -> Image.Image:
    """What an encoder that sees several frames at once sees: their mean."""
    if len(images) == 1:
        return images[0]
    pixels = [np.asarray(load(image).image, dtype=np.float32) for image in images]
    return Image.fromarray(np.mean(pixels, 0).round().astype(np.uint8))


def arranged(image: Image.Image, seen: Sequence[Pixels]) -> tuple[int | None, int]:
    """How some pictures of one size make up an image, that were cut from it row by row.

    Args:
        seen: [rows, columns, 3] of each, the patches as the encoder saw them.

    Returns:
        Which of them is no tile but the whole image, the last or the first one, or none; and the rows of tiles.

    Raises:
        BadImage: the image cannot be used at all.
        ValueError: it is not the one that was seen.
    """
    picture = load(image).image
    best: tuple[int | None, int] = (None, 1)
    alike = 0.0
    for whole in (len(seen) - 1, 0, None):
        tiles = [tile for number, tile in enumerate(seen) if number != whole]
        for rows in (rows for rows in range(1, len(tiles) + 1) if len(tiles) % rows == 0):
            columns = len(tiles) // rows
            put = [np.concatenate(tiles[row * columns :][:columns], 1) for row in range(rows)]
            here = likeness(picture, Fit("squash", (0, 0, 1, 1)), np.concatenate(put))
            if here > alike + 1e-4:
                best, alike = (whole, rows), here
    _refuse_other(alike)
    return best


def _refuse_other(alike: float) -> None:
    if alike < _ALIKE:
        raise ValueError(
            "this is not the image that the model saw: squashed, cropped or padded, its colours lie elsewhere; "
            "give the image of the last call, and its number where the call had several"
        )


def fits(width: int, height: int, aspect: float) -> Iterator[Fit]:
    """The ways in which processors fit an image into a picture that is `aspect` times as wide as high."""
    yield Fit("squash", (0, 0, 1, 1))
    wide = width / height / aspect  # above 1: the image is wider than the grid
    x, y = min(1 / wide, 1), min(wide, 1)
    for name, part in (("crop", 1.0), ("crop", 224 / 256)):  # DINOv2's processor crops 224 of 256 pixels
        yield Fit(name, ((1 - x * part) / 2, (1 - y * part) / 2, (1 + x * part) / 2, (1 + y * part) / 2))
    x, y = max(1 / wide, 1), max(wide, 1)
    yield Fit("pad", ((1 - x) / 2, (1 - y) / 2, (1 + x) / 2, (1 + y) / 2))


def likeness(image: Image.Image, fit: Fit, seen: Pixels) -> float:
    """Correlation, over patches and channels, of an RGB image fitted one way with what the encoder saw.

    The colour of padding is unknown, so what depends on nothing but how much of a patch is image counts for neither.
    """
    fitted = _fitted(image, fit, *seen.shape[:2]).reshape(-1, 4)
    covered = fitted[:, 3]
    known = np.stack([np.ones_like(covered), covered], axis=1)
    a, b = (colours - known @ np.linalg.lstsq(known, colours)[0] for colours in (fitted[:, :3], seen.reshape(-1, 3)))
    spread, spread_seen = (float(np.sqrt((part**2).sum() / 3 / (covered**2).sum())) for part in (a, b * LEVELS))
    if min(spread, spread_seen) < _FLAT:
        return float(max(spread, spread_seen) < _NEARLY_FLAT)
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))


def recognise(image: Image.Image, seen: Pixels, covered: tuple[float, float] = (1.0, 1.0)) -> tuple[Image.Image, Fit]:
    """The RGB image and the way in which it was fitted; see `draw`, and what that raises."""
    pictures = [load(image).image]
    if image.mode != "RGB" or image.getexif():  # processors may convert in other ways, and do not turn pictures
        pictures.append(image.convert("RGB"))
    rows, columns = seen.shape[:2]
    best, alike = (pictures[0], Fit("squash", (0, 0, 1, 1))), 0.0
    for picture in pictures:
        for whole in fits(*picture.size, columns / covered[1] / (rows / covered[0])):
            fit = whole.covered(*covered)
            here = likeness(picture, fit, seen)
            if here > alike + 1e-4:
                best, alike = (picture, fit), here
    _refuse_other(alike)
    return best


def _fitted(image: Image.Image, fit: Fit, rows: int, columns: int, detail: int = 16) -> Pixels:
    """[rows, columns, 4]: the sum of the image's colours over each patch, by its size, and how much of it is image."""
    left, top, right, bottom = fit.box
    shown = (max(left, 0), max(top, 0), min(right, 1), min(bottom, 1))
    x0, x1 = (round((edge - left) / (right - left) * columns * detail) for edge in shown[::2])
    y0, y1 = (round((edge - top) / (bottom - top) * rows * detail) for edge in shown[1::2])
    size = (max(x1 - x0, 1), max(y1 - y0, 1))
    box = (shown[0] * image.width, shown[1] * image.height, shown[2] * image.width, shown[3] * image.height)
    canvas = np.zeros((rows * detail, columns * detail, 4), dtype=np.float32)
    part = canvas[y0 : y0 + size[1], x0 : x0 + size[0]]
    part[..., :3], part[..., 3] = np.asarray(image.resize(size, Image.Resampling.BOX, box=box)), 1
    patches: Pixels = canvas.reshape(rows, detail, columns, detail, 4).mean((1, 3))
    return patches


def _labels(group: Labels, fit: Fit, size: tuple[int, int]) -> Labels:
    """The group at every pixel [height, width]."""
    rows, columns = group.shape
    left, top, right, bottom = fit.box
    x = np.floor(((np.arange(size[0]) + 0.5) / size[0] - left) / (right - left) * columns).astype(np.int64)
    y = np.floor(((np.arange(size[1]) + 0.5) / size[1] - top) / (bottom - top) * rows).astype(np.int64)
    labels = group[y.clip(0, rows - 1)[:, None], x.clip(0, columns - 1)[None]]
    seen = ((y >= 0) & (y < rows))[:, None] & ((x >= 0) & (x < columns))[None]
    return np.where(seen, labels, -1)


def _fill(pixels: Pixels, labels: Labels, group: Labels) -> Pixels:
    """Groups of several patches in their mean colour, and what no group covers dimmed."""
    flat = labels.ravel() + 1
    count = np.bincount(flat)
    means = np.stack(
        [np.bincount(flat, channel) / np.maximum(count, 1) for channel in pixels.reshape(-1, 3).T.astype(np.float64)],
        axis=1,
    ).round()
    patches = np.bincount(group.ravel() + 1, minlength=len(count))[labels + 1]
    filled = np.where((patches > 1)[..., None], means[labels + 1], pixels)
    return np.where((labels < 0)[..., None], pixels * 0.35 + 20, filled).astype(np.float32)


def _outline(pixels: Pixels, labels: Labels) -> NDArray[np.uint8]:
    """A light line between a dark one on either side, wherever two groups meet: seen on any colour."""
    edge = np.zeros(labels.shape, dtype=np.uint8)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    width = 1 + 2 * round(max(labels.shape) / 2000)
    light = _dilated(edge, width)
    dark = _dilated(edge, width + 2)
    drawn = np.where(dark[..., None], pixels * 0.45, pixels)
    drawn = np.where(light[..., None], pixels * 0.2 + 255 * 0.8, drawn)
    return drawn.round().clip(0, 255).astype(np.uint8)


def _dilated(mask: NDArray[np.uint8], width: int) -> NDArray[np.bool_]:
    if width == 1:  # by which Pillow 12.3 divides by zero, and ends the process
        return mask > 0
    return np.asarray(Image.fromarray(mask * 255).filter(ImageFilter.MaxFilter(width))) > 0
