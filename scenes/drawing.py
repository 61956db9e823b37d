"""Pixels of a scene: backgrounds, coloured shapes, pasted pictures, frames and signs, with Pillow and numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are outside."""

COLOURS: dict[str, RGB] = {
    "red": (214, 34, 38),
    "orange": (245, 138, 24),
    "yellow": (246, 214, 40),
    "green": (46, 156, 66),
    "blue": (40, 92, 214),
    "purple": (126, 54, 176),
    "pink": (244, 138, 186),
    "brown": (122, 76, 40),
    "black": (24, 24, 26),
    "white": (246, 246, 246),
    "grey": (138, 138, 140),
}
SHAPES = ("circle", "oval", "square", "triangle", "star", "heart", "diamond", "cross", "hexagon", "arrow")
BACKGROUNDS = ("flat", "gradient", "texture", "photo")
"""From plain to cluttered."""
PATTERNS: dict[str, frozenset[str]] = {
    "stripes": frozenset(),
    "checks": frozenset({"square"}),
    "clouds": frozenset(),
    "grain": frozenset(),
    "scribble": frozenset({"triangle", "diamond", "cross"}),
}
"""What textures show, and the shapes that a person can see in each."""

INK, PAPER = (30, 30, 34), (252, 252, 250)
_SUPERSAMPLING = 3


def jitter(rng: np.random.Generator, colour: str) -> RGB:
    """A shade of a named colour that is still plainly that colour."""
    amount = 4 if colour in ("black", "white", "grey", "brown") else 12
    base = np.array(COLOURS[colour]) * rng.uniform(0.93, 1.04) + rng.integers(-amount, amount + 1, 3)
    r, g, b = (int(v) for v in base.clip(0, 255))
    return r, g, b


def contrasting(colours: Sequence[str]) -> list[str]:
    """The named colours that stand out from each of these."""
    return [name for name, rgb in COLOURS.items() if all(math.dist(rgb, COLOURS[other]) > 95 for other in colours)]


def background(
    rng: np.random.Generator, kind: str, colours: Sequence[str], side: int
) -> tuple[Image.Image, str | None]:
    """A background that is no photo, in one or two named colours; and which of ``PATTERNS`` a texture shows."""
    base = np.empty((side, side, 3), np.float32)
    base[:] = jitter(rng, colours[0])
    if kind == "flat":
        return _image(base), None
    other = np.asarray(jitter(rng, colours[1]), np.float32)
    blend, pattern = _blend(rng, kind, side)
    return _image(base + (other - base) * blend[..., None]), pattern


def photo_background(rng: np.random.Generator, photo: Image.Image, side: int) -> Image.Image:
    """A part of a photo, mirrored half the time, scaled to the scene."""
    width, height = photo.size
    part = int(min(width, height) * rng.uniform(0.6, 1.0))
    x, y = int(rng.integers(0, width - part + 1)), int(rng.integers(0, height - part + 1))
    image = photo.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=(x, y, x + part, y + part))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def shape(rng: np.random.Generator, name: str, colour: str, side: int) -> Image.Image:
    """RGBA picture of a coloured shape whose longer side is ``side``."""
    big = _SUPERSAMPLING * side
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    if name in ("circle", "oval"):
        flat = rng.uniform(0.45, 0.6) if name == "oval" else 1.0
        draw.ellipse((0, big * (1 - flat) / 2, big - 1, big * (1 + flat) / 2 - 1), fill=255)
        if flat < 1 and rng.random() < 0.5:
            mask = mask.transpose(Image.Transpose.ROTATE_90)
    else:
        draw.polygon([(big / 2 * (1 + x), big / 2 * (1 + y)) for x, y in outline(name)], fill=255)
        if name == "arrow":
            mask = mask.rotate(90 * int(rng.integers(4)))
    mask = mask.resize((side, side), Image.Resampling.BOX)
    picture = Image.new("RGBA", (side, side), jitter(rng, colour))
    picture.putalpha(mask)
    box = mask.getbbox()
    return picture.crop(box) if box else picture


def posed(rng: np.random.Generator, picture: Image.Image, side: int) -> Image.Image:
    """A picture tilted a little, mirrored half the time, with ``side`` as its longer side."""
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR, expand=True)
    box = picture.getchannel("A").point(_visible).getbbox()
    picture = picture.crop(box) if box else picture
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def paste(image: Image.Image, picture: Image.Image, at: tuple[int, int], border: int) -> None:
    """Put an RGBA picture on the image; a ``border`` (pixels) in ink or paper sets it off where it would not show."""
    box = (at[0], at[1], at[0] + picture.width, at[1] + picture.height)
    under = np.asarray(image.crop(box), np.float32)
    alpha = np.asarray(picture.getchannel("A"), np.float32)[..., None] / 255
    mean = (np.asarray(picture.convert("RGB"), np.float32) * alpha).sum((0, 1)) / max(float(alpha.sum()), 1.0)
    around = under.mean((0, 1))
    if border and (math.dist(mean, around) < 110 or float(under.std((0, 1)).mean()) > 16):
        edge = PAPER if float(around.mean()) < 150 else INK
        padded = Image.new("L", (picture.width + 2 * border, picture.height + 2 * border))
        padded.paste(picture.getchannel("A"), (border, border))
        halo = padded.filter(ImageFilter.MaxFilter(2 * border + 1))
        image.paste(edge, (at[0] - border, at[1] - border), halo)
    image.paste(picture, at, picture)


