"""Files as people have them -> RGB images that every processor takes.

`load` answers with the image and with notes on whatever it did to it, in words for a person. What
cannot be used raises `BadImage`: what it is, why not, what to do. Nothing is guessed in silence.

| what comes in | what happens |
| --- | --- |
| CMYK, grey, palette and other colour modes | converted to RGB |
| transparency | laid on white |
| 16 bits a channel, 32-bit integers, floats | scaled to 8 bits, never clipped |
| an EXIF orientation | applied |
| an animation or several pages | the first frame |
| a side under `MIN_SIDE` pixels | refused: image processors take 1 or 3 rows for colour channels |
| over `MAX_ASPECT` times as long as wide | refused: resized by its short side it fills the memory |
| more than `MAX_PIXELS` pixels | refused before it is decoded |
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dymu.errors import BadImage, DymuError
from dymu.files import first_line

MIN_SIDE: Final = 4
MAX_ASPECT: Final = 100
MAX_PIXELS: Final = 120_000_000

# What cameras and the web give. Pillow reads more, some (EPS) by starting another program, some
# (TGA) without a signature to know them by: those are left out.
FORMATS: Final = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO")

_EXIF_ORIENTATION: Final = 0x0112
_DEEP_MODES: Final = ("I", "F")  # and every "I;16…"


@dataclass(frozen=True)
class LoadedImage:
    """An RGB image, and what was done to make it one."""

    image: Image.Image
    notes: tuple[str, ...]


def load(source: str | Path | Image.Image) -> LoadedImage:
    """The image at a path, or one that Pillow already holds, as plain upright RGB."""
    if isinstance(source, Image.Image):
        try:
            return _prepare(source, "this image")
        except ValueError as error:
            raise BadImage(
                f"this image's colour mode {source.mode} cannot be converted: convert it to RGB first."
            ) from error
    path = Path(source).expanduser()
    name = str(source)
    check_path(path, name, "image", BadImage)
    if path.is_dir():
        raise BadImage(f"{name} is a folder: name an image in it.")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images and of odd metadata; sizes are judged here instead.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=readable_formats()) as opened:
                return _prepare(opened, name)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise BadImage(
            f"{name} is not an image in a format read here ({known}), whatever its name says: "
            "convert it to PNG or JPEG."
        ) from error
    except Image.DecompressionBombError as error:
        raise BadImage(too_many_pixels(f"{name} has")) from error
    except PermissionError as error:
        raise BadImage(f"{name} may not be read by this user: change its permissions.") from error
    except MemoryError as error:
        raise BadImage(f"{name} does not fit into memory: make it smaller first.") from error
    except Exception as error:  # on damaged bytes decoders raise whatever they stumble over
        raise BadImage(f"{name} is damaged or cut short ({first_line(error)}): get a whole copy of it.") from error


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
        raise error(f"{name!r} cannot be looked up ({first_line(problem)}): check it.") from problem
    if not exists:
        raise error(f"{name} does not exist: check the path.")
    if not is_file and not is_folder:
        raise error(f"{name} is no ordinary file: save the {what} to one first.")
    if empty:
        raise error(f"{name} is empty: get a whole copy of it.")


def _prepare(image: Image.Image, name: str) -> LoadedImage:
    _check_size(image.size, name)
    note = _note_on_frames(image)
    notes = [note] if note else []
    image.load()
    if image.getexif().get(_EXIF_ORIENTATION, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
        notes.append("turned upright as its EXIF tag says")
    if image.mode in _DEEP_MODES or image.mode.startswith("I;16"):
        image, note = _scaled_to_8_bits(image)
        notes.append(note)
    elif image.has_transparency_data:
        image, seen = _on_white(image)
        if seen:
            notes.append("its transparent parts laid on white")
    elif image.mode == "CMYK":
        notes.append("converted from CMYK to RGB")
    # A fresh copy: the caller's image is left alone and nothing of the file stays open.
    return LoadedImage(image.convert("RGB").copy(), tuple(notes))


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


def _scaled_to_8_bits(image: Image.Image) -> tuple[Image.Image, str]:
    """Whole numbers of up to 16 bits by their full range, anything else by its own range."""
    values = np.asarray(image).astype(np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        values = np.where(finite, values, 0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65_535:
        low, high, note = 0.0, 65_535.0, "scaled from 16 bits a channel to 8"
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high, note = 0.0, 1.0, "scaled from numbers between 0 and 1 to 8 bits"
    else:
        note = f"scaled from its own range ({low:g} to {high:g}) to 8 bits"
    span = (high - low) or 1.0
    return Image.fromarray(np.rint((values - low) * (255 / span)).astype(np.uint8)), note


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image over a white ground, and whether any of the white can be seen."""
    rgba = image.convert("RGBA")
    lowest, _ = rgba.getchannel("A").getextrema()
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba), int(lowest) < 255  # type: ignore[arg-type]
