"""ToMe (arXiv 2210.09461): as many tokens are left as were asked for, whatever a picture shows."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from dymu.checks import whole_numbers
from dymu.choices import Schedule
from dymu.merging import most_similar
from dymu.reducers.keep import check_keep, check_of_images, in_tokens, is_part, kept_of
from dymu.reducers.reducer import Candidates, Reduced, Reducer, Shown, SomeMerge, Stage, Tokens
from dymu.schedule import fewest, removals, shares


@dataclass(frozen=True)
class FixedMerge(Reducer):
    """Plain ToMe: in every layer so many of the most similar tokens merge.

    What the layers leave beyond the number merges at the end, the most similar tokens first: of windows in which too
    few have a partner, of tiles, whose padding the language model never gets, of shrunk images and pooled frames.

    Args:
        keep: tokens left of each image and each frame of a video, class token and registers not counted; a float up to
            1 is a fraction of its own. An image that is cut into tiles keeps so many in all.
        schedule: how the merges spread over the layers; ToMe's own is `constant`, or its inflection, a number from -1
            (more in early layers) to 1 (more in late ones).
        layers: indices of the encoder layers that merge; None: all.

    Raises:
        BadBudget: `keep` is not above 0; or in use, above what an image has.
        ValueError: `schedule` is unknown, or `layers` is empty or holds a negative index.
    """

    keep: int | float
    schedule: Schedule | float = "constant"
    layers: tuple[int, ...] | None = None
    focuses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self)
        if self.layers is not None:
            object.__setattr__(self, "layers", whole_numbers(self, "layers"))
        shares(self.schedule, 1)  # ValueError where there is no such
        if self.layers is not None and not (len(self.layers) and min(self.layers) >= 0):
            raise ValueError(f"FixedMerge cannot merge in layers {self.layers}; name some, counted from 0")

    def check_fits(self, layers: int, tokens: int | None = None) -> None:
        beyond = [] if self.layers is None else [index for index in self.layers if index >= layers]
        if beyond:
            raise ValueError(
                f"FixedMerge cannot merge in layers {beyond}, since only 0 to {layers - 1} feed this model; "
                "name some of those."
            )
        if tokens is not None:
            kept_of(self.keep, tokens)

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        check_of_images(shown, images, self.keep, exactly=True)

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        if stage in ("after_encoder", "in_prompt"):
            return (stage == "after_encoder") == shown.single
        return super().reduces(stage, shown)

    def in_layer(self, candidates: Candidates) -> Tensor | SomeMerge | None:
        counts = [planned[candidates.layer] for planned in self.planned(candidates)]
        if not any(counts):
            return None
        due = torch.tensor(counts, device=candidates.keys.device)
        into = most_similar(due, candidates.similarity, candidates.partner, candidates.picture)
        return into if all(counts) else SomeMerge(into, (due == 0)[candidates.picture])

    def planned(self, candidates: Candidates) -> list[list[int]]:
        """For each picture, how many tokens every layer merges."""
        shown = candidates.shown
        if shown.single:
            keeps = [self.kept_of(tokens) for tokens in candidates.tokens]
        else:  # what is rounded up here merges in the prompt
            parts = [self.keep] * len(candidates.tokens)
            if not is_part(self.keep):
                part = [self.kept_of(tokens) / max(tokens, 1) for tokens in shown.image_tokens]
                parts = [part[image] for image in shown.image]
            keeps = [math.ceil(part * tokens) for part, tokens in zip(parts, candidates.tokens, strict=True)]
        return [
            _counts(keep, tokens, candidates.layers, self.schedule, self.layers)
            for keep, tokens in zip(keeps, candidates.tokens, strict=True)
        ]

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        return tokens.merge_to([self.kept_of(count) for count in tokens.shown.image_tokens])

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        return tokens.merge_to([self.kept_of(count) for count in tokens.shown.image_tokens], exactly=True)

    def kept_of(self, tokens: int) -> int:
        """Of an image of so many; all of one that has fewer than asked for, which `check_shown` refuses."""
        return min(max(round(in_tokens(self.keep, tokens)), 1), tokens)


@cache
def _counts(
    keep: int, tokens: int, layers: int, schedule: Schedule | float, merging: tuple[int, ...] | None
) -> list[int]:
    """How many of a picture's tokens each layer merges, of those that should; halving them leaves more in some."""
    keep = max(keep, math.ceil(fewest(tokens, layers if merging is None else len(merging), alike=True)))
    counts: list[int] = []
    left, due = tokens, 0.0
    for removed in removals(tokens, keep, layers, schedule, merging, alike=True):
        due += removed
        counts.append(min(round(due) - (tokens - left), left // 2))
        left -= counts[-1]
    return counts
