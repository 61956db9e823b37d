"""DToMe: what is more alike than a threshold merges, so simple pictures keep fewer tokens (paper section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from dymu.merging import above
from dymu.reducers.keep import check_keep, check_of_images, in_tokens
from dymu.reducers.reducer import Candidates, Reduced, Reducer, Shown, Stage, Tokens
from dymu.reducers.tome import FixedMerge


@dataclass(frozen=True)
class ThresholdMerge(Reducer):
    """In layer l, tokens more similar than `thresholds[l]` merge; and once more where they stand in the prompt.

    A layer whose threshold is above 1 does not merge; nor does one past the end of the list. Layers that the model does
    not read are not run, whatever their threshold.

    Args:
        thresholds: one per encoder layer.
        images, frames: one per round of merging where an image, or the frames of a video, stand in the prompt.
        over_time: similarity above which tokens of neighbouring frames of a video join; None: frames stay apart.
        at_most: tokens that an image, or a frame of a video, keeps at most; a float up to 1 is a fraction of its own.
            Where more are left of one, its most similar ones merge on at the end, and nothing changes for others.
        share: what merges to the part of each picture that the thresholds keep of all; for pictures with something in
            focus, or guarded.

    Raises:
        BadBudget: `at_most` is not above 0; or in use, below the tiles of an image.
    """

    thresholds: tuple[float, ...]
    images: tuple[float, ...] = ()
    frames: tuple[float, ...] = ()
    over_time: float | None = None
    at_most: int | float | None = None
    share: FixedMerge | None = None
    focuses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("thresholds", "images", "frames"):
            values = tuple(map(float, getattr(self, name)))
            if any(map(math.isnan, values)):
                raise ValueError(f"one of the {name} of ThresholdMerge is no number: {values}")
            object.__setattr__(self, name, values)
        if self.at_most is not None:
            check_keep(self, "at_most")

    def check_shown(self, shown: Shown, images: Collection[int] | None = None) -> None:
        if self.at_most is not None:
            check_of_images(shown, images, self.at_most)

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        caps = self.at_most is not None and (stage == "after_encoder") == shown.single
        if stage == "after_encoder":
            return caps
        if stage == "in_prompt":
            over_time = shown.video and self.over_time is not None
            return caps or over_time or any(threshold <= 1 for threshold in self._rounds(shown))
        return super().reduces(stage, shown)

    def in_layer(self, candidates: Candidates) -> Tensor | None:
        threshold = self.thresholds[candidates.layer] if candidates.layer < len(self.thresholds) else 2.0
        return None if threshold > 1 else above(threshold, candidates.similarity, candidates.partner)

    def after_encoder(self, tokens: Tokens) -> Reduced | None:
        assert self.at_most is not None
        return tokens.merge_to([max(int(in_tokens(self.at_most, count)), 1) for count in tokens.shown.image_tokens])

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        steps: list[Callable[[Tokens], Reduced | None]] = []
        rounds = self._rounds(tokens.shown)
        if any(threshold <= 1 for threshold in rounds):
            steps.append(partial(_in_rounds, rounds))
        if self.at_most is not None and not tokens.shown.single:
            steps.append(self.after_encoder)
        if self.over_time is not None and tokens.shown.video:
            steps.append(partial(_over_time, self.over_time))
        return tokens.reduced(steps)

    def _rounds(self, shown: Shown) -> tuple[float, ...]:
        return self.frames if shown.video else self.images


def _in_rounds(rounds: tuple[float, ...], tokens: Tokens) -> Reduced:
    by_picture, index, _ = tokens.by_picture()
    merged = by_picture.merge_rounds(rounds)
    return tokens.joined(merged.group, index, merged.x.flatten(0, 1))


def _over_time(threshold: float, tokens: Tokens) -> Reduced:
    by_picture, index, _ = tokens.by_picture()
    frames = [end - start for start, end in pairwise(tokens.first)]
    return tokens.joined(by_picture.over_time(threshold, frames), index)
