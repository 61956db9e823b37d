"""How long the vision encoder takes with DyMU and without, beside how many tokens its layers process.

`python -m benchmarks.encoder clip-l` builds a CLIP-L/336 tower with random weights (`so400m --side 384`: SigLIP's of
that name), `models/demo --side 336` takes the demo model's own. Each is calibrated on composed scenes, then encodes
held-out photos and scenes: untouched, merged, and the layers alone on as many tokens, in turn. The result file holds,
per budget and batch, the medians and

* `count_ratio`, what token counts alone would give: the tokens that every layer of the untouched tower processes, over
  their mean over its layers with DyMU. A layer counts the tokens of its attention as a third, those of its MLP as two
  thirds, as its weights are; a layer that is not run counts none.
* `layers_ratio`, what these layers could reach on so many tokens: untouched, over the layers alone with as many tokens
  in each, equally many in every image, nothing matched, merged or embedded.
* `merge_share`, the part of the time that matching and merging take, and `cosine`, of the features copied back to all
  places with the untouched ones.
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
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    SiglipVisionConfig,
)

import dymu
from benchmarks import record
from dymu.families.resolve import resolve
from dymu.merging import MergedTokens, attention, layout
from scenes.composed import Composed, calibration_images
from scenes.photos import Photos

RANDOM: dict[str, Callable[[int], PreTrainedConfig]] = {
    "clip-l": lambda side: CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=side,
        patch_size=14,
    ),
    "so400m": lambda side: SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=side,
        patch_size=14, vision_use_head=False,
    ),
}  # fmt: skip
"""Towers of a known shape with random weights, for squares of so many pixels."""
FEATURES = {"clip-l": (-2, "default"), "so400m": (-1, "full")}
"""Which layer of each the language model reads, and whether without its first token."""


def main(
    tower: Annotated[str, typer.Argument(help=f"A model's folder; with random weights: {', '.join(RANDOM)}.")],
    side: Annotated[int, typer.Option(help="Pixels of the square that the tower sees.")] = 336,
    batches: Annotated[str, typer.Option(help="Images at a time.")] = "1,4,16",
    budgets: Annotated[str, typer.Option(help="Parts of the tokens to keep.")] = "0.15,0.3",
    calibrated_on: Annotated[int, typer.Option(help="Composed scenes.")] = 24,
    every: Annotated[str, typer.Option(help="Merge in every nth layer, counted from the last.")] = "1",
    buckets: Annotated[str, typer.Option(help="Images that attention takes at a time.")] = str(layout.BUCKET),
    way: Annotated[str, typer.Option(help="How sizes reach the attention: auto, mask or channels.")] = "auto",
    repeats: int = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    name: Annotated[str, typer.Option(help="Of the result file.")] = "encoder",
) -> None:
    """Time every batch at every budget, and write the result file."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load(tower, side)
    model = model.to(device, getattr(torch, dtype)).eval()
    shares = [float(budget) for budget in budgets.split(",")]
    sizes = [int(size) for size in batches.split(",")]
    if way != "auto":
        attention.way_for = lambda _: way  # type: ignore[assignment, return-value]
    depth = max(resolve(model).feature_layers())
    pictures = _pictures(max(sizes))
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(device, getattr(torch, dtype))
    scenes = calibration_images(calibrated_on)
    rows = []
    for nth in (int(nth) for nth in every.split(",")):
        thresholds = dymu.calibrate(model, processor, scenes, shares, merge_layers=range(depth - 1, -1, -nth))
        assert thresholds.encoder is not None
        tokens = thresholds.encoder.tokens
        cases = [(int(bucket), budget, size) for bucket in buckets.split(",") for budget in shares for size in sizes]
        for bucket, budget, size in track(cases, description=f"timing, every {nth}"):
            layout.BUCKET = bucket
            with torch.inference_mode(), dymu.apply(model, thresholds, budget=budget) as handle:
                timed = _timed(model, handle, pixels[:size], repeats)
            rows.append(
                {
                    "every": nth,
                    "bucket": layout.bucket_size(device, size, tokens),
                    "budget": budget,
                    "batch": size,
                    **timed,
                }
            )
    assert thresholds.encoder is not None
    result = {
        "tower": tower,
        "layers": thresholds.encoder.layers,
        "full_tokens": thresholds.encoder.tokens,
        "dtype": dtype,
        "way": way,
        "rows": rows,
    }
    print(record.write(name, result))


