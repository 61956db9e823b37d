"""What guarding text does to what pictures keep, and to answers about photos.

`python -m experiments.guard models/demo` counts what held-out pictures of every kind keep by the demo model's own
thresholds, with and without `guard="text"`, and how many questions about photos get the untouched model's answer. Needs
what `experiments.forecast` needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from benchmarks import record
from dymu.evaluation.summary import share
from dymu.prompting import generate, inputs_for
from experiments import RESULTS
from experiments.forecast import BATCH, KINDS
from scenes.photos import Photos

BUDGETS = (38, 77)
NEW_TOKENS = 8


def main(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL")],
    count: Annotated[int, typer.Option(min=1, help="Pictures of each kind.")] = 150,
    questions: Annotated[int, typer.Option(min=1, help="About photos.")] = 200,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "guard",
) -> None:
    """Measure, and write the result file."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder).float().eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    kinds = {kind: make(count).heldout for kind, make in KINDS.items()}
    task = Photos()
    asked = [(task[number].images, task[number].question) for number in range(min(questions, len(task)))]
    rows = []
    with dymu.apply(model, model_folder, budget=BUDGETS[0]) as handle, torch.inference_mode():
        with handle.disabled():
            untouched = _answers(model, processor, asked)
        for budget in BUDGETS:
            for guard in (None, "text"):
                handle.set_budget(budget)
                handle.set_focus(guard=guard)  # type: ignore[arg-type]
                kept: dict[str, list[int]] = {kind: [] for kind in kinds}
                for kind, pictures in kinds.items():
                    for start in track(range(0, count, BATCH), f"{budget} {kind}"):
                        pixels = processor.image_processor(images=pictures[start : start + BATCH], return_tensors="pt")
                        model.get_image_features(**pixels)
                        kept[kind] += handle.last.kept
                same = [
                    mine == theirs for mine, theirs in zip(_answers(model, processor, asked), untouched, strict=True)
                ]
                agreement = share(np.array(same, dtype=np.float64))
                rows.append(
                    {
                        "budget": budget,
                        "guard": guard,
                        "kept": {kind: float(np.mean(counts)) for kind, counts in kept.items()},
                        "least": {kind: min(counts) for kind, counts in kept.items()},
                        "photos_same_answer": {end: getattr(agreement, end) for end in ("mean", "low", "high")},
                    }
                )
    print(
        record.write(
            name, {"model": model_folder.name, "pictures": count, "questions": len(asked), "rows": rows}, RESULTS
        )
    )


def _answers(model: Any, processor: Any, asked: list[Any]) -> list[str]:
    answers = list[str]()
    for start in range(0, len(asked), BATCH):
        answers += generate(model, processor, inputs_for(model, processor, asked[start : start + BATCH]), NEW_TOKENS)[0]
    return answers


if __name__ == "__main__":
    typer.run(main)
