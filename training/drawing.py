"""Pixels: coloured shapes and backgrounds, drawn with Pillow and numpy."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from training.vocabulary import COLOURS

SIDE = 224
"""Width and height of every scene in pixels."""

RGB = tuple[int, int, int]


def jitter(rng: np.random.Generator, colour: str) -> RGB:
    """A shade of a named colour, still plainly that colour."""
    amount = 4 if colour in ("black", "white", "grey") else 14
    base = np.array(COLOURS[colour]) * rng.uniform(0.9, 1.06) + rng.integers(-amount, amount + 1, 3)
    r, g, b = (int(v) for v in base.clip(0, 255))
    return r, g, b


def shape(rng: np.random.Generator, name: str, colour: str, side: int) -> Image.Image:
    """An RGBA image of one coloured shape that fills its square."""
    big = 3 * side
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    c, r = big / 2, big * 0.47
    if name == "circle":
        draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
    elif name == "ring":
        draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
        hole = r * rng.uniform(0.5, 0.62)
        draw.ellipse((c - hole, c - hole, c + hole, c + hole), fill=0)
    else:
        draw.polygon([(c + r * x, c + r * y) for x, y in _outline(name)], fill=255)
    tilt = {"circle": 0, "ring": 0, "arrow": 180, "diamond": 6}.get(name, 14)
    mask = mask.rotate(rng.uniform(-tilt, tilt), resample=Image.Resampling.BILINEAR)
    fill = Image.new("RGB", (big, big), jitter(rng, colour))
    if rng.random() < 0.4:
        fill = _shade(rng, fill)
    image = fill.convert("RGBA")
    image.putalpha(mask)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def background(rng: np.random.Generator, pictures: Sequence[Image.Image]) -> tuple[Image.Image, str | None, bool]:
    """A background, the one colour it has if it has one, and whether it is a photo."""
    kind = rng.choice(["flat", "flat", "flat", "gradient", "texture", "pattern", "photo", "photo"])
    if kind == "photo":
        picture = crop(rng, pictures[int(rng.integers(len(pictures)))], 0.35, 0.9)
        if rng.random() < 0.3:
            picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(1, 4)))
        return picture, None, True
    first, second = rng.choice(list(COLOURS), 2, replace=False)
    image = Image.new("RGB", (SIDE, SIDE), jitter(rng, first))
    if kind == "flat":
        return (_grain(rng, image, 6.0) if rng.random() < 0.4 else image), str(first), False
    if kind == "texture":
        return _grain(rng, image, rng.uniform(12, 30), coarse=True), str(first), False
    other = Image.new("RGB", (SIDE, SIDE), jitter(rng, second))
    return Image.composite(image, other, _blend(rng, str(kind))), None, False


def crop(rng: np.random.Generator, picture: Image.Image, low: float, high: float, side: int = SIDE) -> Image.Image:
    """A random part of a picture, between ``low`` and ``high`` of each side, squashed square."""
    width, height = picture.size
    w, h = int(width * rng.uniform(low, high)), int(height * rng.uniform(low, high))
    x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    part = picture.resize((side, side), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return tint(rng, part)


def tint(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Colour jitter: brightness, contrast and a slight cast."""
    pixels = np.asarray(image, dtype=np.float32)
    scale = rng.uniform(0.8, 1.2) * rng.uniform(0.93, 1.07, 3)
    mean = pixels.mean()
    pixels = ((pixels - mean) * rng.uniform(0.8, 1.2) + mean) * scale
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _outline(name: str) -> list[tuple[float, float]]:
    """A polygon within the unit circle."""

    def ngon(corners: int, start: float = -90) -> list[tuple[float, float]]:
        turns = [math.radians(start + 360 * k / corners) for k in range(corners)]
        return [(math.cos(t), math.sin(t)) for t in turns]

    if name == "square":
        return [(x * 1.25, y * 1.25) for x, y in ngon(4, 45)]
    if name == "triangle":
        return ngon(3)
    if name == "hexagon":
        return ngon(6, 0)
    if name == "diamond":
        return [(0, -1), (0.66, 0), (0, 1), (-0.66, 0)]
    if name == "star":
        outer, inner = ngon(5), ngon(5, -54)
        pairs = zip(outer, inner, strict=True)
        return [corner for o, i in pairs for corner in (o, (0.42 * i[0], 0.42 * i[1]))]
    if name == "cross":
        a = 0.32
        return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a),
                (-1, a), (-1, -a), (-a, -a)]  # fmt: skip
    if name == "arrow":
        return [(-1, -0.28), (0.1, -0.28), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.28),
                (-1, 0.28)]  # fmt: skip
    if name == "heart":
        turns = np.linspace(0, 2 * math.pi, 60)
        xs = 16 * np.sin(turns) ** 3
        ys = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
        return [(float(x) / 16.5, -float(y) / 16.5 - 0.08) for x, y in zip(xs, ys, strict=True)]
    raise ValueError(f"no shape is called {name!r}")


def _shade(rng: np.random.Generator, fill: Image.Image) -> Image.Image:
    """A gentle light from one side."""
    side = fill.size[0]
    ramp = np.linspace(rng.uniform(0.8, 0.95), rng.uniform(1.0, 1.1), side, dtype=np.float32)
    light = np.broadcast_to(ramp if rng.random() < 0.5 else ramp[:, None], (side, side))
    pixels = np.asarray(fill, dtype=np.float32) * light[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _grain(rng: np.random.Generator, image: Image.Image, strength: float, coarse: bool = False) -> Image.Image:
    cells = int(rng.integers(14, 80)) if coarse else SIDE
    noise = rng.normal(0, strength, (cells, cells)).astype(np.float32)
    if coarse:
        noise = np.asarray(Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    pixels = np.asarray(image, dtype=np.float32) + noise[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _blend(rng: np.random.Generator, kind: str) -> Image.Image:
    """A mask between two colours: a ramp, or stripes or checks."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == "gradient":
        values = (along - along.min()) / np.ptp(along)
    elif rng.random() < 0.5:
        values = np.floor(along * rng.integers(4, 14)) % 2
    else:
        cells = rng.integers(3, 12)
        values = (np.floor(x * cells) + np.floor(y * cells)) % 2
    return Image.fromarray((255 * values).astype(np.uint8))
