"""Record how a real encoder merges real photos, for models with random weights to merge alike.

`python -m benchmarks.record_merges models/demo` shows the model's vision tower the library's held-out photos at 336 px
(576 tokens, LLaVA-1.5's grid) and merges in all of its layers. 32 of the photos are recorded, spread evenly from simple
ones to complex ones, and the thresholds are calibrated on the others. It writes `src/dymu/bench/merges.safetensors`.
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
from dymu.bench.replay import FILE, Recorded
from dymu.bench.subject import spread
from dymu.merging import Chooser, MergeRule, ThresholdMerge
from dymu.tasks.scenes import evaluation_pack

BUDGETS = (44, 89, 173, 195, 288, 432)
PHOTOS = 32
SORTED_AT = 173
"""The budget at which photos are told simple from complex."""
SIDE_PX, TOKENS = 336, 576
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
def main(model_folder: Annotated[Path, typer.Argument(metavar="MODEL")]) -> None:
    """Calibrate, record, write."""
    model: Any = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).eval()
    model.config.vision_feature_layer = -1  # so that every layer merges
    processor = AutoProcessor.from_pretrained(model_folder).image_processor
    processor.size = {"height": SIDE_PX, "width": SIDE_PX}
    pack = evaluation_pack()
    pictures = {file: pack.picture(file).convert("RGB") for file in sorted(photo.file for photo in pack.photos)}

    def record(files: Sequence[str], rule: MergeRule, what: str) -> tuple[tuple[np.ndarray, ...], ...]:
        recording = Recording(rule)
        photos = []
        with dymu.apply(model, merge=recording):
            for file in track(files, description=what):
                pixels = processor(images=[pictures[file]], return_tensors="pt")["pixel_values"]
                model.get_image_features(pixel_values=pixels)
                photos.append(tuple(recording.into))
        return tuple(photos)

    def calibrated(files: Sequence[str], budgets: Sequence[int]) -> dict[int, tuple[float, ...]]:
        found = dymu.calibrate(model, processor, [pictures[file] for file in files], budgets, schedule=SCHEDULE)
        return {budget: tuple(found.per_layer(budget)) for budget in budgets}

    def recorded(files: Sequence[str], thresholds: dict[int, tuple[float, ...]]) -> Recorded:
        into = {
            budget: record(files, ThresholdMerge(per_layer), f"recording at {budget}")
            for budget, per_layer in thresholds.items()
        }
        return Recorded(TOKENS, len(model.model.vision_tower.encoder.layer), tuple(files), thresholds, into)

    everything = recorded(list(pictures), calibrated(list(pictures), [SORTED_AT]))
    chosen = [everything.photos[photo] for photo in sorted(spread(everything.kept(SORTED_AT), PHOTOS))]
    others = [file for file in pictures if file not in chosen]
    found = recorded(chosen, calibrated(others, BUDGETS))
    found.save(FILE)
    for budget in BUDGETS:
        kept = found.kept(budget)
        print(f"budget {budget}: {np.mean(kept):.1f} ± {np.std(kept):.1f} tokens kept, {min(kept)} to {max(kept)}")
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes; calibrated on {len(others)} other photos")


if __name__ == "__main__":
    typer.run(main)
