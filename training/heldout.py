"""The held-out questions: new compositions on photos that training never saw."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from training.assets import photos
from training.packing import choose
from training.questions import questions
from training.scenes import TEST_SEED, compose

PER_KIND = 160
SCENE_KINDS = ("naming", "counting", "colour", "where", "yesno", "list")


@dataclass(frozen=True)
class Asked:
    """One question about one image."""

    image: Image.Image
    kind: str
    text: str
    answer: str


def scene_questions(per_kind: int = PER_KIND, unseen: bool = False, seed: int = TEST_SEED) -> list[Asked]:
    """Equally many questions of each kind, at most one of a kind per scene."""
    asked: list[Asked] = []
    left = dict.fromkeys(SCENE_KINDS, per_kind)
    index = 0
    while any(left.values()):
        rng = np.random.default_rng((seed, 7, index))
        scene = compose("test", seed, index)
        found = questions(scene.facts, rng)
        for kind in SCENE_KINDS:
            of_kind = [question for question in found if question.kind == kind]
            if of_kind and left[kind]:
                (question,) = choose(of_kind, 1, rng)
                text = question.text(rng, unseen) + "?"
                asked.append(Asked(scene.image, kind, text, question.answer))
                left[kind] -= 1
        index += 1
    return asked


def photo_questions() -> list[Asked]:
    """Every held-out photo, whole."""
    rows = []
    for photo in photos("test"):
        image = Image.open(photo.path).convert("RGB")
        rows.append(Asked(image, "photo", "what is this?", photo.name))
    return rows


def heldout() -> list[Asked]:
    """Everything that ``training.evaluate`` asks."""
    unseen = scene_questions(25, unseen=True, seed=TEST_SEED + 100)
    reworded = [Asked(row.image, "unseen phrasing", row.text, row.answer) for row in unseen]
    rows = scene_questions() + photo_questions() + reworded
    return sorted(rows, key=lambda row: row.kind)  # answers of one length end a batch early
