"""How long the vision encoder takes with DyMU and without, beside how many tokens its layers process.

`python -m benchmarks.encoder clip-l` builds a CLIP-L/336 tower with random weights, `models/demo --side 336` takes the
demo model's own. Each is calibrated on composed scenes, then encodes held-out photos and scenes, untouched and merged
in turn. A result file holds every median.

`count ratio` is what the token counts alone would give: the tokens that every layer of the untouched tower processes,
over their mean over its layers with DyMU, where a layer counts the tokens of its attention as a third and those of its
MLP as two thirds, as its weights are, and a layer that is not run counts none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.progress import track
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import dymu
from benchmarks import record
from dymu.families import FAMILIES, resolve
from dymu.merging import MergedTokens
from dymu.tasks.composed import Composed, calibration_images
from dymu.tasks.photos import Photos

RANDOM = "clip-l"


def main(
    tower: Annotated[str, typer.Argument(help=f"A model's folder, or {RANDOM} for that shape with random weights.")],
    side: Annotated[int, typer.Option(help="Pixels of the square that the tower sees.")] = 336,
    batches: Annotated[str, typer.Option(help="Images at a time.")] = "1,4,16",
    budgets: Annotated[str, typer.Option(help="Parts of the tokens to keep.")] = "0.15,0.3",
    calibrated_on: Annotated[int, typer.Option(help="Composed scenes.")] = 24,
    repeats: int = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    name: Annotated[str, typer.Option(help="Of the result file.")] = "encoder",
) -> None:
    """Time every batch at every budget, and write the result file."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = _load(tower, side)
    model = model.to(device, getattr(torch, dtype)).eval()
    wanted = [float(budget) for budget in budgets.split(",")]
    sizes = [int(size) for size in batches.split(",")]
    thresholds = dymu.calibrate(model, processor, calibration_images(calibrated_on), wanted)
    assert thresholds.encoder is not None
    pictures = _pictures(max(sizes))
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(device, getattr(torch, dtype))
    rows = []
    for budget, size in track([(budget, size) for budget in wanted for size in sizes], description="timing"):
        with torch.inference_mode(), dymu.apply(model, thresholds, budget=budget) as handle:
            rows.append({"budget": budget, "batch": size, **_timed(model, handle, pixels[:size], repeats)})
    found = {
        "tower": tower,
        "layers": thresholds.encoder.layers,
        "full_tokens": thresholds.encoder.tokens,
        "dtype": dtype,
        "rows": rows,
    }
    print(record.write(name, found))


def _load(tower: str, side: int) -> tuple[Any, Any]:
    """A LLaVA of that tower, and its image processor for squares of `side` pixels."""
    if tower == RANDOM:
        text = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )  # fmt: skip
        vision = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=side,
            patch_size=14,
        )  # fmt: skip
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=7, vision_feature_layer=-2)
        return LlavaForConditionalGeneration(config), CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
    processor = AutoProcessor.from_pretrained(Path(tower)).image_processor
    processor.size = {"height": side, "width": side}
    return AutoModelForImageTextToText.from_pretrained(Path(tower)), processor


def _pictures(count: int) -> list[Image.Image]:
    """Held-out photos and scenes in turn."""
    tasks: tuple[Any, Any] = (Photos(), Composed())
    return [tasks[index % 2][index // 2].images[0] for index in range(count)]


def _timed(model: Any, handle: dymu.Handle, pixels: Tensor, repeats: int) -> dict[str, Any]:
    """Milliseconds per image, and how they compare with the token counts."""
    untouched: list[float] = []
    merged: list[float] = []
    _encode(model, pixels)
    for turn in range(repeats):
        for times in (untouched, merged)[:: 1 if turn % 2 else -1]:
            if times is merged:
                times.append(_seconds(lambda: _encode(model, pixels)))
            else:
                with handle.disabled():
                    times.append(_seconds(lambda: _encode(model, pixels)))
    prefix, processed = _processed(model, handle)
    with _clocked() as spent:
        whole = _seconds(lambda: _encode(model, pixels))
    ratio = statistics.median(untouched) / statistics.median(merged)
    full = prefix + handle.last.original[0]
    per_image = 1e3 / len(pixels)
    return {
        "kept": statistics.fmean(handle.last.kept),
        "untouched_ms": per_image * statistics.median(untouched),
        "dymu_ms": per_image * statistics.median(merged),
        "dymu_least_ms": per_image * min(merged),
        "dymu_most_ms": per_image * max(merged),
        "ratio": ratio,
        "count_ratio": full / processed,
        "of_count_ratio": ratio * processed / full,
        "merge_share": sum(spent) / whole,
    }


def _processed(model: Any, handle: dymu.Handle) -> tuple[int, float]:
    """Tokens ahead of the image's, and the mean over images and layers of the tokens that a layer processes."""
    parts = resolve(model, FAMILIES)
    prefix = parts.prefix - handle.last.prefix
    after = [prefix + statistics.fmean(kept) for kept in handle.last.layers]
    before = [prefix + handle.last.original[0], *after[:-1]]
    tokens = sum((into + 2 * out) / 3 for into, out in zip(before, after, strict=True))
    return prefix, tokens / len(parts.encoder_layers)


def _encode(model: Any, pixels: Tensor) -> Any:
    config = model.config
    return model.get_image_features(
        pixels,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )


def _seconds(work: Callable[[], object]) -> float:
    _wait()
    began = perf_counter()
    work()
    _wait()
    return perf_counter() - began


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def _clocked() -> Iterator[list[float]]:
    """Seconds of every match and every merge meanwhile."""
    spent: list[float] = []

    def clocked(method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            _wait()
            began = perf_counter()
            try:
                return method(*args)
            finally:
                _wait()
                spent.append(perf_counter() - began)

        return timed

    methods = MergedTokens.match, MergedTokens.merge
    MergedTokens.match, MergedTokens.merge = map(clocked, methods)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        MergedTokens.match, MergedTokens.merge = methods  # type: ignore[method-assign]


if __name__ == "__main__":
    typer.run(main)
