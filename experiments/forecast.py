"""How well the tokens that a picture keeps are told beforehand, from its pixels alone.

`python -m experiments.forecast models/demo` calibrates on every kind of picture by itself and on all kinds together,
and holds the forecasts against what held-out pictures of each kind keep: other subjects, backgrounds, fonts and words.
Those of all kinds together are also fitted on half of the subjects, drawn anew many times, and held against the rest.
Needs the photos of the demo's recipe, `training/requirements.txt`, and some minutes for every kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from benchmarks import record
from dymu.calibration.forecast import fit
from dymu.evaluation.summary import share
from dymu.forecast import COVERED
from dymu.media.features import features
from dymu.thresholds import Thresholds
from experiments import RESULTS
from experiments.legibility import pages
from experiments.screenshots import CALIBRATION, HELD_OUT, screenshots
from scenes import evaluation_pack
from scenes.composed import Composed, calibration_images
from training.assets import photos

BUDGETS = (20, 38, 77, 128)
ACROSS = 38
"""The budget at which pictures of a kind that was not calibrated on are counted, too."""
PICTURES = 200
"""Of each kind to calibrate on, and as many held out."""
BATCH = 10
LEAST_CROP = 0.45
"""Part of a photo's width, and of its height, that is shown at least."""
TOGETHER = "all kinds"
SPLITS = 200
"""How many times the subjects of all kinds are divided anew."""


@dataclass(frozen=True)
class Kind:
    """Pictures of one kind, and the subjects of those to calibrate on and of those held out; where they are fewer than
    pictures, these are not independent."""

    calibration: list[Image.Image]
    heldout: list[Image.Image]
    subjects: tuple[list[str], list[str]]

    @classmethod
    def of_their_own(cls, calibration: list[Image.Image], heldout: list[Image.Image]) -> Kind:
        """Of pictures each of which has its own subject."""
        names = [str(number) for number in range(len(calibration) + len(heldout))]
        return cls(calibration, heldout, (names[: len(calibration)], names[len(calibration) :]))


def crops(count: int) -> Kind:
    """Of photos, each photo in turn; a subject is either calibrated on or held out."""
    every = sorted(photos(), key=lambda photo: photo.path)
    subject = {photo.path: photo.path.stem if photo.name == "background" else photo.name for photo in every}
    names = sorted(set(subject.values()))
    halves = [[photo.path for photo in every if names.index(subject[photo.path]) % 2 == half] for half in (0, 1)]
    shown = [[paths[number % len(paths)] for number in range(count)] for paths in halves]
    calibration, heldout = (
        [_crop(path, np.random.default_rng((half, number))) for number, path in enumerate(paths)]
        for half, paths in enumerate(shown)
    )
    of_calibration, of_heldout = ([subject[path] for path in paths] for paths in shown)
    return Kind(calibration, heldout, (of_calibration, of_heldout))


def _crop(path: Path, rng: np.random.Generator) -> Image.Image:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    part = rng.uniform(LEAST_CROP, 1)
    width, height = (round(part * side) for side in image.size)
    left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


def scenes(count: int) -> Kind:
    """Composed scenes; those held out have other backgrounds and fonts."""
    composed = Composed()
    return Kind.of_their_own(calibration_images(count), [composed[number].images[0] for number in range(count)])


def text(count: int) -> Kind:
    """Pages of words, over a colour or a photo; those held out have other fonts and backgrounds."""
    pack = evaluation_pack()
    calibration, heldout = ([page.image for page in pages(pack, use, count)] for use in ("calibration", "heldout"))
    return Kind.of_their_own(calibration, heldout)


def screens(count: int) -> Kind:
    """Of manuals; a manual is either calibrated on or held out."""
    of_calibration, of_heldout = (
        [manuals[number % len(manuals)].name for number in range(count)] for manuals in (CALIBRATION, HELD_OUT)
    )
    return Kind(screenshots(False, count), screenshots(True, count), (of_calibration, of_heldout))


KINDS: dict[str, Callable[[int], Kind]] = {
    "photos": crops,
    "scenes": scenes,
    "pages of text": text,
    "screenshots": screens,
}
"""By name, what makes so many pictures to calibrate on and as many held out."""


