"""Merging once more, where tokens stand in the prompt.

A family that shrinks a large image or pools the frames of a video takes means over neighbouring tokens of the encoder.
Nearly all of these means differ, even of merged tokens: of 169 tokens pooled from 576 that had merged to 87, some 110
differ. So they merge again as in an encoder layer: partners among the tokens of the same picture, a threshold, the
size-weighted mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dymu.merging.encoder_layer import MergedTokens
from dymu.merging.layout import Layout
from dymu.merging.match import AHEAD, above, best_partner, focus_last, in_focus, most_similar
from dymu.token_map import TokenMap, at_least_float32

ROUNDS = 6
"""Each takes about a quarter of the tokens where eight in ten are to go."""


@dataclass(frozen=True, eq=False)
class PictureTokens:
    """The tokens of some pictures, picture after picture, between rounds of merging.

    Attributes:
        x: float32 or wider, the tokens in the state's layout; a row for each picture that has any.
        state: the map from the tokens of the first round, and how many originals each stands for.
        focus: bool [pictures, tokens of the first round], those that merge last; None: none is ahead of another.
    """

    x: Tensor
    state: MergedTokens
    focus: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor, picture: Tensor, size: Tensor, focus: Tensor | None = None) -> PictureTokens:
        """Of tokens [S, C], the picture int64 [S] that each shows, in rising order, their sizes float32 [S], and bool
        [S] whether each is in focus."""
        length = torch.unique_consecutive(picture, return_counts=True)[1]
        layout = Layout.of(length)
        group = layout.present.cumsum(1).sub(1).masked_fill(~layout.present, -1)
        state = MergedTokens(TokenMap(group, length, layout.longest, layout.packed), layout, size.view(layout.shape))
        if focus is not None:
            focus = layout.pad(focus.view(layout.shape)) & layout.present
        return cls(at_least_float32(features).unflatten(0, layout.shape), state, focus)

    @property
    def group(self) -> Tensor:
        """int64 [S]: for each token of the first round, the merged one that it is part of, among all."""
        group = self.state.map.group
        return self.state.layout.index(group)[group >= 0]

    def match(self) -> tuple[Tensor, Tensor]:
        """Similarity and partner of each A token, see `best_partner`."""
        return best_partner(normalize(self.x, dim=-1), self.state.layout)

    def merge(self, into: Tensor) -> PictureTokens:
        """Merge the A tokens into their partners `into`, see `merge_step`."""
        x, state = self.state.merge(self.x, into, 0)
        return replace(self, x=x, state=state)

    def merge_rounds(self, thresholds: Sequence[float]) -> PictureTokens:
        """Merge what is more similar than the threshold of each round; above 1: that round merges nothing."""
        merged = self
        for threshold in thresholds:
            if threshold <= 1:
                similarity, partner = merged.match()
                into = above(threshold, similarity, partner)
                if merged.focus is not None:
                    picture = torch.arange(len(into), device=into.device)
                    into = focus_last(into, similarity, partner, picture, merged._focused(partner))
                merged = merged.merge(into)
        return merged

    def _focused(self, partner: Tensor) -> Tensor:
        """See `in_focus`."""
        assert self.focus is not None
        return in_focus(self.state.map.any(self.focus), partner)

    def merge_to(self, goal: Tensor, item: Tensor) -> PictureTokens:
        """Merge the most similar tokens of each item until so many are left, the same part of them in each round.

        More are left where no further tokens can be compared: those of a picture of NaN.

        Args:
            goal: int64 [items].
            item: int64 [pictures], the item that each of the pictures belongs to.
        """
        merged, first = self, self.left(item, len(goal)).clamp(min=1).double()
        for number in itertools.count(1):
            due = merged.left(item, len(goal)) - goal.maximum(
                (first * (goal / first) ** min(number / ROUNDS, 1)).round().long()
            )
            similarity, partner = merged.match()
            if merged.focus is not None:
                similarity = similarity - AHEAD * merged._focused(partner)
            into = most_similar(due, similarity, partner, item)
            if number >= ROUNDS and not bool((into >= 0).any()):
                break
            # Also where nothing merges, since it brings the tokens into the order that a picture beside others has.
            merged = merged.merge(into)
        return merged

    def left(self, item: Tensor, items: int) -> Tensor:
        """int64 [items], the tokens left of each, see `merge_to`."""
        length = self.state.layout.length
        return length.new_zeros(items).index_add(0, item, length)

    def over_time(self, threshold: float, frames: Sequence[int]) -> Tensor:
        """Join tokens of neighbouring frames: int64 [S], for each token the one that it is part of, or itself.

        A token that is more similar than `threshold` to one of the frame before is part of it. It is compared with the
        first token of the group, so that slow changes do not add up.

        Args:
            threshold: similarity.
            frames: of each video, how many of the pictures are its frames.
        """
        unit = normalize(self.x.flatten(0, 1), dim=-1)
        joins = torch.arange(len(unit), device=unit.device)
        lengths, start = iter(self.state.layout.lengths), 0
        for count in frames:
            before = joins[:0]
            for _ in range(count):
                frame = slice(start, start + next(lengths))
                if len(before):
                    with torch.autocast(unit.device.type, enabled=False):
                        similarity, partner = (unit[frame] @ unit[before].T).max(1)
                    joins[frame] = torch.where(similarity > threshold, before[partner], joins[frame])
                before, start = joins[frame], frame.stop
        return joins
