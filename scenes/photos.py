"""Questions about real photos: what is it, and is it what it could be taken for."""

from __future__ import annotations

import hashlib

from dymu.evaluation.tasks import scoring
from dymu.evaluation.tasks.task import Example
from scenes import Materials, evaluation_pack
from scenes.assets import Photo
from scenes.composed import jpeg_bytes
from scenes.questions import YESNO, article

VERSION = 1
KINDS = ("naming", "naming_unseen", "yesno")

NAMING = "What is the main subject of this photo? Answer with one or two words."
PRESENCE = "Does this photo show {}? " + YESNO


class Photos:
    """The photos of the evaluation pack, a `Task`: each named once, and asked about with a yes and a no.

    They are held out from ``training/vlm``. The demo model was trained on 45 of the 92 by another split.
    ``naming_unseen`` are photos whose very name ``training/vlm`` never teaches, from whatever picture. The wrong name
    in a "no" question is of the same sort (animals, tools, ...), and one that the photo certainly does not show. The
    three examples of a photo share the measure ``photo``, its number: they are no independent sample of what is
    photographed.

    Args:
        seed: chooses the wrong names and the order.
        materials: another pack than the one in this folder.
    """

    name = "photos"
    max_new_tokens = 16
    yes_no: tuple[str, ...] = ("yesno",)

    def __init__(self, seed: int = 0, materials: Materials | None = None) -> None:
        self.seed = seed
        self.materials = materials or evaluation_pack()
        shuffled = sorted(self.materials.photos, key=lambda photo: self._hash(photo.file))
        self._number = {photo.file: number for number, photo in enumerate(self.materials.photos)}
        known = [(photo, "naming", "") for photo in shuffled if photo.known]
        unseen = [(photo, "naming_unseen", "") for photo in shuffled if not photo.known]
        asked = [(photo, "yesno", name) for k, photo in enumerate(shuffled) for name in self._two_names(photo, k)]
        self._asked = _interleaved(known, unseen, asked)

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        photo, kind, name = self._asked[index]
        image = self.materials.picture(photo.file).convert("RGB")
        measures = {"jpeg_bytes": float(jpeg_bytes(image)), "photo": float(self._number[photo.file])}
        if kind == "yesno":
            answer = "yes" if name == photo.name else "no"
            return Example((image,), PRESENCE.format(self._one(name)), (answer,), kind, measures)
        return Example((image,), NAMING, (photo.name, *photo.also), kind, measures)

    def score(self, example: Example, answer: str) -> float:
        """Exact for names, of which all synonyms of the pack are right; the first word for yes and no."""
        rule = scoring.yes_no if example.kind == "yesno" else scoring.exact
        return rule(answer, example.references)

    def describe(self) -> dict[str, object]:
        """Version, seed, size, and the sha256 of the pack's index."""
        return {
            "task": self.name,
            "version": VERSION,
            "seed": self.seed,
            "examples": len(self),
            "pack": self.materials.digest,
        }

    def _two_names(self, photo: Photo, position: int) -> tuple[str, str]:
        """The right name and a wrong one; which comes first alternates."""
        wrong = min(photo.unlike, key=lambda name: self._hash(photo.file + name))
        return (photo.name, wrong) if position % 2 else (wrong, photo.name)

    def _one(self, name: str) -> str:
        thing = self.materials.things.get(name)
        countable = bool(thing.plural) if thing else not name.endswith(("pliers", "tweezers", "scissors"))
        return article(name, countable)

    def _hash(self, text: str) -> str:
        return hashlib.sha256(f"{self.seed} {text}".encode()).hexdigest()


def _interleaved(*groups: list[tuple[Photo, str, str]]) -> list[tuple[Photo, str, str]]:
    """One of each in turn, each group spread evenly over the whole."""
    placed = [((k + 0.5) / len(group), row) for group in groups for k, row in enumerate(group)]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def task() -> Photos:
    """For `dymu evaluate --task scenes/photos.py`."""
    return Photos()
