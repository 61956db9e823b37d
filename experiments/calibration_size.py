"""How many images calibration takes, and of which kind.

`python -m experiments.calibration_size models/demo` calibrates on 25 to 4,000 composed scenes (several draws of small
sizes) and on photos, and counts what held-out scenes and held-out photos then keep on average beside what was wanted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from benchmarks import record
from dymu.thresholds import Thresholds
from experiments import RESULTS
from scenes.composed import Composed, calibration_images
from scenes.photos import Photos

SIZES = {25: 4, 50: 4, 100: 4, 200: 2, 500: 1, 1000: 1, 2000: 1, 4000: 1}
"""Images, and how many disjoint draws of so many."""

BUDGETS = (0.15, 0.3)
HELD_OUT_SCENES = 135
BATCH = 10


def main(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL")],
    most: Annotated[int, typer.Option(help="Leave out larger sets.")] = max(SIZES),
    name: Annotated[str, typer.Option(help="Of the result file.")] = "calibration_size",
) -> None:
    """Calibrate on every set and write the result file."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder).float().eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    photos = _images(Photos())
    tests = {"scenes": _images(Composed(), HELD_OUT_SCENES), "photos": photos[1::2]}
    sizes = {size: draws for size, draws in SIZES.items() if size <= most}
    pool = calibration_images(max(size * draws for size, draws in sizes.items()))
    sets: list[tuple[str, Sequence[Image.Image]]] = [
        ("scenes", pool[draw * size : (draw + 1) * size]) for size, draws in sizes.items() for draw in range(draws)
    ]
    sets.append(("photos", photos[0::2]))
    sets.append(("both", [*photos[0::2], *pool[: len(photos[0::2])]]))
    rows = []
    for kind, images in track(sets, description="calibrating"):
        thresholds = dymu.calibrate(model, processor, images, BUDGETS, progress=False)
        kept = {test: _kept(model, processor, thresholds, pictures) for test, pictures in tests.items()}
        rows.append({"calibrated_on": kind, "images": len(images), "kept": kept})
    data: dict[str, Any] = {
        "model": model_folder.name,
        "full_tokens": thresholds.encoder.tokens if thresholds.encoder else None,
        "budgets": list(thresholds.budgets),
        "tests": {test: len(pictures) for test, pictures in tests.items()},
        "rows": rows,
    }
    print(record.write(name, data, RESULTS))


def _images(task: Any, count: int | None = None) -> list[Image.Image]:
    """The first images of a task, each once."""
    seen: dict[bytes, Image.Image] = {}
    for index in range(len(task) if count is None else count):
        image = task[index].images[0]
        seen.setdefault(image.tobytes(), image)
    return list(seen.values())


@torch.inference_mode()
def _kept(model: Any, processor: Any, thresholds: Thresholds, pictures: Sequence[Image.Image]) -> list[float]:
    """Mean image tokens at each budget."""
    means = []
    with dymu.apply(model, thresholds, budget=thresholds.budgets[0]) as handle:
        for budget in thresholds.budgets:
            handle.budget = budget
            means.append(round(statistics.fmean(_counts(model, processor, handle, pictures)), 2))
    return means


def _counts(model: Any, processor: Any, handle: Any, pictures: Sequence[Image.Image]) -> Iterable[int]:
    for start in range(0, len(pictures), BATCH):
        pixels = processor.image_processor(images=list(pictures[start : start + BATCH]), return_tensors="pt")
        model.get_image_features(**pixels)
        yield from handle.last.kept


if __name__ == "__main__":
    typer.run(main)
