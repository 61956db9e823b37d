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

from dymu.errors import BadImage

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
    _check_file(path, name)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images and of odd metadata; sizes are judged here instead.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_readable_formats()) as opened:
                return _prepare(opened, name)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(
            f"{name} is not an image in a format read here ({_listed(FORMATS)}), whatever its name "
            "says: convert it to PNG or JPEG."
        ) from error
    except Image.DecompressionBombError as error:
        raise BadImage(_too_many_pixels(name)) from error
    except PermissionError as error:
        raise BadImage(f"{name} may not be read by this user: change its permissions.") from error
    except MemoryError as error:
        raise BadImage(f"{name} does not fit into memory: make it smaller first.") from error
    except Exception as error:  # on damaged bytes decoders raise whatever they stumble over
        raise BadImage(f"{name} is damaged or cut short ({_first_line(error)}): get a whole copy of it.") from error


def _readable_formats() -> list[str]:
    Image.init()  # an older Pillow, or one built with less, may lack some
    return [name for name in FORMATS if name in Image.OPEN]


def _check_file(path: Path, name: str) -> None:
    if "://" in name:
        raise BadImage(f"{name} is an address, and only files are read: download it first.")
    try:
        exists, is_file, is_folder = path.exists(), path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:  # too long a name, a zero byte, no right to look
        raise BadImage(f"{name!r} cannot be looked up ({_first_line(error)}): check it.") from error
    if not exists:
        raise BadImage(f"{name} does not exist: check the path.")
    if is_folder:
        raise BadImage(f"{name} is a folder: name an image in it.")
    if not is_file:
        raise BadImage(f"{name} is no ordinary file: save the image to one first.")
    if path.stat().st_size == 0:
        raise BadImage(f"{name} is empty: get a whole copy of it.")


def _prepare(image: Image.Image, name: str) -> LoadedImage:
    _check_size(image.size, name)
    notes: list[str] = []
    frames = _frame_count(image)
    if frames > 1:
        notes.append(_frames_note(image.format or "image", frames))
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
        raise BadImage(_too_many_pixels(name, size))
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


def _too_many_pixels(name: str, size: tuple[int, int] | None = None) -> str:
    what = f"{size[0]:,} × {size[1]:,} pixels" if size else "larger than an honest image"
    return f"{name} is {what}, more than the {MAX_PIXELS // 1_000_000} million pixels allowed: make it smaller first."


def _frame_count(image: Image.Image) -> int:
    try:
        frames: int = getattr(image, "n_frames", 1)  # Pillow finds it by walking through the file
    except (EOFError, OSError, SyntaxError):  # cut short after the first frame, which is all we use
        return 1
    return frames


def _frames_note(kind: str, frames: int) -> str:
    if kind == "TIFF":
        return f"TIFF of {frames} pages: using the first"
    if kind == "MPO":
        return f"JPEG holding {frames} pictures: using the first"
    return f"animated {kind}: using the first of {frames} frames"


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


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
