"""What half precision changes of merging, and where.

`python -m experiments.half_precision` merges the photos that come with the library in the demo model's tower: in
float32, in half precision, in half precision with the keys that decide computed in float32, and in float32 with pixels
that differ by a thousandth. docs/encoder.md quotes what it prints.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForImageTextToText, AutoProcessor

import dymu
from dymu.bench.workload import PHOTOS
from dymu.families.resolve import resolve
from dymu.media.images import load
from dymu.merging import EncoderLayer, Layout, MergedTokens, above
from dymu.merging.match import best_partner, similarity_metric

MODEL, BUDGETS = "models/demo", (38, 77)


@contextmanager
def keys_in_float32() -> Iterator[None]:
    """Within it, the norm and the key projection that decide are computed once more, in float32."""
    attend = EncoderLayer.attend

    def attending(self: EncoderLayer, x: Tensor, state: MergedTokens, *more: Any) -> tuple[Tensor, Tensor]:
        update, _ = attend(self, x, state, *more)
        norm, key = (copy.deepcopy(module).float() for module in (self.norm1, self.projections[1]))
        return update, key(norm(x.float())).unflatten(-1, (self.heads, -1))

    EncoderLayer.attend = attending  # type: ignore[method-assign]
    try:
        yield
    finally:
        EncoderLayer.attend = attend  # type: ignore[method-assign]


def encoded(
    model: Any, pictures: list[Tensor], thresholds: dymu.Thresholds, budget: int
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Of each picture the features [N, C], the group of each token, and the tokens kept."""
    features, groups, kept = list[Tensor](), list[Tensor](), list[int]()
    with dymu.apply(model, thresholds, budget=budget) as handle:
        for pixels in pictures:
            features.append(model.get_image_features(pixels.to(model.dtype)).pooler_output[0].float())
            groups.append(handle.last.group(0))
            kept += handle.last.kept
    return features, groups, kept


def same(one: Tensor, other: Tensor) -> float:
    """The part of the tokens whose group holds the same tokens in both."""
    return ((one[:, None] == one) == (other[:, None] == other)).all(1).float().mean().item()


def by_layer(model: Any, half: Any, pictures: list[Tensor], thresholds: tuple[float, ...]) -> list[float]:
    """Of each layer, the part of its merges that half precision makes too if all merges before it were the same."""
    parts, others = resolve(model), resolve(half)
    agreed: list[list[float]] = [[] for _ in thresholds]
    for pixels in pictures:
        x, y = parts.tower.embeddings(pixels), others.tower.embeddings(pixels.to(half.dtype))
        state = MergedTokens.unmerged(Layout.equal(*x.shape[:2], x.device))
        for index, threshold in enumerate(thresholds):
            layer, other = parts.encoder_layers[index], others.encoder_layers[index]
            (x, key), (y, other_key) = layer.attend(x, state), other.attend(y, state)
            into, instead = (
                above(threshold, *best_partner(similarity_metric(keys), state.layout, parts.prefix))
                for keys in (key, other_key)
            )
            either = (into >= 0) | (instead >= 0)
            if bool(either.any()):
                agreed[index].append((into == instead)[either].float().mean().item())
            y, _ = state.merge(y, into, parts.prefix)
            x, state = state.merge(x, into, parts.prefix)
            x, y = layer.feed_forward(x), other.feed_forward(y)
    return [fmean(layer) for layer in agreed if layer]


@torch.inference_mode()
def main() -> None:
    """Print a line for every budget and way to compute."""
    model: Any = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(MODEL).image_processor
    photos = [load(path).image for path in sorted(PHOTOS.iterdir()) if path.suffix != ".md"]
    pictures = [processor(images=[photo], return_tensors="pt")["pixel_values"] for photo in photos]
    thresholds = dymu.calibrate(model, processor, photos, BUDGETS)
    untouched = [model.get_image_features(pixels).pooler_output[0] for pixels in pictures]
    halves = [copy.deepcopy(model).to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    noise = torch.Generator().manual_seed(0)
    noisy = [pixels * (1 + 1e-3 * torch.randn(pixels.shape, generator=noise)) for pixels in pictures]
    for half in halves:
        agreed = by_layer(model, half, pictures, thresholds.at(BUDGETS[-1]).thresholds)
        print(f"{half.dtype}, budget {BUDGETS[-1]}, the same merges, layer by layer:", *(f"{a:.1%}" for a in agreed))
    for budget in BUDGETS:
        expected = encoded(model, pictures, thresholds, budget)
        rows = {"float32": expected, "float32, pixels 0.1 % off": encoded(model, noisy, thresholds, budget)}
        for half in halves:
            rows[str(half.dtype)] = encoded(half, pictures, thresholds, budget)
            with keys_in_float32():
                rows[f"{half.dtype}, keys in float32"] = encoded(half, pictures, thresholds, budget)
        for name, (features, groups, kept) in rows.items():
            group = fmean(map(same, groups, expected[1]))
            off = sum(one != other for one, other in zip(kept, expected[2], strict=True))
            cosine = fmean(
                cosine_similarity(*pair, dim=-1).mean().item() for pair in zip(features, untouched, strict=True)
            )
            print(
                f"budget {budget}, {name}: kept {fmean(kept):.1f}, another count for {off} of {len(kept)}, "
                f"{group:.0%} in the same group, cosine with the untouched features {cosine:.4f}"
            )


if __name__ == "__main__":
    main()
