"""Record how a real encoder merges real photos, for models with random weights to merge alike.

`python -m benchmarks.record_merges models/demo` shows the model's vision tower the library's held-out photos at 336 px
(576 tokens, LLaVA-1.5's grid) and merges in all of its layers. 32 of the photos are recorded, spread evenly from simple
ones to complex ones, and the thresholds are calibrated on the others. It writes merges-576.safetensors in
`src/dymu/bench`.

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
from dymu.bench.replay import Recorded, file_for
from dymu.bench.subject import spread
from dymu.merging import Chooser, MergeRule, ThresholdMerge
from dymu.tasks.scenes import evaluation_pack

SORTED_AT = 0.3
"""Photos are told simple from complex at the budget nearest to this part of the tokens."""
SCHEDULE = "reverse_linear"


class Recording:
    """A rule that writes down what another one chooses, for one picture at a time."""

    def __init__(self, rule: MergeRule) -> None:
        self.rule = rule
        self.into: list[np.ndarray] = []

    def choosers(self, tokens: int, layers: int) -> Sequence[Chooser]:
        """See `MergeRule`; a layer that does not merge is written down too."""
        self.into = []
        return [self._recorded(chooser) for chooser in self.rule.choosers(tokens, layers)]

    def _recorded(self, chooser: Chooser | None) -> Chooser:
        def choose(similarity: Tensor, partner: Tensor) -> Tensor:
            into = torch.full_like(partner, -1) if chooser is None else chooser(similarity, partner)
            self.into.append(into[0].numpy().astype(np.int16))
            return into

        return choose


@torch.inference_mode()
def main(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL")],
    side: Annotated[int, typer.Option(help="Pixels of the square that the tower sees.")] = 336,
    photos: Annotated[int, typer.Option(help="How many are recorded.")] = 32,
    budgets: Annotated[str, typer.Option(help="In tokens.")] = "44,89,173,195,288,432",
) -> None:
    """Calibrate, record, write."""
    model: Any = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).eval()
    model.config.vision_feature_layer = -1  # so that every layer merges
    processor = AutoProcessor.from_pretrained(model_folder).image_processor
    processor.size = {"height": side, "width": side}
    tokens = (side // model.config.vision_config.patch_size) ** 2
    wanted = [int(budget) for budget in budgets.split(",")]
    sorted_at = min(wanted, key=lambda budget: abs(budget - SORTED_AT * tokens))
    pack = evaluation_pack()
    pictures = {file: pack.picture(file).convert("RGB") for file in sorted(photo.file for photo in pack.photos)}

    def record(files: Sequence[str], rule: MergeRule, what: str) -> tuple[tuple[np.ndarray, ...], ...]:
        recording = Recording(rule)
        found = []
        with dymu.apply(model, merge=recording):
            for file in track(files, description=what):
                pixels = processor(images=[pictures[file]], return_tensors="pt")["pixel_values"]
                model.get_image_features(pixel_values=pixels)
                found.append(tuple(recording.into))
        return tuple(found)

    def calibrated(files: Sequence[str], budgets: Sequence[int]) -> dict[int, tuple[float, ...]]:
        found = dymu.calibrate(model, processor, [pictures[file] for file in files], budgets, schedule=SCHEDULE)
        return {budget: tuple(found.per_layer(budget)) for budget in budgets}

    def recorded(files: Sequence[str], thresholds: dict[int, tuple[float, ...]]) -> Recorded:
        into = {
            budget: record(files, ThresholdMerge(per_layer), f"recording at {budget}")
            for budget, per_layer in thresholds.items()
        }
        return Recorded(tokens, len(model.model.vision_tower.encoder.layer), tuple(files), thresholds, into)

    everything = recorded(list(pictures), calibrated(list(pictures), [sorted_at]))
    chosen = [everything.photos[photo] for photo in sorted(spread(everything.kept(sorted_at), photos))]
    others = [file for file in pictures if file not in chosen]
    found = recorded(chosen, calibrated(others, wanted))
    file = file_for(tokens)
    found.save(file)
    for budget in wanted:
        kept = found.kept(budget)
        print(f"budget {budget}: {np.mean(kept):.1f} ± {np.std(kept):.1f} tokens kept, {min(kept)} to {max(kept)}")
    print(f"{file.name}: {file.stat().st_size:,} bytes; calibrated on {len(others)} other photos")


if __name__ == "__main__":
    typer.run(main)
