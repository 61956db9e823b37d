"""What a focus on text gives back of what merging costs reading: the probe and the pages of `experiments.legibility`.

`python -m experiments.legibility_focus` merges held-out pages at several budgets: by DToMe; and with as many tokens
left of every page, with text in focus, which a detector or a test of the pixels finds, or whose patches are known.
The detector needs `pip install 'dymu[text]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

import dymu
from benchmarks import record
from dymu.hooks.focus import InFocus
from dymu.media import masks
from dymu.reducers import FixedMerge, ThresholdMerge
from experiments import RESULTS
from experiments.legibility import (
    GRID,
    PATCH,
    SCHEDULE,
    Materials,
    Network,
    Page,
    Row,
    Setting,
    normalised,
    pages,
    train_probe,
)
from scenes import evaluation_pack
from training.vlm.base import training_pack

BUDGETS = (0.5, 0.3, 0.2, 0.15, 0.1)


def known(page: Page) -> Callable[[Image.Image], np.ndarray]:
    """Finds the patches of all letters of the page."""
    mask = np.zeros((GRID, GRID), np.float32)
    for x, y in page.middles:
        mask[min(int(y // PATCH), GRID - 1), min(int(x // PATCH), GRID - 1)] = 1
    pixels = np.kron(mask, np.ones((PATCH, PATCH), np.float32))
    return lambda _: pixels


def measured(setting: Setting, samples: Sequence[Page]) -> dict[str, Any]:
    """All rows."""

    def processor(images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        return {"pixel_values": normalised(list(images))}

    full = GRID * GRID
    untouched = setting.restored(Row("all tokens"), full, lambda features: features)
    thresholds = dymu.calibrate(
        setting.network.tower.vlm, processor, [page.image for page in samples], BUDGETS, schedule=SCHEDULE
    )
    focuses = {"detector": [InFocus(masks.text)] * len(setting.pages)}
    focuses["strokes"] = [InFocus(masks.strokes)] * len(setting.pages)
    focuses["known letters"] = [InFocus(known(page)) for page in setting.pages]
    guard = [InFocus(masks.strokes)] * len(setting.pages)
    rows = [untouched]
    for budget in thresholds.budgets:
        limits = tuple(thresholds.per_layer(budget))
        dynamic = setting.merged(Row("DToMe", round(budget)), ThresholdMerge(limits))
        rows.append(dynamic)
        for name, focus in focuses.items():
            rules = [FixedMerge(kept, SCHEDULE) for kept in dynamic.kept]
            rows.append(setting.merged(Row(f"focus on {name}", round(budget)), rules, focus))
        least = FixedMerge(budget / full, SCHEDULE)
        rows.append(setting.merged(Row("guard", round(budget)), ThresholdMerge(limits, share=least), guard))
    everything = [np.arange(len(setting.pages))]
    return {"full_tokens": full, "rows": [row.to_json(everything, untouched) for row in rows]}


def main(
    count: Annotated[int, typer.Option("--pages", min=9, help="Held-out pages.")] = 150,
    samples: Annotated[int, typer.Option(min=1, help="Pages to calibrate on.")] = 150,
    learn: Annotated[int, typer.Option(min=10, help="Pages that the probe learns from.")] = 1500,
    passes: Annotated[int, typer.Option(min=1, help="Times that it sees each letter.")] = 15,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "legibility_focus",
) -> None:
    """Train the probe, measure, and write the result file."""
    network, packed = Network.load(), evaluation_pack()
    with torch.no_grad():
        probe, seen = train_probe(network, pages(Materials(training_pack()), "training", learn), passes)
        setting = Setting(network, probe, pages(packed, "heldout", count))
        result = measured(setting, pages(packed, "calibration", samples))
    about = {"pages": count, "calibrated_on": samples, "learned_from": learn, "right_letters_in_known_fonts": seen}
    print(record.write(name, {**about, **result}, RESULTS))


if __name__ == "__main__":
    typer.run(main)
