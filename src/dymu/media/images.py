"""Images as people have them -> RGB images that every processor takes.

`load` answers with the image and with notes on whatever it did to it, in words for a person. What
cannot be used raises `BadImage`: what it is, why not, what to do. Nothing is guessed in silence.

| what comes in | what happens |
| --- | --- |
| CMYK, grey, palette and other colour modes | converted to RGB |
| transparency | laid on white |
| 16 bits a channel, 32-bit integers, floats | scaled to 8 bits, never clipped; integers up to 255 are 8 bits |
| an orientation in EXIF or XMP | applied; an EXIF block that cannot be read is left out |
| an animation or several pages | the first frame |
| a side under `MIN_SIDE` pixels | refused: image processors take 1 or 3 rows for colour channels |
| over `MAX_ASPECT` times as long as wide | refused: resized by its short side it fills the memory |
| more than `MAX_PIXELS` pixels | refused before it is decoded |
| an encoded image as bytes | as the file that it would be |
| an array [rows, columns(, 1, 3 or 4)] of uint8, or of floats from 0 to 1 | grey, RGB or RGBA; any other is refused |
| a tensor [(1, 3 or 4,) rows, columns] of the same | the same |
| a row of a data set, `{"image": any of these}` | its image, also where it is still `{"bytes": ..., "path": ...}` |
"""

import functools
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from dymu.errors import BadImage, DymuError
from dymu.files import expanded, first_line, next_step, shortened

MIN_SIDE: Final = 4
MAX_ASPECT: Final = 100
MAX_PIXELS: Final = 120_000_000

# What cameras and the web give. Pillow reads more, some (EPS) by starting another program, some
# (TGA) without a signature to know them by: those are left out.
FORMATS: Final = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO")

_EXIF_ORIENTATION: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, how to turn what is stored."""
_DEEP_MODES: Final = ("I", "F")  # and every "I;16…"


@dataclass(frozen=True)
class LoadedImage:
    """An RGB image, and what was done to make it one."""

    image: Image.Image
    notes: tuple[str, ...]


def load(source: Any, name: str = "") -> LoadedImage:
    """An image as plain upright RGB.

    Args:
        source: a path, an image that Pillow holds, bytes, an array, a tensor or a row, see above.
        name: for messages, of what has no path.

    Raises:
        BadImage: it cannot be read or used.
    """
    if isinstance(source, Mapping):
        source = _of_row(source, name or "this row")
    if isinstance(source, str | os.PathLike):
        return _from_path(Path(os.fsdecode(source)), str(source))
    name = name or "this image"
    with _said_of(name):
        if isinstance(source, Image.Image):
            return _from_pillow(source, name)
        if isinstance(source, bytes | bytearray | memoryview):
            return _from_file(io.BytesIO(source), name)
        if hasattr(source, "__array__"):
            return _prepare(_from_numbers(source, name), name)
    raise BadImage(
        f"{name} is a {type(source).__name__}: give a path, an image of Pillow, an array, a tensor, bytes or a row "
        "with a field `image`."
    )


def in_folder(folder: Path) -> tuple[list[Path], str]:
    """The images directly in a folder, in the order of their names; and what else is there, in words ("" for nothing).

    Names that begin with a dot count as nothing.

    Raises:
        BadImage: it holds no images, or may not be looked into.
    """
    try:
        inside = sorted(path for path in expanded(folder).iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BadImage(f"{folder} cannot be looked into ({first_line(error)}): check it.") from error
    folders = [path.name for path in inside if os.path.isdir(path)]
    files = [path for path in inside if path.name not in set(folders)]
    images = [path for path in files if path.suffix.lower() in readable_suffixes()]
    others = Counter(path.suffix.lower() for path in files) - Counter(path.suffix.lower() for path in images)
    parts = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in others.most_common()]
    if folders:
        parts.append(f"the folder{'s' * (len(folders) > 1)} {', '.join(folders[:5])}{', …' * (len(folders) > 5)}")
    left_out = f"left out of {folder}, as not read here: {', '.join(parts)}" if parts else ""
    if not images:
        raise BadImage(
            f"{folder} holds no images{left_out and f' ({left_out})'}: name a folder that does, or image files."
        )
    return images, left_out


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Of files, those of `FORMATS`."""
    formats = readable_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def readable_formats() -> list[str]:
    """Those of `FORMATS` that this Pillow reads."""
    Image.init()  # an older Pillow, or one built with less, may lack some
    return [name for name in FORMATS if name in Image.OPEN]


