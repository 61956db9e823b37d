"""Questions about scenes composed on the fly: every answer exact, complexity known, identities held out.

The set is semi-synthetic: real renders, clip art, photos and fonts, put together by rules.
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

from dymu.evaluation.tasks import scoring
from dymu.evaluation.tasks.task import Example
from scenes import KINDS, Materials, Question, Scene, compose, evaluation_pack, questions
from scenes.drawing import BACKGROUNDS
from scenes.questions import choose

VERSION = 2
"""Raised whenever the same seed asks something else."""

LEVELS = (0.1, 0.35, 0.6, 0.85, 1.0)
"""Complexities, in turn."""

JPEG_QUALITY = 90
_ATTEMPTS = 200
_CALIBRATION = 1 << 20


class Composed:
    """Scenes, a question each, for token merging to be judged by; a `Task`.

    Every beginning is balanced over the kinds, then over complexity, and over yes and no. For a model of
    ``training/vlm``, objects are known from training, but for the kind ``naming_unseen``; backgrounds, fonts and words
    are all held out. The demo model, of another split, was trained on 4 of the 12 backgrounds. An example is composed
    when it is asked for, in some tens of milliseconds.

    Args:
        per_kind: how many examples of each kind.
        seed: another one gives other scenes.
        kinds: which of ``KINDS`` to ask, in turn.
        side: of the images in pixels.
        materials: another pack than the one in this folder.
    """

    name = "composed"
    max_new_tokens = 24
    yes_no: tuple[str, ...] = ("yesno",)

    def __init__(
        self,
        per_kind: int = 400,
        seed: int = 2,
        kinds: tuple[str, ...] = KINDS,
        side: int = 336,
        materials: Materials | None = None,
    ) -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise ValueError(f"kinds are some of {', '.join(KINDS)}, not {', '.join(unknown) or 'none'}")
        self.per_kind, self.seed, self.kinds, self.side = per_kind, seed, kinds, side
        self.materials = materials or evaluation_pack()

    def __len__(self) -> int:
        return self.per_kind * len(self.kinds)

    def __getitem__(self, index: int) -> Example:
        scene, question = self.scene(index)
        measures = {
            "objects": float(len(scene.items)),
            "words": float(scene.words),
            "background": float(BACKGROUNDS.index(scene.background)),
            "complexity": scene.complexity,
            "jpeg_bytes": float(jpeg_bytes(scene.image)),
        }
        return Example((scene.image,), question.text, question.answers, question.kind, measures)

    def scene(self, index: int) -> tuple[Scene, Question]:
        """The scene behind an example, with all its facts, and the question with what it asks."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        turn, place = divmod(index, len(self.kinds))
        kind, level, unwanted = self.kinds[place], LEVELS[turn % len(LEVELS)], ("no", "yes")[turn % 2]
        for attempt in range(_ATTEMPTS):
            number = index * _ATTEMPTS + attempt
            scene = compose(self.materials, self.seed, number, level, focus=kind, side=self.side)
            rng = np.random.default_rng((self.seed, number, 1))
            options = questions(scene, self.materials, kind, rng)
            options = [option for option in options if option.answers[0] != unwanted]
            if options:
                return scene, choose(options, rng)
        raise RuntimeError(f"no scene of {_ATTEMPTS} answers a question of the kind {kind} with seed {self.seed}")

    def score(self, example: Example, answer: str) -> float:
        """Exact for names, colours, sides and words; the number said for counts; ANLS for lines of text."""
        first = example.references[0]
        if first in ("yes", "no"):
            return scoring.yes_no(answer, example.references)
        if example.kind == "counting":
            return number_said(answer, example.references)
        if example.kind == "reading" and " " in first:
            return scoring.anls(answer, example.references)
        return scoring.exact(answer, example.references)

    def describe(self) -> dict[str, object]:
        """Version, seed, sizes, and the sha256 of the pack's index."""
        return {
            "task": self.name,
            "version": VERSION,
            "seed": self.seed,
            "per_kind": self.per_kind,
            "kinds": list(self.kinds),
            "side": self.side,
            "levels": list(LEVELS),
            "pack": self.materials.digest,
        }


def calibration_images(
    count: int, seed: int = 0, side: int = 336, materials: Materials | None = None
) -> list[Image.Image]:
    """Scenes like those of ``Composed``, from backgrounds and fonts that it never shows, over all complexities."""
    pack = materials or evaluation_pack()
    kinds = [kind for kind in KINDS if kind != "naming_unseen"]
    return [
        compose(
            pack,
            seed + _CALIBRATION,
            index,
            LEVELS[index % len(LEVELS)],
            use="calibration",
            focus=kinds[index % len(kinds)],
            side=side,
        ).image
        for index in range(count)
    ]


def number_said(answer: str, references: tuple[str, ...]) -> float:
    """Whether the first number in the answer, in digits or in words, is the right one."""
    number = re.search(r"\d+(\.\d+)?", scoring.normalised(answer))
    return float(number is not None and number.group() in {scoring.normalised(r) for r in references})


def jpeg_bytes(image: Image.Image) -> int:
    """How many bytes the image takes as a JPEG: a measure of complexity that knows nothing of objects."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.tell()


def task() -> Composed:
    """For `dymu evaluate --task scenes/composed.py`."""
    return Composed()
