"""DToMe: what is more alike than a threshold merges, so simple pictures keep fewer tokens (paper section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from dymu.merging import above
from dymu.reducers.reducer import Candidates, Reduced, Reducer, Shown, Stage, Tokens


@dataclass(frozen=True)
class ThresholdMerge(Reducer):
    """In layer l, tokens more similar than `thresholds[l]` merge; and once more where they stand in the prompt.

    A layer whose threshold is above 1 does not merge; nor does one past the end of the list. Layers that the model does
    not read are not run, whatever their threshold.

    Args:
        thresholds: one per encoder layer.
        images, frames: one per round of merging where an image, or the frames of a video, stand in the prompt.
        over_time: similarity above which tokens of neighbouring frames of a video join; None: frames stay apart.
    """

    thresholds: tuple[float, ...]
    images: tuple[float, ...] = ()
    frames: tuple[float, ...] = ()
    over_time: float | None = None

    def __post_init__(self) -> None:
        for name in ("thresholds", "images", "frames"):
            values = tuple(map(float, getattr(self, name)))
            if any(map(math.isnan, values)):
                raise ValueError(f"one of the {name} of ThresholdMerge is no number: {values}")
            object.__setattr__(self, name, values)

    def reduces(self, stage: Stage, shown: Shown) -> bool:
        if stage != "in_prompt":
            return super().reduces(stage, shown)
        over_time = shown.video and self.over_time is not None
        return over_time or any(threshold <= 1 for threshold in self._rounds(shown))

    def in_layer(self, candidates: Candidates) -> Tensor | None:
        threshold = self.thresholds[candidates.layer] if candidates.layer < len(self.thresholds) else 2.0
        return None if threshold > 1 else above(threshold, candidates.similarity, candidates.partner)

    def in_prompt(self, tokens: Tokens) -> Reduced | None:
        rounds = self._rounds(tokens.shown)
        reduced = self._in_rounds(tokens, rounds) if any(threshold <= 1 for threshold in rounds) else None
        if self.over_time is None or not tokens.shown.video:
            return reduced
        if reduced is None:
            return _over_time(tokens, self.over_time)
        left = tokens.then(reduced)
        joined = _over_time(left, self.over_time)
        return Reduced(joined.map, left.features_of(joined)).after(reduced.map)

    def _rounds(self, shown: Shown) -> tuple[float, ...]:
        return self.frames if shown.video else self.images

    def _in_rounds(self, tokens: Tokens, rounds: tuple[float, ...]) -> Reduced:
        by_picture, index = tokens.by_picture()
        merged = by_picture.merge_rounds(rounds)
        return tokens.joined(merged.group, index, merged.x.flatten(0, 1))


def _over_time(tokens: Tokens, threshold: float) -> Reduced:
    by_picture, index = tokens.by_picture()
    frames = [end - start for start, end in pairwise(tokens.first)]
    return tokens.joined(by_picture.over_time(threshold, frames), index)
