"""Record how a real encoder merges real photos, for models with random weights to merge alike.

`python -m benchmarks.record_merges models/demo` shows the model's vision tower the library's held-out photos at 336 px
(576 tokens, LLaVA-1.5's grid) and merges in all of its layers. 32 of the photos are recorded, spread evenly from simple
ones to complex ones, and the thresholds are calibrated on the others. It writes merges-576.safetensors in
`src/dymu/bench`. With `--same` it chooses none, and records those that come with the library, `src/dymu/bench/photos`.

`python -m benchmarks.record_merges models/demo --side 378 --photos 20 --budgets 102,182,335` does the same for pictures
of 729 tokens, as a tower of SigLIP's so400m size sees the tiles of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from dymu.bench.replay import Recorded
from dymu.bench.shapes import file_for
from dymu.bench.workload import PHOTOS, spread
from dymu.reducers import Candidates, Reducer, ThresholdMerge
from scenes import evaluation_pack

SORTED_AT = 0.3
"""Photos are told simple from complex at the budget nearest to this part of the tokens."""
SCHEDULE = "reverse_linear"


class Recording(Reducer):
    """Merges in the encoder as another reducer does, and writes down how, for one picture at a time.

    Attributes:
        into: of the last picture, int16 [A] for each layer; a layer that does not merge is written down too.
    """

    def __init__(self, reducer: Reducer) -> None:
        self.reducer = reducer
        self.into: list[np.ndarray] = []

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        self.reducer.check_fits(layers, tokens)

    def in_layer(self, candidates: Candidates) -> Tensor:
        if candidates.layer == 0:
            self.into = []
        into = self.reducer.in_layer(candidates)
        if into is None:
            into = torch.full_like(candidates.partner, -1)
        self.into.append(into[0].numpy().astype(np.int16))
        return into


@torch.inference_mode()
def main(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL")],
    side: Annotated[int, typer.Option(help="Pixels of the square that the tower sees.")] = 336,
    photos: Annotated[int, typer.Option(help="How many are recorded.")] = 32,
    same: Annotated[bool, typer.Option("--same", help="Record the photos that come with the library.")] = False,
    budgets: Annotated[str, typer.Option(help="In tokens.")] = "44,89,173,195,288,432",
) -> None:
    """Calibrate, record, write."""
    model: Any = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).eval()
    model.config.vision_feature_layer = -1  # so that every layer merges
    processor = AutoProcessor.from_pretrained(model_folder).image_processor
    processor.size = {"height": side, "width": side}
    tokens = (side // model.config.vision_config.patch_size) ** 2
    asked = [int(budget) for budget in budgets.split(",")]
    sorted_at = min(asked, key=lambda budget: abs(budget - SORTED_AT * tokens))
    pack = evaluation_pack()
    pictures = {file: pack.picture(file).convert("RGB") for file in sorted(photo.file for photo in pack.photos)}

    def record(files: Sequence[str], reducer: Reducer, what: str) -> tuple[tuple[np.ndarray, ...], ...]:
        recording = Recording(reducer)
        of_photos = []
        with dymu.apply(model, merge=recording):
            for file in track(files, description=what):
                pixels = processor(images=[pictures[file]], return_tensors="pt")["pixel_values"]
                model.get_image_features(pixel_values=pixels)
                of_photos.append(tuple(recording.into))
        return tuple(of_photos)

    def calibrated(files: Sequence[str], budgets: Sequence[int]) -> dict[int, tuple[float, ...]]:
        thresholds = dymu.calibrate(model, processor, [pictures[file] for file in files], budgets, schedule=SCHEDULE)
        return {budget: tuple(thresholds.per_layer(budget)) for budget in budgets}

    def recorded(files: Sequence[str], thresholds: dict[int, tuple[float, ...]]) -> Recorded:
        into = {
            budget: record(files, ThresholdMerge(per_layer), f"recording at {budget}")
            for budget, per_layer in thresholds.items()
        }
        return Recorded(tokens, len(model.model.vision_tower.encoder.layer), tuple(files), thresholds, into)

    if same:
        chosen = [file for file in pictures if (PHOTOS / Path(file).name).exists()]
    else:
        everything = recorded(list(pictures), calibrated(list(pictures), [sorted_at]))
        chosen = [everything.photos[photo] for photo in sorted(spread(everything.kept(sorted_at), photos))]
    others = [file for file in pictures if file not in chosen]
    merges = recorded(chosen, calibrated(others, asked))
    file = file_for(tokens)
    merges.save(file)
    for budget in asked:
        kept = merges.kept(budget)
        print(f"budget {budget}: {np.mean(kept):.1f} ± {np.std(kept):.1f} tokens kept, {min(kept)} to {max(kept)}")
    print(f"{file.name}: {file.stat().st_size:,} bytes; calibrated on {len(others)} other photos")


if __name__ == "__main__":
    typer.run(main)
