"""How many tokens images keep that were not calibrated on, beside the wanted budget.

`python -m benchmarks.kept_tokens models/demo FOLDER` applies `models/demo/thresholds.json` at each of its budgets to
every image of FOLDER.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from benchmarks import record
from dymu.media import images
from dymu.thresholds import Thresholds

BATCH = 10


def main(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL")],
    image_folder: Annotated[Path, typer.Argument(metavar="IMAGES")],
    name: Annotated[str, typer.Option(help="Of the result file.")] = "kept_tokens",
) -> None:
    """Count kept tokens per image at every calibrated budget, and write the result file."""
    thresholds = Thresholds.load(model_folder / "thresholds.json")
    model = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    pictures = [images.load(path).image for path in sorted(image_folder.iterdir())]
    rows = []
    with dymu.apply(model, thresholds, budget=thresholds.budgets[0]) as handle, torch.inference_mode():
        for budget in track(thresholds.budgets, description="budgets"):
            handle.budget = budget
            kept: list[int] = []
            for start in range(0, len(pictures), BATCH):
                pixels = processor.image_processor(images=pictures[start : start + BATCH], return_tensors="pt")
                model.get_image_features(**pixels)
                kept += handle.last.kept
            rows.append(
                {
                    "budget": budget,
                    "mean": statistics.fmean(kept),
                    "sd": statistics.pstdev(kept),
                    "min": min(kept),
                    "max": max(kept),
                }
            )
    full = handle.last.original[0]
    print(record.write(name, {"images": len(pictures), "full_tokens": full, "rows": rows}))


if __name__ == "__main__":
    typer.run(main)