def check_path(path: Path, name: str, what: str, error: type[DymuError]) -> None:
    """Looks a path up before anything is opened.

    Args:
        name: the path as messages say it.
        what: "image" or "video".
        error: raised where the path is neither a folder nor a file with something in it.
    """
    if "://" in name:
        raise error(f"{name} is an address, and only files are read: download it first.")
    try:
        exists, is_file, is_folder = path.exists(), path.is_file(), path.is_dir()
        empty = is_file and path.stat().st_size == 0
    except (OSError, ValueError) as problem:  # too long a name, a zero byte, no right to look
        raise error(
            f"{shortened(name)!r} cannot be looked up ({first_line(problem)}): {next_step(problem)}."
        ) from problem
    if not exists:
        raise error(f"{name} does not exist: check the path.")
    if not is_file and not is_folder:
        raise error(f"{name} is no ordinary file: save the {what} to one first.")
    if empty:
        raise error(f"{name} is empty: get a whole copy of it.")


def _from_path(path: Path, name: str) -> LoadedImage:
    path = expanded(path)
    check_path(path, name, "image", BadImage)
    if path.is_dir():
        raise BadImage(f"{name} is a folder: name an image in it.")
    with _said_of(name):
        return _from_file(path, name)


def _from_file(file: Path | io.BytesIO, name: str) -> LoadedImage:
    with Image.open(file, formats=readable_formats()) as opened:
        return _prepare(opened, name)


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises into one sentence about the image."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images and of odd metadata; sizes are judged here instead.
            warnings.simplefilter("ignore")
            yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise BadImage(
            f"{name} is not an image in a format read here ({known}), whatever its name says, or its header is "
            "damaged: convert it to PNG or JPEG."
        ) from error
    except Image.DecompressionBombError as error:
        raise BadImage(too_many_pixels(f"{name} has")) from error
    except PermissionError as error:
        raise BadImage(f"{name} may not be read by this user: change its permissions.") from error
    except MemoryError as error:
        raise BadImage(f"{name} does not fit into memory: make it smaller first.") from error
    except Exception as error:  # on damaged bytes decoders raise whatever they stumble over
        raise BadImage(f"{name} is damaged or cut short ({first_line(error)}): get a whole copy of it.") from error


def _of_row(row: Mapping[str, Any], name: str) -> Any:
    """What is in the field `image` of a row, or in an image that a data set has not decoded."""
    value = row.get("image", row)
    if not isinstance(value, Mapping):
        source = value
    elif "bytes" in value or "path" in value:
        source = value.get("bytes") or value.get("path")
    else:
        raise BadImage(
            f"{name} has no field `image` but {', '.join(map(repr, value)) or 'none'}: rename the one it is in."
        )
    if source is None:
        raise BadImage(f"{name} has nothing in its field `image`: leave it out.")
    return source


def _from_numbers(source: Any, name: str) -> Image.Image:
    """An array or tensor as an image; the colours of a tensor come first, those of an array last."""
    what, order = "an array", "rows, columns(, 1, 3 or 4 colours)"
    try:
        if is_tensor := hasattr(source, "detach"):
            what, order = "a tensor", "(1, 3 or 4 colours,) rows, columns"
            source = source.detach().cpu()
            source = source.float() if source.is_floating_point() else source  # NumPy has no bfloat16
        values = np.asarray(source)
    except MemoryError:
        raise
    except Exception as error:  # meta, sparse and quantised tensors, and what only claims to be an array
        what = what if is_tensor else f"a {type(source).__name__}"
        raise BadImage(
            f"{name} is {what} whose values cannot be read as an array ({first_line(error)}): give uint8, or floats "
            "from 0 to 1."
        ) from error
    shape, dtype = list(values.shape), values.dtype
    if is_tensor and values.ndim == 3:
        values = np.moveaxis(values, 0, -1)
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in (1, 3, 4))):
        raise BadImage(f"{name} is {what} of the shape {shape}: give [{order}].")
    if dtype.kind == "f":
        if np.isnan(values).any():
            raise BadImage(f"{name} is {what} of floats, of which some are NaN: give uint8, or floats from 0 to 1.")
        if not ((values >= 0) & (values <= 1)).all():
            raise BadImage(
                f"{name} is {what} of floats from {values.min():g} to {values.max():g}, of which nothing says how they "
                "were scaled: give uint8, or floats from 0 to 1."
            )
        values = np.rint(values * np.float32(255)).astype(np.uint8)
    if values.dtype != np.uint8:
        raise BadImage(f"{name} is {what} of {dtype}: give uint8, or floats from 0 to 1.")
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[2:] == (1,) else values))


def _from_pillow(image: Image.Image, name: str) -> LoadedImage:
    try:
        return _prepare(image, name)
    except BadImage:
        raise
    except Exception as error:
        without_file = getattr(image, "tile", ()) and getattr(image, "fp", None) is None
        if not without_file and "closed" not in str(error):
            raise
        raise BadImage(
            f"{name} is a Pillow image that was closed before it was read: open it again, or call load() on it first."
        ) from error


