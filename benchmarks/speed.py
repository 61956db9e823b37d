"""How long a prompt takes with DyMU and without, interleaved.

`python -m benchmarks.speed models/demo examples/photo.jpg` times every calibrated budget against the untouched model.
It first compares the fast attention with the reference, and measures nothing if they differ.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from benchmarks import record
from dymu import images
from dymu.thresholds import Thresholds
from dymu.timing import Times, measure, measure_repeatedly


def main(
    model_folder: Annotated[Path, typer.Argument(metavar="MODEL")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE")],
    question: str = "what is this?",
    repeats: int = 15,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "speed",
) -> None:
    """Time encoder, prefill and decode at every calibrated budget, and write the result file."""
    thresholds = Thresholds.load(model_folder / "thresholds.json")
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = processor(images=[images.load(image).image], text=[text], return_tensors="pt")
    _refuse_if_wrong(model, inputs, thresholds)
    rows = []
    for budget in track(thresholds.budgets, description="budgets"):
        with dymu.apply(model, thresholds, budget=budget) as handle:
            measure(model, inputs)
            with handle.disabled():
                measure(model, inputs)
            merged, untouched = measure_repeatedly(model, inputs, handle, repeats=repeats, limit_s=600)
            fast, full = Times.medians(merged), Times.medians(untouched)
            rows.append(
                {
                    "budget": budget,
                    "kept": handle.last.kept[0],
                    "dymu": asdict(fast),
                    "untouched": asdict(full),
                    "ratio_encoder": fast.encoder_ms / full.encoder_ms,
                    "ratio_prefill": fast.prefill_ms / full.prefill_ms,
                    "ratio_first_token": fast.first_token_ms / full.first_token_ms,
                    "ratio_decode": fast.decode_ms_per_token / full.decode_ms_per_token,
                    "repeats": len(merged),
                }
            )
    full_tokens = handle.last.original[0]
    print(record.write(name, {"image": image.name, "full_tokens": full_tokens, "dtype": "float32", "rows": rows}))


def _refuse_if_wrong(model: Any, inputs: Any, thresholds: Thresholds) -> None:
    """Raises: SystemExit, where the fast backend is not the reference's equal on this very prompt, at any budget."""
    for budget in track(thresholds.budgets, description="comparing with the reference"):
        logits = []
        for backend in ("auto", "reference"):
            with torch.inference_mode(), dymu.apply(model, thresholds, budget=budget, backend=backend):
                logits.append(model(**inputs).logits)
        fast, slow = logits
        error = float((fast - slow).norm() / slow.norm())
        if error > 1e-4:
            raise SystemExit(f"nothing is timed: at a budget of {budget:g} the backend is off by {error:.1e}")


if __name__ == "__main__":
    typer.run(main)
