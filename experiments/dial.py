"""How well budgets between the calibrated ones are met, and how often a lower one keeps more of a picture.

`python -m experiments.dial models/demo` calibrates the default grid on each kind of picture, and counts what held-out
pictures keep at budgets on the grid and halfway between, in the geometric sense. Needs what `experiments.forecast`
needs.
"""

from __future__ import annotations

from itertools import pairwise
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
from experiments import RESULTS
from experiments.forecast import BATCH, KINDS

STEPS = {"2.4 %": 1, "4.9 %": 2, "10 %": 4, "21 %": 8}
"""By how much budgets differ that are compared: so many steps of the fine scale."""
FINE = (0.16, 0.4, 39)
"""The fine scale, in parts of all tokens: its ends, and steps."""


def main(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL")],
    count: Annotated[int, typer.Option(min=20, help="Pictures of each kind to calibrate on, and held out.")] = 200,
    fine: Annotated[
        int, typer.Option(min=5, help="Held-out pictures of each kind at the budgets of the fine scale.")
    ] = 60,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "dial",
) -> None:
    """Measure every kind and write the result file."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder).float().eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    kinds = {}
    for kind, make in KINDS.items():
        shown = make(count)
        kinds[kind] = _measured(model, processor, shown.calibration, shown.heldout, fine, kind)
        print(record.write(name, {"model": model_folder.name, "pictures": count, "kinds": kinds}, RESULTS))


def _measured(
    model: Any, processor: Any, samples: list[Image.Image], heldout: list[Image.Image], fine: int, kind: str
) -> dict[str, Any]:
    thresholds = dymu.calibrate(model, processor, samples)
    full = thresholds.budgets[-1]
    between = [float((lower * upper) ** 0.5) for lower, upper in pairwise(thresholds.budgets)]
    scale = [float(part * full) for part in np.geomspace(*FINE[:2], FINE[2] + 1)]

    def kept(budgets: list[float], pictures: list[Image.Image]) -> np.ndarray:
        """[budgets, pictures]"""
        batches = [
            processor.image_processor(images=pictures[start : start + BATCH], return_tensors="pt")
            for start in range(0, len(pictures), BATCH)
        ]
        rows = []
        with dymu.apply(model, thresholds, budget=full) as handle, torch.inference_mode():
            for budget in track(budgets, kind):
                handle.budget, counts = budget, []
                for pixels in batches:
                    model.get_image_features(**pixels)
                    counts += handle.last.kept
                rows.append(counts)
        return np.array(rows)

    on_grid, halfway = kept(thresholds.budgets, heldout).mean(1), kept(between, heldout).mean(1)
    # What pictures of the same kind that calibration did not see keep beside the budget is chance, as on the grid.
    chance = on_grid / thresholds.budgets
    expected = [(lower * upper) ** 0.5 for lower, upper in pairwise(chance)]
    steps = kept(scale, heldout[:fine])
    return {
        "dials": [len(entry.dial) for entry in thresholds.calibrated],
        "budgets": thresholds.budgets,
        "kept_over_budget": chance.tolist(),
        "between": between,
        "between_kept_over_budget": (halfway / between).tolist(),
        "between_less_chance": (halfway / between / expected - 1).tolist(),
        "lower_keeps_more": {
            step: float((np.diff(steps[::stride], axis=0) < 0).mean()) for step, stride in STEPS.items()
        },
    }


if __name__ == "__main__":
    typer.run(main)
