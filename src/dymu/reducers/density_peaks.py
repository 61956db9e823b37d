"""Density peaks (SeTok's tokenizer, arXiv 2406.05127, without what it trains): dense tokens far from denser ones gather
the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from dymu.checks import check_fields
from dymu.merging import distances, nearest_of, peaks
from dymu.reducers.faster_vlm import largest
from dymu.reducers.keep import check_finite, check_keep, check_of_items, kept_of, kept_of_rows
from dymu.reducers.reducer import Reduced, Reducer, Shown, Tokens
from dymu.token_map import TokenMap, leaders_of


@dataclass(frozen=True)
class DensityPeaks(Reducer):
    """Of every image or video, tokens that are peaks stand for all that are nearest to them: as their mean.

    How many depends on the picture, unless `keep` says it. The distance is Euclidean, over the root of the channels;
    the authors' program adds sine positions to its features, and noise to tell equal densities apart: here features
    are as they are, and of equal ones the first is denser.

    Args:
        threshold: of what is a peak.
        least: tokens left where none is.
        neighbours: nearest tokens that density is of.
        keep: so many peaks instead; a float up to 1 is a fraction.

    Raises:
        BadBudget: `keep` is not above 0; or in use, more than there are.
        ValueError: `threshold` is no finite number, or `least` or `neighbours` below 1; or `keep` beside the first two.
    """

    threshold: float = 0.5
    least: int = 64
    neighbours: int = 64
    keep: int | float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep is not None:
            check_keep(self)
            if (self.threshold, self.least) != (DensityPeaks.threshold, DensityPeaks.least):
                raise ValueError("DensityPeaks takes either keep, or threshold and least; leave the other out.")
        check_finite(self, "threshold")
        if self.least < 1 or self.neighbours < 1:
            raise ValueError(f"{self} needs at least one token left and one neighbour")

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        if tokens is not None and self.keep is not None:
            kept_of(self.keep, tokens)

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        if self.keep is not None:
            check_of_items(shown, self.keep)

    def in_prompt(self, tokens: Tokens) -> Reduced:
        label = torch.full_like(tokens.map.first(), -1)
        keeps = None if self.keep is None else kept_of_rows(self.keep, tokens)
        for row, count in enumerate(tokens.counts):
            distance = distances(tokens.values(row))
            score = peaks(distance, self.neighbours)
            if keeps is not None:
                centres = largest(score, keeps[row])
            else:
                centres = (score > self.threshold).nonzero()[:, 0]
                centres = centres if len(centres) else largest(score, self.least)
            label[row, :count] = nearest_of(distance, centres)
        return Reduced(TokenMap.from_leaders(leaders_of(label, label.shape[1]), tokens.present))