def load(tower: str, side: int) -> tuple[Any, Any]:
    """A LLaVA of that tower, and its image processor for squares of `side` pixels."""
    if tower in RANDOM:
        text = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )  # fmt: skip
        layer, strategy = FEATURES[tower]
        config = LlavaConfig(
            vision_config=RANDOM[tower](side), text_config=text, image_token_id=7, vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
        )  # fmt: skip
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
    merged_features, report = _features(model, pixels), handle.last
    lengths = processed(model, handle)

    def untouched() -> None:
        with handle.disabled():
            encode(model, pixels)

    works: dict[str, Callable[[], object]] = {
        "untouched": untouched,
        "dymu": lambda: encode(model, pixels),
        "layers": lambda: _layers_alone(model, len(pixels), lengths),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(1e3 * seconds(work) / len(pixels))
    with handle.disabled():
        cosine = cosine_similarity(merged_features, _features(model, pixels), dim=-1).mean().item()
    shares = []
    for _ in range(repeats):
        with clocked() as spent:
            whole = seconds(works["dymu"])
        shares.append(sum(spent) / whole)
    median = {name: statistics.median(each) for name, each in times.items()}
    ratio = median["untouched"] / median["dymu"]
    count_ratio = counted(model, lengths)
    return {
        "kept": statistics.fmean(report.kept),
        **{f"{name}_ms": value for name, value in median.items()},
        "dymu_least_ms": min(times["dymu"]),
        "dymu_most_ms": max(times["dymu"]),
        "ratio": ratio,
        "count_ratio": count_ratio,
        "of_count_ratio": ratio / count_ratio,
        "layers_ratio": median["untouched"] / median["layers"],
        "merge_share": statistics.median(shares),
        "cosine": cosine,
    }


def processed(model: Any, handle: dymu.Handle) -> list[tuple[float, float]]:
    """Of each layer that runs, the tokens of its attention and of its MLP, the mean over the images."""
    prefix = resolve(model).prefix - int((~handle.last.items[0].patch).sum())
    after = [prefix + statistics.fmean(kept) for kept in handle.last.layers]
    return list(zip([prefix + handle.last.original[0], *after[:-1]], after, strict=True))


def counted(model: Any, lengths: list[tuple[float, float]]) -> float:
    """What so many tokens alone would give: untouched over DyMU, see `count_ratio` above."""
    return lengths[0][0] * len(resolve(model).encoder_layers) / sum((i + 2 * out) / 3 for i, out in lengths)


def _layers_alone(model: Any, images: int, processed: list[tuple[float, float]]) -> None:
    """Run the encoder layers on so many tokens of each of the images."""
    parts = resolve(model)
    parameter = next(parts.tower.parameters())
    x = parameter.new_zeros(images, round(processed[0][0]), parts.width)
    for layer, (into, out) in zip(parts.encoder_layers, processed, strict=False):
        x = x[:, : round(into)]
        x, _ = layer.attend(x, MergedTokens.unmerged(layout.Layout.equal(*x.shape[:2], x.device)))
        x = layer.feed_forward(x[:, : round(out)])


def _features(model: Any, pixels: Tensor) -> Tensor:
    """What the projector is given, copied to all N places, [B, N, C], in float32."""
    projector = resolve(model).projector
    projector.forward = lambda features: features
    try:
        return torch.stack(list(encode(model, pixels).pooler_output)).float()
    finally:
        del projector.forward


def encode(model: Any, pixels: Tensor) -> Any:
    """Encode and project pictures [B, 3, height, width], with DyMU if it is applied."""
    config = model.config
    return model.get_image_features(
        pixels,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        return_dict=True,
    )


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, with what it has the accelerator do."""
    _wait()
    began = perf_counter()
    work()
    _wait()
    return perf_counter() - began


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def clocked() -> Iterator[list[float]]:
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
    MergedTokens.match, MergedTokens.merge = map(clocked, methods)  # type: ignore[method-assign, arg-type]
    try:
        yield spent
    finally:
        MergedTokens.match, MergedTokens.merge = methods  # type: ignore[method-assign]


if __name__ == "__main__":
    typer.run(main)