def _prepare(image: Image.Image, name: str) -> LoadedImage:
    _check_size(image.size, name)
    note = _note_on_frames(image)
    notes = [note] if note else []
    kind, deep_colours = image.format, any(str(tile[3]) == "RGB;16B" for tile in getattr(image, "tile", ()))
    image.load()
    clear = image.info.get("transparency")
    if deep_colours and isinstance(clear, tuple):  # Pillow reads the upper half of each colour, but all of this one
        image = image.copy()
        image.info["transparency"] = tuple(colour >> 8 for colour in clear)
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # a damaged block says nothing of the pixels, which are whole
        orientation = None
        notes.append("its EXIF block cannot be read, so it may lie on its side")
    if isinstance(orientation, int) and orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
        notes.append("turned upright as its metadata says")
    plain, remarks = _in_rgb(image, kind, name)
    notes += remarks
    plain.info.clear()  # or somebody turns it again, as the EXIF block says
    return LoadedImage(plain, tuple(notes))


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any size in RGB, as `load` makes it; a copy.

    Raises:
        BadImage: its colour mode is not known.
    """
    return _in_rgb(image, image.format, "this image")[0]


def _in_rgb(image: Image.Image, kind: str | None, name: str) -> tuple[Image.Image, list[str]]:
    """A copy in RGB, and notes on what was done."""
    notes: list[str] = []
    if image.mode in _DEEP_MODES or image.mode.startswith("I;16"):
        image, notes = _scaled_to_8_bits(image, kind)
    elif image.has_transparency_data:
        image, seen = _on_white(image)
        notes = ["its transparent parts laid on white"] * seen
    elif image.mode == "CMYK":
        notes = ["converted from CMYK to RGB"]
    try:
        # A fresh copy: the caller's image is left alone and nothing of the file stays open.
        return image.convert("RGB").copy(), notes
    except ValueError as error:
        raise BadImage(
            f"{name} has the colour mode {image.mode}, which cannot be converted: convert it to RGB first."
        ) from error


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImage(too_many_pixels(f"{name} is {width:,} × {height:,} pixels,"))
    if min(size) < MIN_SIDE:
        raise BadImage(
            f"{name} is {width:,} × {height:,} pixels, too small to show anything: "
            f"give an image of at least {MIN_SIDE} × {MIN_SIDE}."
        )
    if max(size) > MAX_ASPECT * min(size):
        raise BadImage(
            f"{name} is {width:,} × {height:,} pixels, more than {MAX_ASPECT} times as long "
            "as it is wide, so a model would see only a sliver of it: crop it first."
        )


def too_many_pixels(what: str) -> str:
    """The sentence for whatever has them: `what` names it and leads up to "more than"."""
    return f"{what} more than the {MAX_PIXELS // 1_000_000} million pixels allowed: make it smaller first."


def _note_on_frames(image: Image.Image) -> str | None:
    """Which of several frames is used, in words; None where there is one."""
    try:
        count = getattr(image, "n_frames", 1)  # Pillow finds it by walking through the file
    except (EOFError, OSError, SyntaxError):  # cut short after the first frame, which is all we use
        return None
    if count == 1:
        return None
    if image.format == "TIFF":
        return f"TIFF of {count} pages: using the first"
    if image.format == "MPO":
        return f"JPEG holding {count} pictures: using the first"
    return f"animated {image.format or 'image'}: using the first of {count} frames"


def _scaled_to_8_bits(image: Image.Image, kind: str | None) -> tuple[Image.Image, list[str]]:
    """Whole numbers of up to 16 bits by their full range, anything else by its own range; and notes on it.

    Args:
        kind: the format of its file, which may say that there are 16 bits where all numbers are small.
    """
    values = np.asarray(image).astype(np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        values = np.where(finite, values, 0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "I" and kind not in ("PNG", "PPM") and low >= 0 and high <= 255:
        low, high, note = 0.0, 255.0, "its whole numbers, none above 255, taken as 8 bits"
    elif image.mode != "F" and low >= 0 and high <= 65_535:
        low, high, note = 0.0, 65_535.0, "scaled from 16 bits a channel to 8"
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high, note = 0.0, 1.0, "scaled from numbers between 0 and 1 to 8 bits"
    else:
        note = f"scaled from its own range ({low:g} to {high:g}) to 8 bits"
    span = (high - low) or 1.0
    scaled = np.rint((values - low) * (255 / span)).astype(np.uint8)
    clear = values == image.info.get("transparency")
    seen = bool(np.any(clear))
    return Image.fromarray(np.where(clear, np.uint8(255), scaled)), [
        note,
        *["its transparent parts laid on white"] * seen,
    ]


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image over a white ground, and whether any of the white can be seen."""
    rgba = image.convert("RGBA")
    lowest, _ = rgba.getchannel("A").getextrema()
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba), int(lowest) < 255  # type: ignore[arg-type]
