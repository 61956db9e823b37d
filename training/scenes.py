"""Compose scenes whose every fact is known: what is where, in which colour, on what.

A scene is a function of its seed and index alone, so features, questions and evaluation can each
make it again.
"""

from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from PIL import Image

from training import drawing
from training.assets import emoji_folder, photos
from training.drawing import SIDE
from training.vocabulary import BACKGROUND, COLOURS, EMOJI, SHAPES

GRID = 16
"""Image tokens per side."""

TRAIN_SEED, TEST_SEED = 1, 2


@dataclass(frozen=True)
class Item:
    """One thing in a scene; x, y (its centre) and size are fractions of the side."""

    name: str
    colour: str | None
    x: float
    y: float
    size: float

    @property
    def column(self) -> int:
        """0, 1 or 2 from left to right."""
        return _third(self.x)

    @property
    def row(self) -> int:
        """0, 1 or 2 from top to bottom."""
        return _third(self.y)


@dataclass(frozen=True)
class Facts:
    """What is true of a scene. ``photo`` is the subject when the whole picture is one photo."""

    items: tuple[Item, ...]
    background: str | None
    photo: str | None

    def to_json(self) -> dict[str, object]:
        """Plain data for a file."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict) -> "Facts":
        """The inverse of ``to_json``."""
        items = tuple(Item(**item) for item in data["items"])
        return Facts(items, data["background"], data["photo"])


@dataclass(frozen=True)
class Scene:
    """A picture, its facts, and for each image token the name and colour at its place.

    ``names`` and ``colours`` are GRID x GRID; an empty string is a token nobody can judge.
    """

    image: Image.Image
    facts: Facts
    names: list[str]
    colours: list[str]


@dataclass(frozen=True)
class Materials:
    """The pictures that scenes of one split are made from."""

    emoji: dict[str, list[Image.Image]]
    subjects: list[tuple[str, Image.Image]]
    backgrounds: list[Image.Image]


@cache
def materials(split: str) -> Materials:
    """Load a split: ``train`` and ``test`` share emoji, never a photo."""

    def load(path: object) -> Image.Image:
        image = Image.open(str(path)).convert("RGB")
        image.thumbnail((640, 640), Image.Resampling.LANCZOS)
        return image

    folder = emoji_folder()
    emoji = {
        name: [_trim(Image.open(folder / f"{code}.webp").convert("RGBA")) for code in codes]
        for name, codes in EMOJI.items()
    }
    subjects = [(photo.name, load(photo.path)) for photo in photos(split)]
    plain = [load(photo.path) for photo in photos(f"background-{split}")]
    plain += [image for name, image in subjects if name in ("building", "dam")]
    return Materials(emoji, subjects, plain)


def compose(split: str, seed: int, index: int, most_items: int = 6) -> Scene:
    """Scene number ``index`` of a seed."""
    rng = np.random.default_rng((seed, index))
    stock = materials(split)
    if split == "train" and rng.random() < 0.14:
        return _photo(rng, stock)
    image, colour, is_photo = drawing.background(rng, stock.backgrounds)
    names = np.full((GRID, GRID), "" if is_photo else BACKGROUND, dtype=object)
    colours = np.full((GRID, GRID), colour or "", dtype=object)
    items = []
    things: list[tuple[str, str | None]] = []
    for x, y, size in _layout(rng, most_items):
        if things and rng.random() < 0.33:
            name, shade = things[rng.integers(len(things))]
            shade = _colour(rng, colour) if shade and rng.random() < 0.4 else shade
        else:
            name, shade = _thing(rng, stock, colour)
        things.append((name, shade))
        item = Item(name, shade, x, y, size)
        covered = _paste(rng, stock, image, item)
        names[covered], colours[covered] = name, shade or ""
        items.append(item)
    facts = Facts(tuple(items), colour, None)
    return Scene(image, facts, list(names.ravel()), list(colours.ravel()))


def photo_scene(name: str, image: Image.Image) -> Scene:
    """A whole photo as a scene of its own."""
    names = np.full((GRID, GRID), "", dtype=object)
    names[4:12, 4:12] = name
    return Scene(image, Facts((), None, name), list(names.ravel()), [""] * GRID**2)


def _photo(rng: np.random.Generator, stock: Materials) -> Scene:
    """A photo of the split: half the time by subject, half by photo, so none is starved."""
    name, image = stock.subjects[rng.integers(len(stock.subjects))]
    if rng.random() < 0.5:
        subjects = sorted({name for name, _ in stock.subjects})
        name = subjects[rng.integers(len(subjects))]
        mine = [image for other, image in stock.subjects if other == name]
        image = mine[rng.integers(len(mine))]
    return photo_scene(name, drawing.crop(rng, image, 0.72, 1.0))


def _third(at: float) -> int:
    return 0 if at < 0.385 else 2 if at > 0.615 else 1


def _layout(rng: np.random.Generator, most: int) -> list[tuple[float, float, float]]:
    """Centres and sizes of 1 to ``most`` things that neither overlap nor straddle two thirds."""
    odds = np.array([5, 4, 4, 3, 3, 3], dtype=float)[:most]
    count = int(rng.choice(len(odds), p=odds / odds.sum())) + 1
    if count == 1:
        size = rng.uniform(0.3, 0.85)
        return [(_clear(rng, size), _clear(rng, size), size)]
    if count == 2 and rng.random() < 0.5:
        pair = [(0.26, 0.5), (0.74, 0.5)]
        spots = pair if rng.random() < 0.5 else [(y, x) for x, y in pair]
        low, high, shift = 0.3, 0.48, 0.02
    elif count <= 4 and rng.random() < 0.5:
        spots = [(x, y) for y in (0.26, 0.74) for x in (0.26, 0.74)]
        low, high, shift = 0.28, 0.46, 0.03
    else:
        spots = [(x, y) for y in (0.17, 0.5, 0.83) for x in (0.17, 0.5, 0.83)]
        low, high, shift = 0.22, 0.31, 0.02
    chosen = sorted(rng.choice(len(spots), count, replace=False))

    def moved(at: float) -> float:
        return at + rng.uniform(-shift, shift)

    return [(moved(spots[k][0]), moved(spots[k][1]), rng.uniform(low, high)) for k in chosen]


def _clear(rng: np.random.Generator, size: float) -> float:
    """A centre that keeps the thing inside and stays away from the borders between thirds."""
    while True:
        at = rng.uniform(size / 2, 1 - size / 2)
        if min(abs(at - 0.385), abs(at - 0.615)) > 0.035:
            return float(at)


def _colour(rng: np.random.Generator, avoid: str | None) -> str:
    return str(rng.choice([colour for colour in COLOURS if colour != avoid]))


def _thing(rng: np.random.Generator, stock: Materials, background: str | None) -> tuple[str, str | None]:
    draw = rng.random()
    if draw < 0.36:
        return SHAPES[rng.integers(len(SHAPES))], _colour(rng, background)
    if draw < 0.44:
        subjects = sorted({name for name, _ in stock.subjects})
        return subjects[rng.integers(len(subjects))], None
    emoji = list(stock.emoji)
    return emoji[rng.integers(len(emoji))], None


def _paste(rng: np.random.Generator, stock: Materials, image: Image.Image, item: Item) -> np.ndarray:
    """Draw the item; return the [GRID, GRID] mask of tokens it fills by two fifths or more."""
    side = int(item.size * SIDE)
    tiles = [picture for name, picture in stock.subjects if name == item.name]
    renders = stock.emoji.get(item.name, [])
    if item.colour is not None:
        sprite = drawing.shape(rng, item.name, item.colour, side)
    elif renders and not (tiles and rng.random() < 0.35):
        sprite = _pose(rng, renders[rng.integers(len(renders))], side)
    else:
        tile = drawing.crop(rng, tiles[rng.integers(len(tiles))], 0.75, 1.0, side)
        sprite = tile.convert("RGBA")
    x, y = int(item.x * SIDE - side / 2), int(item.y * SIDE - side / 2)
    image.paste(sprite, (x, y), sprite)
    alpha = Image.new("L", (SIDE, SIDE))
    alpha.paste(sprite.getchannel("A"), (x, y))
    return np.asarray(alpha.resize((GRID, GRID), Image.Resampling.BOX)) > 102


def _trim(image: Image.Image) -> Image.Image:
    """Cut the transparent border."""
    return image.crop(image.getchannel("A").getbbox())


def _pose(rng: np.random.Generator, image: Image.Image, side: int) -> Image.Image:
    """Turn, mirror and relight a render, then fit it into a square without squashing it."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True)
    image = _trim(image)
    scale = side / max(image.size)
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    alpha = image.getchannel("A")
    image = drawing.tint(rng, image.convert("RGB")).convert("RGBA")
    image.putalpha(alpha)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square