def frame(image: Image.Image, box: Box, colour: RGB, width: int) -> None:
    """An empty box with a thick coloured edge; thin lines keep it visible on any background."""
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=width)
    line = PAPER if sum(colour) < 330 else INK
    draw.rectangle((left - 1, top - 1, right, bottom), outline=line)
    draw.rectangle((left + width, top + width, right - 1 - width, bottom - 1 - width), outline=line)


def sign(
    image: Image.Image, box: Box, colour: RGB, lines: Sequence[str], font: ImageFont.FreeTypeFont, padding: int
) -> None:
    """A coloured plate with lines of text from its upper left."""
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = box
    ink = PAPER if colour[0] * 0.3 + colour[1] * 0.59 + colour[2] * 0.11 < 125 else INK
    draw.rounded_rectangle((left, top, right - 1, bottom - 1), radius=padding // 2, fill=colour, outline=ink)
    for number, line in enumerate(lines):
        draw.text((left + padding, top + padding + number * line_height(font)), line, fill=ink, font=font)


def sign_size(lines: Sequence[str], font: ImageFont.FreeTypeFont, padding: int) -> tuple[int, int]:
    """Width and height in pixels of the plate that ``sign`` draws."""
    width = max(math.ceil(font.getlength(line)) for line in lines)
    return width + 2 * padding, len(lines) * line_height(font) + 2 * padding


def line_height(font: ImageFont.FreeTypeFont) -> int:
    """Pixels from one line to the next."""
    ascent, descent = font.getmetrics()
    return ascent + descent


def outline(name: str) -> list[tuple[float, float]]:
    """Corners of a shape within the square from -1 to 1."""

    def ngon(corners: int, start: float) -> list[tuple[float, float]]:
        turns = [math.radians(start + 360 * k / corners) for k in range(corners)]
        return [(math.cos(t), math.sin(t)) for t in turns]

    match name:
        case "square":
            return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        case "triangle":
            return [(0, -1), (1, 0.75), (-1, 0.75)]
        case "hexagon":
            return ngon(6, 0)
        case "diamond":
            return [(0, -1), (0.66, 0), (0, 1), (-0.66, 0)]
        case "star":
            tips, notches = ngon(5, -90), ngon(5, -54)
            return [p for tip, (x, y) in zip(tips, notches, strict=True) for p in (tip, (0.42 * x, 0.42 * y))]
        case "cross":
            a = 0.32
            quarter = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
            return [*quarter, *((-x, -y) for x, y in quarter)]
        case "arrow":
            return [(-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)]
        case "heart":
            turns = np.linspace(0, 2 * math.pi, 60)
            xs = np.sin(turns) ** 3
            ys = (13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)) / 16
            return [(float(x), -float(y) - 0.12) for x, y in zip(xs, ys, strict=True)]
    raise ValueError(f"no shape is called {name!r}: there are {', '.join(SHAPES)}")


def _blend(rng: np.random.Generator, kind: str, side: int) -> tuple[np.ndarray, str | None]:
    """[side, side] of how much of the second colour shows, 0 to 1; and the pattern of a texture."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == "gradient":
        ramp: np.ndarray = 0.8 * (along - along.min()) / np.ptp(along)
        return ramp, None
    pattern = str(rng.choice(list(PATTERNS)))
    strength = rng.uniform(0.25, 0.6)
    if pattern == "scribble":
        sheet = Image.new("L", (side, side))
        ends = rng.integers(-side // 4, side + side // 4, (int(rng.integers(20, 90)), 4)).tolist()
        for line in ends:
            ImageDraw.Draw(sheet).line(line, fill=255, width=1)
        shown = np.asarray(sheet, np.float32) / 255
    elif pattern == "stripes":
        shown = np.floor(along * rng.integers(8, 40)) % 2
    elif pattern == "checks":
        cells = int(rng.integers(6, 34))
        shown = (np.floor(x * cells) + np.floor(y * cells)) % 2
    else:
        cells = side if pattern == "grain" else int(rng.integers(6, 60))
        noise = Image.fromarray(rng.random((cells, cells), np.float32))
        shown = np.asarray(noise.resize((side, side), Image.Resampling.BILINEAR))
    blended: np.ndarray = strength * shown
    return blended, pattern


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _visible(alpha: int) -> int:
    return 255 if alpha > 24 else 0
