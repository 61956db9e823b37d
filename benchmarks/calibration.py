"""How long calibration takes, and how much memory.

`python -m benchmarks.calibration models/demo FOLDER` calibrates one budget of 30 % on the images of FOLDER, shown to
the model's vision tower at 336 px (576 tokens, LLaVA-1.5's grid).
"""

from __future__ import annotations

import resource
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from benchmarks import record


def main(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL")],
    image_folder: Annotated[Path, typer.Argument(metavar="IMAGES")],
    count: Annotated[int, typer.Option(help="How many of the images.")] = 200,
    side: Annotated[int, typer.Option(help="Pixels of the square that the tower sees.")] = 336,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "calibration",
) -> None:
    """Calibrate once and write the result file."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder).float().eval()
    processor = AutoProcessor.from_pretrained(model_folder).image_processor
    processor.size = {"height": side, "width": side}
    paths = sorted(path for path in image_folder.rglob("*") if path.suffix in (".jpg", ".png", ".webp"))[:count]
    began = perf_counter()
    thresholds = dymu.calibrate(model, processor, paths, budgets=[0.3])
    seconds = perf_counter() - began
    assert thresholds.encoder is not None
    measured = {
        "images": thresholds.images,
        "full_tokens": thresholds.encoder.tokens,
        "budget": thresholds.budgets[0],
        "achieved": thresholds.calibrated[0].achieved,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(measured)
    print(record.write(name, measured))


if __name__ == "__main__":
    typer.run(main)