def main(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL")],
    count: Annotated[int, typer.Option(help="Pictures of each kind to calibrate on, and as many held out.")] = PICTURES,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "forecast",
) -> None:
    """Calibrate on every kind and on all of them, and write the result file."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder).float().eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    kinds = {kind: make(count) for kind, make in KINDS.items()}
    sets = {kind: shown.calibration for kind, shown in kinds.items()}
    sets[TOGETHER] = [image for kind in kinds.values() for image in kind.calibration]
    rows: list[dict[str, Any]] = []
    for calibrated_on, images in track(sets.items(), description="calibrating"):
        thresholds = dymu.calibrate(model, processor, images, BUDGETS, progress=False)
        assert thresholds.forecasts is not None
        fitted = {entry.budget: entry.r2 for entry in thresholds.forecasts.budgets}
        for kind, shown in kinds.items():
            for budget in BUDGETS if calibrated_on in (kind, TOGETHER) else (ACROSS,):
                about = {"calibrated_on": calibrated_on, "images": len(images), "r2_left_out": fitted[budget]}
                kept = counts(model, processor, thresholds, budget, shown.heldout)
                rows.append(
                    {**about, "kind": kind, "budget": budget, **judged(thresholds, budget, shown.heldout, kept)}
                )
                print(rows[-1], flush=True)
    data = {
        "model": model_folder.name,
        "full_tokens": thresholds.encoder.tokens if thresholds.encoder else None,
        "covered": COVERED,
        "heldout": {kind: len(shown.heldout) for kind, shown in kinds.items()},
        "heldout_subjects": {kind: len(set(shown.subjects[1])) for kind, shown in kinds.items()},
        "rows": rows,
        "splits": SPLITS,
        "anew": anew(model, processor, thresholds, kinds),  # the last set was all kinds
    }
    print(record.write(name, data, RESULTS))


@torch.inference_mode()
def counts(model: Any, processor: Any, thresholds: Thresholds, budget: float, images: list[Image.Image]) -> list[int]:
    """Image tokens that each picture keeps."""
    kept: list[int] = []
    with dymu.apply(model, thresholds, budget=budget) as handle:
        for start in range(0, len(images), BATCH):
            pixels = processor.image_processor(images=images[start : start + BATCH], return_tensors="pt")
            model.get_image_features(**pixels)
            kept += handle.last.kept
    return kept


def anew(model: Any, processor: Any, thresholds: Thresholds, kinds: dict[str, Kind]) -> list[dict[str, Any]]:
    """Forecasts fitted on half of the subjects of all kinds, drawn anew `SPLITS` times, at the same thresholds.

    Returns:
        For every kind and budget the part of the other pictures for which the reserve was enough, its mean over the
        splits, and in how many parts of these the binomial's 95 % interval of it ends below `COVERED`.
    """
    assert thresholds.encoder is not None
    full = thresholds.encoder.tokens
    shown = {kind: pictures.calibration + pictures.heldout for kind, pictures in kinds.items()}
    measured = np.array([features(image) for images in shown.values() for image in images])
    of_kind = np.array([kind for kind, images in shown.items() for _ in images])
    everything = [image for images in shown.values() for image in images]
    kept = {budget: np.array(counts(model, processor, thresholds, budget, everything)) for budget in BUDGETS}
    found: dict[tuple[str, int], list[tuple[float, bool]]] = {}
    for split in track(range(SPLITS), description="dividing anew"):
        rng = np.random.default_rng(split)
        to_fit = np.concatenate([_half([*kind.subjects[0], *kind.subjects[1]], rng) for kind in kinds.values()])
        of_fit = {budget: kept[budget][to_fit].tolist() for budget in BUDGETS}
        forecasts = fit(measured[to_fit].tolist(), [full] * int(to_fit.sum()), of_fit)
        assert forecasts is not None
        for budget in BUDGETS:
            reserve = [math.ceil(full * forecasts.at((*row, math.log(full)), budget)[1]) for row in measured]
            enough = kept[budget] <= np.array(reserve)
            for kind in kinds:
                part = share(enough[~to_fit & (of_kind == kind)].astype(np.float64))
                found.setdefault((kind, budget), []).append((part.mean, part.high < COVERED))
    return [
        {
            "kind": kind,
            "budget": budget,
            "enough": round(float(np.mean([part for part, _ in parts])), 3),
            "below": round(float(np.mean([below for _, below in parts])), 3),
        }
        for (kind, budget), parts in found.items()
    ]


def _half(subjects: list[str], rng: np.random.Generator) -> np.ndarray:
    """Which pictures are of the subjects that are drawn until they have half of all."""
    names = rng.permutation(sorted(set(subjects)))
    sizes = np.array([subjects.count(name) for name in names])
    drawn = set(names[np.cumsum(sizes) - sizes / 2 <= len(subjects) / 2])
    return np.array([subject in drawn for subject in subjects])


def judged(thresholds: Thresholds, budget: float, images: list[Image.Image], kept: list[int]) -> dict[str, Any]:
    """Forecasts beside what pictures kept.

    Returns:
        `r2` and `correlation` of the log of counts with that of what was expected; `expected` over `kept`, means both;
        the part of the pictures for which the reserve was enough, with a 95 % interval of the binomial; and what it
        costs, the mean reserve over the mean kept, beside `one_for_all`, the same of one number that is enough for
        `COVERED` of these very pictures.
    """
    told = [thresholds.forecast(image, budget) for image in images]
    expected = np.array([forecast.expected for forecast in told])
    reserve, counted = np.array([forecast.reserve for forecast in told]), np.array(kept)
    logs, fitted = np.log(counted), np.log(expected)
    enough = share((counted <= reserve).astype(np.float64))
    return {
        "kept": round(float(counted.mean()), 2),
        "r2": round(1 - float(np.square(logs - fitted).sum() / np.square(logs - logs.mean()).sum()), 3),
        "correlation": round(float(np.corrcoef(logs, fitted)[0, 1]), 3),
        "expected_over_kept": round(float(expected.mean() / counted.mean()), 3),
        "enough": {end: round(getattr(enough, end), 3) for end in ("mean", "low", "high")},
        "cost": round(float(reserve.mean() / counted.mean()), 3),
        "one_for_all": round(float(np.quantile(counted, COVERED, method="higher") / counted.mean()), 3),
    }


if __name__ == "__main__":
    typer.run(main)
