"""What scenes are composed from: a folder ("pack") of pictures, fonts and words with an index, ``pack.json``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageFont

FORMAT = 1
"""Version of the form of ``pack.json``; a pack of another one is refused."""


@dataclass(frozen=True)
class Thing:
    """An object with a name that a person would say, and its pictures.

    Attributes:
        plural: of several; empty where the name is a mass or a plural ("jeans"), which cannot be counted.
        also: other names that are right.
        known: whether training shows it; the others are held out as an identity.
        outdoor: may be seen in a background photo, so it is neither placed on one nor asked about there.
        similar: names of things and shapes that a person could take it for, or that include it.
        files: RGBA pictures, relative to the pack.
    """

    name: str
    plural: str
    also: tuple[str, ...]
    known: bool
    outdoor: bool
    similar: frozenset[str]
    files: tuple[str, ...]


@dataclass(frozen=True)
class Photo:
    """A photo of one subject. ``known`` says whether training teaches its name, from whatever picture.

    ``subject`` is the depicted individual where it is one (a certain tower) and else equal to ``name``. ``unlike`` are
    names of its like that it certainly does not show. ``description`` is one sentence, or empty.
    """

    file: str
    name: str
    subject: str
    unlike: tuple[str, ...]
    also: tuple[str, ...]
    known: bool
    description: str


@dataclass(frozen=True)
class Sourced:
    """A background or a font, and what it may be ``use``d for: training, calibration or heldout."""

    file: str
    use: str


class Materials:
    """The contents of one pack. Pictures and fonts are read when first needed, and then kept.

    Attributes:
        things: by name, in the order of the index.
        photos: subjects to name, not backgrounds.
        words: common words of at most eight letters.
        digest: sha256 of the index, which itself holds the sha256 of every file.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "pack.json"
        if not index.is_file():
            raise FileNotFoundError(f"{folder} is no pack of materials: it has no pack.json")
        text = index.read_text(encoding="utf-8")
        data = json.loads(text)
        if data.get("format") != FORMAT:
            raise ValueError(f"{index} has format {data.get('format')!r}, and this version reads {FORMAT}: rebuild it")
        self.folder = folder
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.things = {row["name"]: _thing(row) for row in data["things"]}
        self.photos = tuple(
            Photo(**{**row, "also": tuple(row["also"]), "unlike": tuple(row["unlike"])}) for row in data["photos"]
        )
        self.backgrounds = tuple(Sourced(**row) for row in data["backgrounds"])
        self.fonts = tuple(Sourced(**row) for row in data["fonts"])
        self.words = tuple((folder / "words.txt").read_text(encoding="utf-8").split())
        self._pictures: dict[str, Image.Image] = {}
        self._fonts: dict[tuple[str, int], ImageFont.FreeTypeFont] = {}

    def picture(self, file: str) -> Image.Image:
        """One picture of the pack as it is stored, RGB or RGBA. Do not change it: it is shared."""
        if file not in self._pictures:
            with Image.open(self.folder / file) as opened:
                opened.load()
                self._pictures[file] = opened.copy()
        return self._pictures[file]

    def font(self, file: str, size: int) -> ImageFont.FreeTypeFont:
        """A font at a size in pixels."""
        if (file, size) not in self._fonts:
            # The basic layout gives the same pixels whether or not libraqm is installed.
            self._fonts[file, size] = ImageFont.truetype(
                str(self.folder / file), size, layout_engine=ImageFont.Layout.BASIC
            )
        return self._fonts[file, size]


@cache
def evaluation_pack() -> Materials:
    """The pack in this folder: what held-out scenes and photos need."""
    return Materials(Path(__file__).with_name("pack"))


def _thing(row: dict) -> Thing:
    return Thing(
        name=row["name"],
        plural=row["plural"],
        also=tuple(row["also"]),
        known=row["known"],
        outdoor=row["outdoor"],
        similar=frozenset(row["similar"]),
        files=tuple(row["files"]),
    )
