"""The held-out questions: new compositions, and photos that training never saw.

``python -m training.heldout FOLDER`` writes two folders that ``dymu evaluate --task`` takes: ``FOLDER/heldout``, and
``FOLDER/reworded``, which asks in phrasings that training never showed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from PIL import Image
from rich.progress import track

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
    objects: int | None = None
    """How many things the scene holds; None: a photo, which nobody counted."""


def scene_questions(per_kind: int = PER_KIND, unseen: bool = False, seed: int = TEST_SEED) -> list[Asked]:
    """Equally many questions of each kind, at most one of a kind per scene."""
    asked: list[Asked] = []
    left = dict.fromkeys(SCENE_KINDS, per_kind)
    index = 0
    while any(left.values()):
        rng = np.random.default_rng((seed, 7, index))
        scene = compose("test", seed, index)
        possible = questions(scene.facts, rng)
        for kind in SCENE_KINDS:
            of_kind = [question for question in possible if question.kind == kind]
            if of_kind and left[kind]:
                (question,) = choose(of_kind, 1, rng)
                text = question.text(rng, unseen) + "?"
                asked.append(Asked(scene.image, kind, text, question.answer, len(scene.facts.items)))
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


def write(rows: list[Asked], folder: Path) -> None:
    """A folder of images with ``questions.jsonl`` beside them; equal images are written once."""
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[bytes, str] = {}
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as stream:
        for row in track(rows, description=folder.name):
            key = row.image.tobytes()
            if key not in names:
                names[key] = f"{len(names):04}.png"
                row.image.save(folder / names[key])
            asked = {"image": names[key], "question": row.text, "answer": row.answer, "kind": row.kind}
            if row.kind == "yesno":
                asked["score"] = "yes_no"
            if row.objects is not None:
                asked |= {"measures": {"objects": row.objects}}
            stream.write(json.dumps(asked) + "\n")


def main(folder: Path) -> None:
    """Write both folders."""
    write(scene_questions() + photo_questions(), folder / "heldout")
    write(scene_questions(25, unseen=True, seed=TEST_SEED + 100), folder / "reworded")


if __name__ == "__main__":
    typer.run(main)
