"""Frames -> one picture with all of them, or an animation that browsers show."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

from dymu.files import whole_file

GAP: Final = 6
"""Pixels of white between frames, and around the sheet."""
_ASPECT: Final = 4 / 3
_SMALLEST_CELL: Final = 8
_FONT_SIZES: Final = (11, 20)
_INK: Final = (64, 64, 64)
_ANIMATIONS: Final = (".gif", ".webp", ".png")
_TICKS_PER_SECOND: Final = {".gif": 100, ".webp": 1000, ".png": 1000}


def contact_sheet(
    frames: Sequence[Image.Image],
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    longest: int = 2048,
) -> Image.Image:
    """All frames in rows on white, in cells of one size, each with its label below.

    Args:
        frames: of any sizes and modes; a smaller one stands in the middle of its cell.
        columns: how many in a row; left out, as many as bring the sheet closest to 4:3.
        labels: one for each frame, cut with "…" where it is wider than the frame.
        longest: the most pixels of the sheet's longer side. Frames are made smaller to fit, never larger.

    Raises:
        ValueError: there is nothing to show, or no room for it.
    """
    if not frames:
        raise ValueError("a contact sheet without frames shows nothing: give at least 1")
    if columns is not None and columns < 1:
        raise ValueError(f"a contact sheet of {columns} columns shows nothing: give at least 1")
    if labels is not None and len(labels) != len(frames):
        raise ValueError(f"{len(labels)} labels do not fit {len(frames)} frames: give one for each")
    widest, highest = max(frame.width for frame in frames), max(frame.height for frame in frames)
    columns = min(columns or _best_columns(len(frames), widest / highest), len(frames))
    rows = math.ceil(len(frames) / columns)

    scale = _scale(widest, highest, columns, rows, 0, longest)
    font = ImageFont.load_default(min(max(round(widest * scale / 14), _FONT_SIZES[0]), _FONT_SIZES[1]))
    below = round(sum(font.getmetrics()) * 1.15) if labels is not None else 0  # type: ignore[union-attr]
    scale = _scale(widest, highest, columns, rows, below, longest)
    width, height = max(int(widest * scale), 1), max(int(highest * scale), 1)
    if scale <= 0 or (scale < 1 and max(width, height) < _SMALLEST_CELL):
        raise ValueError(f"{len(frames)} frames do not fit into {longest} pixels: give fewer frames or more pixels")

    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + below + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, frame in enumerate(frames):
        left = GAP + index % columns * (width + GAP)
        top = GAP + index // columns * (height + below + GAP)
        size = (max(int(frame.width * scale), 1), max(int(frame.height * scale), 1))
        shown = frame if size == frame.size else frame.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        sheet.paste(shown.convert("RGB"), (left + (width - size[0]) // 2, top + (height - size[1]) // 2))
        if labels is not None:
            text = _cut(" ".join(labels[index].split()), font, width)
            draw.text((left + width / 2, top + height + below / 2), text, _INK, font, anchor="mm")
    return sheet


def save_animation(frames: Sequence[Image.Image], path: str | Path, fps: float) -> None:
    """Write an endless .gif, .webp or .png (APNG) that never stands half written.

    Readers find as many frames as were given: writers join frames that are alike, so one that equals its forerunner
    gets a corner pixel of a hardly different blue. WebP and PNG are otherwise exact, a GIF has 255 colours a frame.

    Raises:
        ValueError: another suffix, no frames, frames of different sizes, or no usable rate.
        OSError: the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _ANIMATIONS:
        raise ValueError(f"{path} does not end in .gif, .webp or .png, which says how to write it: give it such a name")
    if not frames:
        raise ValueError("an animation without frames shows nothing: give at least 1")
    for number, frame in enumerate(frames, 1):
        if frame.size != frames[0].size:
            raise ValueError(f"frame 1 is {frames[0].size} pixels and frame {number} {frame.size}: make them one size")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"{fps} frames a second cannot be shown: give a number above 0")
    ticks = _TICKS_PER_SECOND[suffix]
    edges = [round(index * ticks / fps) for index in range(len(frames) + 1)]
    durations = [max(end - start, 1) * (1000 // ticks) for start, end in pairwise(edges)]
    if max(durations) > 65_535 * (10 if suffix == ".gif" else 1):
        raise ValueError(f"{fps} frames a second show each for longer than {suffix} can say: give a higher rate")
    options: dict[str, Any] = {"save_all": True, "duration": durations, "loop": 0}
    if suffix == ".webp":
        options |= {"lossless": True, "quality": 50}  # lossless, this is how hard it tries
    written = _told_apart([frame.convert("RGB") for frame in frames], of_palette=suffix == ".gif")
    with whole_file(path) as partial:
        written[0].save(partial, append_images=written[1:], **options)


def _told_apart(frames: list[Image.Image], of_palette: bool) -> list[Image.Image]:
    """The frames as they are to be written, no two in a row alike."""
    told: list[Image.Image] = []
    before = b""
    for frame in frames:
        shown = frame.quantize(255) if of_palette else frame.copy()
        if shown.convert("RGB").tobytes() == before:
            corner = (shown.width - 1, shown.height - 1)
            red, green, blue = frame.getpixel(corner) if not of_palette else shown.convert("RGB").getpixel(corner)  # type: ignore[misc]
            other = (red, green, blue ^ 1)
            if of_palette:  # 255 colours leave room for one more
                palette = [*(shown.getpalette() or [])][: 255 * 3]
                shown.putpalette([*palette, *other])
                shown.putpixel(corner, len(palette) // 3)
            else:
                shown.putpixel(corner, other)
        before = shown.convert("RGB").tobytes()
        told.append(shown)
    return told


def _best_columns(count: int, aspect: float) -> int:
    """As many as bring the sheet closest to 4:3, a sheet with fewer empty cells before one with more."""

    def badness(columns: int) -> float:
        rows = math.ceil(count / columns)
        return abs(math.log(columns * aspect / rows / _ASPECT)) + (columns * rows - count) / count

    return min(range(1, count + 1), key=badness)


def _scale(width: int, height: int, columns: int, rows: int, below: int, longest: int) -> float:
    across = (longest - GAP * (columns + 1)) / (columns * width)
    down = (longest - GAP * (rows + 1) - below * rows) / (rows * height)
    return min(across, down, 1.0)


def _cut(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…" if text else ""
