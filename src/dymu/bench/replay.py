"""Merges recorded on real photos, and a rule that replays them.

A model with random weights merges nonsense: its group shapes, on which time and memory depend, would be those of no
real picture. So the merges of a real encoder (the demo model's DINOv2-S, 576 tokens of a 336 px photo, and 729 of one
of 378 px) were recorded once by `benchmarks/record_merges.py`, and any encoder of as many tokens and at least as many
layers can go through them again.

The recorded encoder has a class token, which counts where tokens are paired: of the patches, those at an odd index are
A. Where a tower has none, its k-th tokens of A and of B stand for the recorded k-th ones, one patch away.

Where a model makes one token of several patches, or its layers attend within windows, nothing of that kind was
recorded. There as many tokens merge as of real photos, and those that the random weights find most similar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from dymu.bench.shapes import file_for, nearest
from dymu.errors import UnsupportedModel
from dymu.merging import Layout, a_count, merge_step, most_similar
from dymu.reducers import Candidates, Reducer
from dymu.schedule import removals
from dymu.token_map import TokenMap

PREFIX = 1
"""Tokens ahead of the patches where merges are recorded."""


@dataclass(frozen=True)
class Recorded:
    """The merges of some photos at some budgets.

    Attributes:
        tokens: of every photo ahead of the first layer, class token not counted.
        layers: of the recorded encoder; all merge.
        photos: names of their files.
        thresholds: at each budget, the similarity per layer that decided.
        into: at each budget, for each photo and layer, int16 [A] as `Reducer.in_layer` answers behind a class token.
    """

    tokens: int
    layers: int
    photos: tuple[str, ...]
    thresholds: Mapping[int, tuple[float, ...]]
    into: Mapping[int, tuple[tuple[np.ndarray, ...], ...]]

    def kept(self, budget: int) -> list[int]:
        """Tokens left of each photo."""
        return [self.tokens - sum(int((layer >= 0).sum()) for layer in photo) for photo in self.into[budget]]

    def merged(self, budget: int, photo: int) -> TokenMap:
        """Of one photo: its tokens to those that are left."""
        layout = Layout.equal(1, PREFIX + self.tokens)
        merged = TokenMap.identity(1, layout.longest)
        for into in self.into[budget][photo]:
            step, layout = merge_step(torch.from_numpy(into.astype(np.int64))[None], layout, PREFIX)
            merged = merged.then(step)
        return merged.drop(PREFIX)

    def budget_near(self, budget: int | float, pictures: int = 1) -> int:
        """The recorded budget, of one photo, for one in tokens, or a fraction of all as a float up to 1.

        Args:
            budget: of an image.
            pictures: that an image is cut into, each merged as a photo was.

        Raises:
            BadBudget: none is within 5 % of it.
        """
        return nearest(self.into, self.tokens, budget, pictures)

    def rule(self, budget: int, photos: Sequence[int]) -> Replay:
        """The rule that merges a batch as these photos were merged, one per image."""
        return Replay(self.tokens, tuple(self.into[budget][photo] for photo in photos))

    def save(self, path: Path) -> None:
        """Write a safetensors file of one int16 tensor for each budget: all photos' layers, one after the other."""
        about = {
            "tokens": self.tokens,
            "layers": self.layers,
            "photos": self.photos,
            "thresholds": {str(budget): values for budget, values in self.thresholds.items()},
        }
        flat = {
            str(budget): np.concatenate([np.concatenate(p) for p in photos]) for budget, photos in self.into.items()
        }
        save_file(flat, path, {"dymu": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> Recorded:
        """Read a file that `save` wrote."""
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["dymu"])
            flat = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        return cls(
            tokens=about["tokens"],
            layers=about["layers"],
            photos=tuple(about["photos"]),
            thresholds={int(budget): tuple(values) for budget, values in about["thresholds"].items()},
            into={
                budget: _cut(values, about["tokens"], about["layers"], len(about["photos"]))
                for budget, values in sorted(flat.items())
            },
        )


@cache
def recorded(tokens: int = 576) -> Recorded:
    """The merges that come with the library for pictures of so many tokens.

    Raises:
        UnsupportedModel: there are none.
    """
    if not file_for(tokens).exists():
        raise UnsupportedModel(f"no merges were recorded for pictures of {tokens} tokens; take a shape with others.")
    return Recorded.load(file_for(tokens))


def _cut(flat: np.ndarray, tokens: int, layers: int, photos: int) -> tuple[tuple[np.ndarray, ...], ...]:
    """Split what `save` joined: a layer has a number for each A token that reaches it.

    Raises:
        ValueError: there are more numbers or fewer, such as those of another pairing.
    """
    start = 0
    cut = []
    for _ in range(photos):
        left, of_photo = tokens, []
        for _ in range(layers):
            layer = flat[start : start + a_count(PREFIX + left, PREFIX)]
            start += len(layer)
            left -= int((layer >= 0).sum())
            of_photo.append(layer)
        cut.append(tuple(of_photo))
    if start != len(flat):
        raise ValueError(f"these are {len(flat)} recorded merges, not {start}; record them anew.")
    return tuple(cut)


@dataclass(frozen=True)
class Replay(Reducer):
    """Repeat recorded merges, one record per image of the batch.

    Over a deeper encoder the recorded layers spread by depth: each merges in the first layer that is as far along, so
    layer l of L in layer ceil((l + 1) / L x layers) - 1. Similarities are computed as always and read, so that matching
    takes its usual time; their values do not matter.

    Args:
        tokens: of every image ahead of the first layer.
        into: for each image and recorded layer, whole numbers [A], see `Recorded`.
    """

    tokens: int
    into: tuple[tuple[np.ndarray, ...], ...]
    _padded: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        recorded_layers = len(self.into[0])
        if layers < recorded_layers or tokens not in (None, self.tokens):
            raise UnsupportedModel(
                f"the recorded merges are of {self.tokens} tokens and {recorded_layers} layers, and do not fit an "
                f"encoder of {tokens} tokens of which {layers} layers are used; take a shape of {self.tokens} tokens "
                f"that uses {recorded_layers} layers or more."
            )

    def recorded_layer(self, layer: int, layers: int) -> int | None:
        """The recorded layer that merges in layer `layer` of `layers`, if any."""
        recorded_layers = len(self.into[0])
        merging = {-(-(index + 1) * layers // recorded_layers) - 1: index for index in range(recorded_layers)}
        return merging.get(layer)

    def in_layer(self, candidates: Candidates) -> Tensor | None:
        self.check_fits(candidates.layers, candidates.tokens[0])
        layer = self.recorded_layer(candidates.layer, candidates.layers)
        if layer is None:
            return None
        similarity, partner, prefix = candidates.similarity, candidates.partner, candidates.prefix
        key = (layer, prefix, partner.device)
        if key not in self._padded:
            padded = torch.full(partner.shape, -1)
            for row, image in zip(padded, self.into, strict=True):
                left = prefix + self.tokens - sum(int((into >= 0).sum()) for into in image[:layer])
                b_count = left - prefix - a_count(left, prefix)
                row[: len(image[layer])] = torch.from_numpy(image[layer].astype(np.int64)).clamp(max=b_count - 1)
            self._padded[key] = padded.to(partner.device)
        return torch.where(similarity > -torch.inf, self._padded[key], -1)


@dataclass(frozen=True)
class KeepAsMany(Reducer):
    """Merge each picture to a number of its own, more in late layers, the most similar tokens by the model's weights.

    Args:
        keep: tokens left of each picture, class token and registers not counted.
    """

    keep: tuple[int, ...]

    def in_layer(self, candidates: Candidates) -> Tensor:
        goals = [
            _left(keep, tokens, candidates.layers)[candidates.layer]
            for keep, tokens in zip(self.keep, candidates.tokens, strict=True)
        ]
        # What windows of an odd number of tokens could not merge is still due.
        kept = candidates.state.map.kept - candidates.prefix
        due = (kept - torch.tensor(goals, device=kept.device)).clamp(min=0)
        return most_similar(due, candidates.similarity, candidates.partner, candidates.picture)


@cache
def _left(keep: int, tokens: int, layers: int) -> list[int]:
    """Tokens of a picture that are left after each layer."""
    removed = removals(tokens, keep, layers, "reverse_linear", alike=True)
    return [round(tokens - gone) for gone in accumulate(removed)]
